"""Verifies a Timeline after it is placed, aligned or released."""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import FORWARD
from dualpipe_jax._schedule.dependencies import find_dependencies, find_travelling
from dualpipe_jax._schedule.excerpt import show_timeline
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT, Timeline


def verify_timeline(timeline: Timeline) -> None:
    """Checks that a timeline can run.

    - A rank runs its actions in program order, one a tick, from tick 0 on.
    - Every action runs after the tick of each action that it needs: its I or F on the same rank,
      the producer of its x or its cotangent. If that producer is on another rank, the action runs
      at least `timeline.lag` ticks after the value is sent.
    - A value is sent in the tick in which it is made, or later, and a rank sends one in a tick.

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
    travels = find_travelling(timeline.program, needs)
    _check_sends(timeline, needs.payload[travels])
    # From which tick on each needed value is there.
    payload_there, own_there = tick_of[needs.payload] + 1, tick_of[needs.own] + 1
    payload_there[travels] = timeline.sent_in[needs.payload[travels]] + timeline.lag
    for producer, there in ((needs.payload, payload_there), (needs.own, own_there)):
        for i in np.flatnonzero((producer >= 0) & (there > tick_of)).tolist():
            p = producer[i]
            where = f"rank {units.rank[p]} only in tick {tick_of[p]}"
            if tick_of[p] < tick_of[i]:
                where += f", and whose value is there from tick {there[i]} on"
            _fail(timeline, i, f"needs {units.name(p)}, which runs on {where}")


def _check_sends(timeline: Timeline, senders: np.ndarray) -> None:
    """Checks when the values of actions go to other ranks."""
    units, sent_in = timeline.program.units, timeline.sent_in
    for i in senders[sent_in[senders] < timeline.tick_of[senders]].tolist():
        _fail(timeline, i, f"sends its value in tick {sent_in[i]}, before it is made")
    order = senders[np.lexsort((sent_in[senders], units.rank[senders]))]
    first, second = order[:-1], order[1:]
    both = (units.rank[first] == units.rank[second]) & (sent_in[first] == sent_in[second])
    for i, k in zip(first[both].tolist(), second[both].tolist(), strict=True):
        _fail(timeline, k, f"sends its value in tick {sent_in[k]}, as {units.name(i)} does")


def verify_pairs(timeline: Timeline) -> None:
    """Checks an aligned timeline: pairs are in one piece, and in step.

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
