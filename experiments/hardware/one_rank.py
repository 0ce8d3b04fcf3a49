"""Measures a step over one rank beside gradient accumulation, and the time of a tick by itself.

Both have the same functions, parameters, batch and accumulators; nothing is sent, and nobody waits.
On GPUs the step is compiled with each set of command buffers, and all programs take turns. So is a
step over all devices, in a part of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import dualpipe_jax as dpj
from experiments.hardware import programs
from experiments.hardware.tasks import Figure, Sizes, Task
from experiments.hardware.timing import difference, share, side_by_side

STEP, TICK, COMMANDS = "one rank", "a tick by itself", "command buffers"
SCHEDULE = "1f1b"
UNROLLED, LOOPED = (f"gradient accumulation, layers {how}" for how in ("unrolled", "looped"))
_MANY = 4  # times the microbatches of the step with few
Plan = Callable[[], programs.Step]


def measure(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a step over one rank, and of gradient accumulation."""
    sizes, mesh = task.sizes, programs.make_mesh(1)
    args = programs.make_arrays(sizes, mesh, layers=sizes.layers, microbatches=sizes.microbatches)
    step = programs.pipelined(sizes, mesh, microbatches=sizes.microbatches, schedule=SCHEDULE)
    plans = {
        **_with_each_set(SCHEDULE, step, args),
        **_accumulated(sizes, args, microbatches=sizes.microbatches),
    }
    yield from _seconds(STEP, plans, rounds=sizes.rounds)


def measure_commands(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a step over all devices, with each set of command buffers."""
    sizes, mesh = task.sizes, programs.make_mesh(task.devices)
    microbatches, layers = sizes.microbatches * task.devices, sizes.layers * task.devices
    args = programs.make_arrays(sizes, mesh, layers=layers, microbatches=microbatches)
    step = programs.pipelined(sizes, mesh, microbatches=microbatches, schedule=task.schedule)
    plans = _with_each_set(task.schedule, step, args)
    yield from _seconds(COMMANDS, plans, rounds=sizes.rounds)


def measure_tick(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a microbatch and of a tick, of tiny blocks: eight tokens, width 128.

    They are the difference between steps of many microbatches and of few, by the microbatches, and
    by the ticks, between. F, I and W are a tick each. Gradient accumulation has no ticks: the time
    of its microbatch is that of the tiny blocks themselves.
    """
    few = task.sizes.microbatches
    many = _MANY * few
    sizes = dataclasses.replace(task.sizes, family="mlp", width=128, tokens=8, layers=1)
    mesh = programs.make_mesh(1)
    split = dpj.Execution(split_backward=True)
    plans: dict[str, Plan] = {}
    rows: list[str] = []
    for number in (few, many):
        args = programs.make_arrays(sizes, mesh, layers=1, microbatches=number)
        step = programs.pipelined(
            sizes, mesh, microbatches=number, schedule=SCHEDULE, execution=split
        )
        made = {
            **_with_each_set(SCHEDULE, step, args),
            UNROLLED: _accumulated(sizes, args, microbatches=number)[UNROLLED],
        }
        rows = list(made)
        plans |= {f"{row}, {number} microbatches": plan for row, plan in made.items()}
    times = side_by_side(plans, rounds=sizes.rounds)
    for row in rows:
        names = [f"{row}, {number} microbatches" for number in (few, many)]
        failure = next((times.failures[name] for name in names if name in times.failures), "")
        if failure:
            yield Figure(table=TICK, row=row, column="microbatch", note=failure, is_failure=True)
            continue
        between = difference(times.samples[names[1]], times.samples[names[0]])
        of_microbatch = share(between, many - few)
        yield Figure(table=TICK, row=row, column="microbatch", samples=of_microbatch)
        if row != UNROLLED:
            ticks = _num_ticks(many) - _num_ticks(few)
            yield Figure(table=TICK, row=row, column="tick", samples=share(between, ticks))


def _seconds(table: str, plans: dict[str, Plan], *, rounds: int) -> Iterator[Figure]:
    times = side_by_side(plans, rounds=rounds)
    for row in plans:
        failure, samples = times.failures.get(row, ""), times.samples.get(row, ())
        yield Figure(
            table=table,
            row=row,
            column="seconds",
            samples=samples,
            note=failure,
            is_failure=bool(failure),
        )


def _num_ticks(microbatches: int) -> int:
    schedule = dpj.schedules.make(SCHEDULE, num_ranks=1, num_microbatches=microbatches)
    return schedule.timeline().num_ticks


def _with_each_set(schedule: str, step: Any, args: tuple[Any, Any]) -> dict[str, Plan]:
    """Compiles a step with each set of command buffers; the default's row comes first."""
    overlap = programs.options_for_overlap()
    return {
        f"{schedule}, command buffers: {name}": programs.runner(step, args, {**overlap, **more})
        for name, more in programs.commands().items()
    }


def _accumulated(sizes: Sizes, args: tuple[Any, Any], *, microbatches: int) -> dict[str, Plan]:
    """Compiles gradient accumulation, layers in a row and in a loop."""
    return {
        row: programs.runner(
            programs.accumulated(sizes, microbatches=microbatches, unrolled=unrolled), args
        )
        for row, unrolled in ((UNROLLED, sizes.layers), (LOOPED, 1))
    }
