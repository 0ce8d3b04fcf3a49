"""Verifies a Timeline after it is placed, aligned or released."""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.dependencies import find_dependencies, find_travelling
from dualpipe_jax._schedule.excerpt import show_timeline
from dualpipe_jax._schedule.ir import FORWARD, TICKS_PER_BEAT, Timeline


def verify_timeline(timeline: Timeline) -> None:
    """Checks that a timeline can run.

    - A rank runs its actions in program order, one a tick, from tick 0 on.
    - Every action runs after the tick of each action that it needs: its I or F on the same rank,
      the producer of its x or its cotangent. If that is on another rank, it runs `timeline.lag`
      ticks after it at the soonest.

    Raises:
        ScheduleError: naming action, rank and tick, and showing the ticks around.
    """
    units, tick_of = timeline.program.units, timeline.tick_of
    if early := np.flatnonzero(tick_of < 0).tolist():
        i = early[0]
        raise ScheduleError(f"{units.name(i)} on rank {units.rank[i]} has tick {tick_of[i]} < 0")

    same_rank = units.rank[1:] == units.rank[:-1]
    for i in np.flatnonzero(same_rank & (tick_of[1:] <= tick_of[:-1])).tolist():
        _fail(timeline, i + 1, f"must run after {units.name(i)}, which precedes it in the program")

    needs = find_dependencies(timeline.program)
    lag = np.where(find_travelling(timeline.program, needs), timeline.lag, 1)
    for producer, least in ((needs.payload, lag), (needs.own, 1)):
        late = (producer >= 0) & (tick_of[producer] + least > tick_of)
        for i in np.flatnonzero(late).tolist():
            p = producer[i]
            where = f"rank {units.rank[p]} only in tick {tick_of[p]}"
            if tick_of[p] < tick_of[i]:
                where += f", and whose value takes {timeline.lag} ticks"
            _fail(timeline, i, f"needs {units.name(p)}, which runs on {where}")


def verify_pairs(timeline: Timeline) -> None:
    """Checks what `align` made: a timeline with pairs that nothing comes between, in step.

    - The actions of a pair run in adjacent ticks.
    - All pairs start at the same tick modulo 3.

    Raises:
        ScheduleError: as `verify_timeline`.
    """
    units, tick_of = timeline.program.units, timeline.tick_of
    same_pair = (units.pair[1:] >= 0) & (units.pair[1:] == units.pair[:-1])
    for i in np.flatnonzero(same_pair & (np.diff(tick_of) != 1)).tolist():
        _fail(timeline, i + 1, f"must run right after {units.name(i)}, the two being of one pair")
    starts = np.flatnonzero((units.pair >= 0) & (units.opcode == FORWARD))
    phase = tick_of[starts] % TICKS_PER_BEAT
    for i in starts[phase != phase[:1]].tolist():
        first = f"{units.name(starts[0])} in tick {tick_of[starts[0]]}"
        _fail(timeline, i, f"must start its pair at the same tick modulo 3 as {first}")


def _fail(timeline: Timeline, action: int, fault: str) -> None:
    units = timeline.program.units
    rank, tick = int(units.rank[action]), int(timeline.tick_of[action])
    raise ScheduleError(
        f"schedule {timeline.program.name!r}: {units.name(action)} on rank {rank} in tick {tick} "
        f"{fault}{show_timeline(timeline, tick=tick, rank=rank)}"
    )
