"""Timeline -> Timeline: delays actions until every rank starts its pairs at the same tick modulo 3.

The three ticks in which every rank runs a pair are a beat; a steady phase of beats is straight-line
code, the same on all ranks. A pair takes three adjacent ticks, F, I, W, and each rank keeps its
order. All three phases are tried: the fewest ticks win, then the most beats; in that phase no
action could run earlier. DualPipe then takes its published 3N + P - 2 ticks (at F = I = W = 1, even
sizes, N >= 2P), P/2 - 1 more than the shortest; `release` takes them back.

DualPipeV on two ranks, its stages left out. Rank 0 starts its pairs at ticks 7, 10 and 15, rank 1
at 8, 11 and 14. Aligned, they start at 8, 11 and 17, and at 8, 11 and 14: two beats.

>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> shortest = place_shortest(GENERATORS["dualpipev"](num_ranks=2, num_microbatches=4))
>>> aligned = align(shortest)
>>> def show(timeline):
...     for row in zip(*timeline.actions, strict=True):
...         print(*(action[1:] if action else ".." for action in row))
>>> show(shortest)
F0 F1 F2 F0 I0 W0 F1 F3 I1 W1 F2 I0 W0 I2 W2 F3 I1 W1 I3 W3 I2 W2 .. I3 W3
.. F0 F0 F1 F1 F2 I0 W0 F2 I0 W0 F3 I1 W1 F3 I1 W1 I2 W2 I2 W2 I3 I3 W3 W3
>>> show(aligned)
F0 F1 F2 F0 I0 W0 F1 .. F3 I1 W1 F2 I0 W0 I2 W2 .. F3 I1 W1 I3 W3 I2 W2 I3 W3
.. F0 F0 F1 F1 F2 I0 W0 F2 I0 W0 F3 I1 W1 F3 I1 W1 I2 W2 I2 W2 I3 I3 W3 W3 ..
>>> aligned.beats.tolist()
[8, 11]
"""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import FORWARD
from dualpipe_jax._schedule.dependencies import (
    NEVER,
    Dependencies,
    build_timeline,
    find_dependencies,
)
from dualpipe_jax._schedule.excerpt import show_action
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT, Program, Timeline

_MOST_NAMED = 8


def align(timeline: Timeline) -> Timeline:
    """Aligns the pairs of a timeline. One without pairs is unchanged.

    Raises:
        ScheduleError: if pairs wait for each other for ever unless something comes between their
            actions, naming them and showing the ticks around.
    """
    program = timeline.program
    if not (program.units.pair >= 0).any():
        return build_timeline(program, timeline.tick_of, timetable="aligned")
    needs = find_dependencies(program)
    timelines = []
    for phase in range(TICKS_PER_BEAT):
        tick_of = _run_aligned(program, needs, phase)
        if (tick_of == NEVER).any():
            raise ScheduleError(_describe_deadlock(program, needs, tick_of))
        timelines.append(build_timeline(program, tick_of, timetable="aligned"))
    return min(timelines, key=lambda aligned: (aligned.num_ticks, -len(aligned.beats)))


def _run_aligned(program: Program, needs: Dependencies, phase: int) -> np.ndarray:
    """Runs a program as far as it goes, its pairs at ticks of a phase modulo 3.

    Returns:
        int64[num_actions], the tick of each action; `NEVER` where ranks wait for each other.
    """
    units = program.units
    # One entry more, for "needs nothing": index -1, done before the first tick.
    tick_of = np.full(len(units) + 1, NEVER)
    tick_of[-1] = -1
    starts_pair = _starts_pair(program)
    upcoming, stop = units.row_start[:-1].copy(), units.row_start[1:]
    tick = waited = 0
    while (waiting := np.flatnonzero(upcoming < stop)).size and waited < TICKS_PER_BEAT:
        ready = waiting[_last_need(tick_of, needs, upcoming[waiting]) < tick]
        is_start = starts_pair[upcoming[ready]]
        run = ready[~is_start]
        tick_of[upcoming[run]] = tick
        if tick % TICKS_PER_BEAT == phase:
            # A pair's I is in the next tick: it may need another rank's value of this one.
            forward = upcoming[ready[is_start]]
            start = ready[is_start][_last_need_of_backward(tick_of, needs, forward) <= tick]
            tick_of[upcoming[start]] = tick
            run = np.concatenate([run, start])
        upcoming[run] += 1
        waited = 0 if run.size else waited + 1
        tick += 1
    return tick_of[:-1]


def _starts_pair(program: Program) -> np.ndarray:
    """Marks the F of each pair: bool[num_actions]."""
    return (program.units.pair >= 0) & (program.units.opcode == FORWARD)


def _last_need(tick_of: np.ndarray, needs: Dependencies, action: np.ndarray) -> np.ndarray:
    """Finds the tick by which all that actions need is done."""
    return np.maximum(tick_of[needs.payload[action]], tick_of[needs.own[action]])


def _last_need_of_backward(
    tick_of: np.ndarray, needs: Dependencies, forward: np.ndarray
) -> np.ndarray:
    """Finds the same for the I's of pairs, leaving out their pairs' F's."""
    producers = np.stack([needs.payload[forward + 1], needs.own[forward + 1]])
    return tick_of[np.where(producers == forward, -1, producers)].max(axis=0)


def _describe_deadlock(program: Program, needs: Dependencies, tick_of: np.ndarray) -> str:
    """Names the next action of each rank that is stuck, and the one for which it waits."""
    units, starts_pair = program.units, _starts_pair(program)
    never = np.flatnonzero(tick_of == NEVER)
    stuck = never[np.unique(units.rank[never], return_index=True)[1]].tolist()
    lines = []
    for action in stuck[:_MOST_NAMED]:
        together = [action, action + 1] if starts_pair[action] else [action]
        wanted = [i for a in together for i in (needs.payload[a], needs.own[a]) if i >= 0]
        awaited = next(i for i in wanted if i not in together and tick_of[i] == NEVER)
        pair = f", paired with {units.name(action + 1)}," if starts_pair[action] else ""
        lines.append(
            f"\n  rank {units.rank[action]}: {units.name(action)}{pair} waits for "
            f"{units.name(awaited)} of rank {units.rank[awaited]}"
        )
    if len(stuck) > _MOST_NAMED:
        lines.append(f"\n  and {len(stuck) - _MOST_NAMED} ranks more")
    first = next(action for action in stuck if starts_pair[action])
    where, excerpt = show_action(program, tick_of, first)
    return (
        f"schedule {program.name!r} cannot be aligned at {where}: nothing may come between the "
        f"F and the I of a pair, and so these ranks wait for each other; write a pair of them as "
        f"F and B:{''.join(lines)}{excerpt}"
    )
