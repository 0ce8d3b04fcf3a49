"""Measures a step over one rank beside gradient accumulation, and the time of a tick by itself.

Both have the same functions, parameters, batch and accumulators; nothing is sent, and nobody waits.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dualpipe_jax as dpj
from experiments.hardware import programs
from experiments.hardware.tasks import Figure, Sizes, Task
from experiments.hardware.timing import Times, difference, share, side_by_side

STEP, TICK = "one rank", "a tick by itself"
SCHEDULE = "1f1b"
UNROLLED, LOOPED = (f"gradient accumulation, layers {how}" for how in ("unrolled", "looped"))
_MANY = 4  # times the microbatches of the step with few
Plan = Callable[[], programs.Step]


def measure(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a step over one rank, and of gradient accumulation."""
    sizes, mesh = task.sizes, programs.make_mesh(1)
    args = programs.make_arrays(sizes, mesh, layers=sizes.layers, microbatches=sizes.microbatches)
    step = programs.pipelined(sizes, mesh, microbatches=sizes.microbatches, schedule=SCHEDULE)
    plans = {SCHEDULE: programs.runner(step, args, programs.options_for_overlap())}
    for row, unrolled in ((UNROLLED, sizes.layers), (LOOPED, 1)):
        plain = programs.accumulated(sizes, microbatches=sizes.microbatches, unrolled=unrolled)
        plans[row] = programs.runner(plain, args)
    times = side_by_side(plans, rounds=sizes.rounds)
    yield from (times.figure(row, table=STEP, row=row, column="seconds") for row in plans)


def measure_tick(task: Task) -> Iterator[Figure]:
    """Yields the seconds of a microbatch and of a tick, of tiny blocks.

    Gradient accumulation has no ticks: the time of its microbatch is that of the blocks themselves.
    """
    sizes, mesh = _tiny(task.sizes), programs.make_mesh(1)
    plans = ticking(SCHEDULE, sizes, programs.options_for_overlap())
    for number in _numbers(sizes):
        args = programs.make_arrays(sizes, mesh, layers=sizes.layers, microbatches=number)
        plain = programs.accumulated(sizes, microbatches=number, unrolled=sizes.layers)
        plans[f"{UNROLLED}, {number} microbatches"] = programs.runner(plain, args)
    times = side_by_side(plans, rounds=sizes.rounds)
    for row, unit in ((SCHEDULE, "microbatch"), (UNROLLED, "microbatch"), (SCHEDULE, "tick")):
        yield tick_figure(row, unit, times, sizes, table=TICK, row=row, column=unit)


def ticking(name: str, sizes: Sizes, options: Mapping[str, Any]) -> dict[str, Plan]:
    """Makes steps of tiny blocks, one of few microbatches and one of many, for `tick_figure`."""
    sizes, mesh = _tiny(sizes), programs.make_mesh(1)
    plans = {}
    for number in _numbers(sizes):
        args = programs.make_arrays(sizes, mesh, layers=sizes.layers, microbatches=number)
        step = programs.pipelined(
            sizes,
            mesh,
            microbatches=number,
            schedule=SCHEDULE,
            execution=dpj.Execution(split_backward=True),  # F, I and W are a tick each
        )
        plans[f"{name}, {number} microbatches"] = programs.runner(step, args, dict(options))
    return plans


def tick_figure(
    name: str, unit: str, times: Times, sizes: Sizes, *, table: str, row: str, column: str
) -> Figure:
    """Gives the seconds of a unit, `"microbatch"` or `"tick"`, of the steps of `ticking`.

    They are the difference between steps of many microbatches and of few, by the microbatches or
    the ticks between.
    """
    few, many = _numbers(sizes)
    names = [f"{name}, {number} microbatches" for number in (few, many)]
    failed = next((each for each in names if each in times.failures), None)
    if failed is not None:
        return times.figure(failed, table=table, row=row, column=column)
    between = difference(times.samples[names[1]], times.samples[names[0]])
    parts = many - few if unit == "microbatch" else _num_ticks(many) - _num_ticks(few)
    return Figure(table=table, row=row, column=column, samples=share(between, parts))


def _tiny(sizes: Sizes) -> Sizes:
    """Gives a tick's sizes: eight tokens, one MLP of width 128."""
    return dataclasses.replace(sizes, family="mlp", width=128, tokens=8, layers=1)


def _numbers(sizes: Sizes) -> tuple[int, int]:
    """Gives the numbers of microbatches, few and many."""
    return sizes.microbatches, _MANY * sizes.microbatches


def _num_ticks(microbatches: int) -> int:
    schedule = dpj.schedules.make(SCHEDULE, num_ranks=1, num_microbatches=microbatches)
    return schedule.timeline().num_ticks
