"""Measures one set of command buffers (CUDA graphs) beside XLA's default, in a process of its own.

A driver may refuse a graph, or not come back from it: then the other sets have their figures still.
"""

from collections.abc import Iterator

from experiments.hardware import one_rank, programs
from experiments.hardware.tasks import Figure, Task
from experiments.hardware.timing import side_by_side

TABLE = "command buffers"
# Columns of the set, and of the default beside it.
STEP, TICK = "step", "tick"
DEFAULT_STEP, DEFAULT_TICK = "default step", "default tick"


def measure(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a step over all devices, and of a tick by itself."""
    sizes, mesh = task.sizes, programs.make_mesh(task.devices)
    microbatches, layers = sizes.microbatches * task.devices, sizes.layers * task.devices
    args = programs.make_arrays(sizes, mesh, layers=layers, microbatches=microbatches)
    step = programs.pipelined(sizes, mesh, microbatches=microbatches, schedule=task.schedule)
    overlap = programs.options_for_overlap()
    options = {"default": overlap, "set": {**overlap, **programs.COMMANDS[task.commands]}}
    plans = {name: programs.runner(step, args, each) for name, each in options.items()}
    for name, each in options.items():
        plans |= one_rank.ticking(name, sizes, each)
    times = side_by_side(plans, rounds=sizes.rounds)
    for name, of_step, of_tick in (
        ("set", STEP, TICK),
        ("default", DEFAULT_STEP, DEFAULT_TICK),
    ):
        yield times.figure(name, table=TABLE, row=task.commands, column=of_step)
        yield one_rank.tick_figure(
            name, "tick", times, sizes, table=TABLE, row=task.commands, column=of_tick
        )
