"""Measures a step over one rank beside gradient accumulation, and the time of a tick by itself.

Both have the same functions, parameters, batch and accumulators; nothing is sent, and nobody waits.
On GPUs the step is compiled with each set of command buffers, and all programs take turns.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import dualpipe_jax as dpj
from experiments.hardware import programs
from experiments.hardware.tasks import Figure, Sizes, Task
from experiments.hardware.timing import difference, share, side_by_side

STEP, TICK = "one rank", "a tick by itself"
SCHEDULE = "1f1b"
UNROLLED, LOOPED = (f"gradient accumulation, layers {how}" for how in ("unrolled", "looped"))
_MANY = 4  # times the microbatches of the step with few


def measure(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a step of each program."""
    sizes = task.sizes
    plans = _plans(sizes, programs.make_mesh(1), microbatches=sizes.microbatches)
    times = side_by_side(plans, rounds=sizes.rounds)
    for row in plans:
        failure = times.failures.get(row, "")
        samples = times.samples.get(row, ())
        yield Figure(
            table=STEP,
            row=row,
            column="seconds",
            samples=samples,
            note=failure,
            is_failure=bool(failure),
        )


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
    plans = {
        (row, number): plan
        for number in (few, many)
        for row, plan in _plans(sizes, mesh, microbatches=number, execution=split).items()
        if row != LOOPED
    }
    named = {f"{row}, {number} microbatches": plan for (row, number), plan in plans.items()}
    times = side_by_side(named, rounds=sizes.rounds)
    for row in dict.fromkeys(row for row, _ in plans):
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


def _num_ticks(microbatches: int) -> int:
    schedule = dpj.schedules.make(SCHEDULE, num_ranks=1, num_microbatches=microbatches)
    return schedule.timeline().num_ticks


def _plans(
    sizes: Sizes, mesh: Any, *, microbatches: int, **options: Any
) -> dict[str, Callable[[], programs.Step]]:
    """Makes the step with each set of command buffers, and gradient accumulation, by row."""
    args = programs.make_arrays(sizes, mesh, layers=sizes.layers, microbatches=microbatches)
    step = programs.pipelined(sizes, mesh, microbatches=microbatches, schedule=SCHEDULE, **options)
    overlap = programs.options_for_overlap()
    plans = {
        f"{SCHEDULE}, command buffers: {name}": programs.runner(step, args, {**overlap, **more})
        for name, more in programs.commands().items()
    }
    for row, unrolled in ((UNROLLED, sizes.layers), (LOOPED, 1)):
        plain = programs.accumulated(sizes, microbatches=microbatches, unrolled=unrolled)
        plans[row] = programs.runner(plain, args)
    return plans
