"""Program -> Timeline: gives each action its tick.

A value that a rank makes in tick t may be read in tick t + 1, there or on a neighbour. This module
makes the shortest timetable: every action runs as soon as its rank is free and its inputs are
there, in program order. `align` makes another one, in which all ranks start their pairs at the same
tick modulo 3.

The two-tick timetable is the shortest one in which a neighbour reads a value of tick t in tick
t + 2 or later: no transfer is urgent, and each is hidden behind the whole of tick t + 1
(`Tables.is_lazy`). It has more ticks, and as many more idle ones, which cost next to nothing.
Replays of P=8 N=32 in which senders do not wait for their receivers take 1.00 to 1.05 of the time
that the order needs. Where an input grad takes twice as long as a forward, 1f1b and zb-h1 take 1.06
to 1.11 of it, since neighbours are never more than a tick apart. Pairs are not aligned, as the
transfers that straight-line beats would hide are hidden already: replays of dualpipe and dualpipev
with beats took 1.02 and 1.03 of it, without them 1.02 and 1.03 too.

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
>>> for row in zip(*place_shortest(program, timetable="two-tick").actions, strict=True):
...     print(*(action or "..." for action in row))
0F0 0F1 ... ... ... 0I0 0W0 ... 0I1 0W1
... ... 1F0 1I0 1W0 1F1 1I1 1W1 ... ...
"""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.dependencies import (
    NEVER,
    Dependencies,
    build_timeline,
    find_dependencies,
    run_in_order,
)
from dualpipe_jax._schedule.excerpt import show_action
from dualpipe_jax._schedule.generators.sizes import MOST_CELLS
from dualpipe_jax._schedule.ir import Program, Timeline, lag_of

_MOST_NAMED = 8


def place_shortest(program: Program, *, timetable: str = "shortest") -> Timeline:
    """Places every action as soon as possible, in program order.

    Args:
        program: The program.
        timetable: One of `TIMETABLES`, which says how long a value travels.

    Raises:
        ScheduleError: if ranks wait for each other for ever, naming action, rank and tick, and
            showing the ticks around; if there are more ticks and ranks than a table can hold.
    """
    tick_of = shortest_ticks(program, timetable=timetable)
    num_ticks = int(tick_of.max()) + 1
    if num_ticks * program.num_ranks > MOST_CELLS:
        raise ScheduleError(
            f"schedule {program.name!r} takes {num_ticks:,} ticks on {program.num_ranks:,} ranks, "
            f"but must take at most {MOST_CELLS:,} ticks of single ranks, beyond which no table "
            "holds them; take fewer ranks or microbatches"
        )
    return build_timeline(program, tick_of, timetable=timetable)


def shortest_ticks(program: Program, *, timetable: str = "shortest") -> np.ndarray:
    """Finds the ticks of `place_shortest`: int64[num_actions].

    Raises:
        ScheduleError: if ranks wait for each other for ever.
    """
    needs = find_dependencies(program)
    tick_of = run_in_order(program, needs, lag=lag_of(timetable))
    if (tick_of == NEVER).any():
        raise ScheduleError(_describe_deadlock(program, needs, tick_of))
    return tick_of


def _describe_deadlock(program: Program, needs: Dependencies, tick_of: np.ndarray) -> str:
    """Finds a circle of ranks, and names the next action of each and the one for which it waits."""
    name, rank_of = program.units.name, program.units.rank
    # The first action that each rank does not come to, and one for which it waits.
    stuck, awaited = {}, {}
    for action in np.flatnonzero(tick_of == NEVER).tolist():
        rank = int(rank_of[action])
        if rank not in stuck:
            stuck[rank] = action
            wanted = [i for i in (needs.payload[action], needs.own[action]) if i >= 0]
            awaited[rank] = next(int(i) for i in wanted if tick_of[i] == NEVER)
    # Following the ranks that are waited for leads back to a rank seen before.
    rank, place_of = min(stuck), {}
    while rank not in place_of:
        place_of[rank] = len(place_of)
        rank = int(rank_of[awaited[rank]])
    circle = list(place_of)[place_of[rank] :]
    circle = circle[circle.index(min(circle)) :] + circle[: circle.index(min(circle))]

    lines = []
    for rank in circle[:_MOST_NAMED]:
        producer = awaited[rank]
        behind = stuck[int(rank_of[producer])]
        later = f", which comes after {name(behind)}" if producer != behind else ""
        lines.append(
            f"\n  rank {rank}: {name(stuck[rank])} waits for {name(producer)} of rank "
            f"{rank_of[producer]}{later}"
        )
    if len(circle) > _MOST_NAMED:
        lines.append(f"\n  and {len(circle) - _MOST_NAMED} ranks more")
    where, excerpt = show_action(program, tick_of, stuck[circle[0]])
    return (
        f"schedule {program.name!r} deadlocks at {where}: these ranks wait in a circle; reorder "
        f"their rows:{''.join(lines)}{excerpt}"
    )
