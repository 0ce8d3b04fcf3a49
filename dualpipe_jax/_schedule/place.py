"""Program -> Timeline: gives each action its tick.

What a rank produces in tick t, itself or a neighbour may use in tick t + 1. Here is the shortest
timetable: every action as soon as its rank is free and its inputs are there, in program order. The
aligned one (all ranks start their pairs at the same tick modulo 3) will be a second function.

Two ranks, two microbatches. Rank 1 waits a tick for its first x, rank 0 for its first cotangent:

>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> program = GENERATORS["1f1b"](num_ranks=2, num_microbatches=2)
>>> print(program.to_csv(), end="")
0F0,0F1,0B0,0B1
1F0,1B0,1F1,1B1
>>> for row in zip(*place_shortest(program).actions, strict=True):
...     print(*(action or "..." for action in row))
0F0 0F1 ... 0I0 0W0 ... 0I1 0W1
... 1F0 1I0 1W0 1F1 1I1 1W1 ...
"""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.dependencies import Dependencies, build_timeline, find_dependencies
from dualpipe_jax._schedule.ir import Program, Timeline


def place_shortest(program: Program) -> Timeline:
    """Places every action as soon as possible, in program order.

    Raises:
        ScheduleError: if ranks wait for each other for ever.
    """
    units, needs = program.units, find_dependencies(program)
    num_actions = len(units)
    # One entry more, for "needs nothing": index -1, done before the first tick.
    tick_of = np.full(num_actions + 1, np.iinfo(np.int64).max)
    tick_of[-1] = -1
    upcoming, stop = units.row_start[:-1].copy(), units.row_start[1:]
    tick = 0
    while (waiting := np.flatnonzero(upcoming < stop)).size:
        action = upcoming[waiting]
        ready = np.maximum(tick_of[needs.payload[action]], tick_of[needs.own[action]]) < tick
        if not ready.any():
            raise ScheduleError(_describe_deadlock(program, needs, tick_of, action, tick))
        tick_of[action[ready]] = tick
        upcoming[waiting[ready]] += 1
        tick += 1
    return build_timeline(program, tick_of[:-1])


def _describe_deadlock(
    program: Program, needs: Dependencies, tick_of: np.ndarray, stuck: np.ndarray, tick: int
) -> str:
    """Says for each stuck rank what it would do next and for what it waits."""
    name, rank_of = program.units.name, program.units.rank
    lines = []
    for action in stuck.tolist():
        missing = {i for i in (needs.payload[action], needs.own[action]) if tick_of[i] >= tick}
        waits = " and ".join(f"{name(i)} of rank {rank_of[i]}" for i in sorted(missing))
        lines.append(f"\n  rank {rank_of[action]}: {name(action)} waits for {waits}")
    return (
        f"schedule {program.name!r} deadlocks at tick {tick}: each rank's next action waits for "
        f"one that comes later; reorder the rows:" + "".join(lines)
    )
