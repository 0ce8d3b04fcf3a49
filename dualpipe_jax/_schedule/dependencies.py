"""Finds the values that each action needs, the actions that make them, and how long they live.

Between two ranks with one microbatch there are two transfers, and every other value stays home:

>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> program = GENERATORS["1f1b"](num_ranks=2, num_microbatches=1)
>>> needs = find_dependencies(program)
>>> name = program.units.name
>>> for action, (payload, own) in enumerate(zip(needs.payload, needs.own, strict=True)):
...     print(name(action), [name(i) for i in (payload, own) if i >= 0])
0F0 []
0I0 ['1I0', '0F0']
0W0 ['0I0']
1F0 ['0F0']
1I0 ['1F0', '1F0']
1W0 ['1I0']
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dualpipe_jax._schedule.actions import (
    BUFFERS,
    COTANGENT,
    DEFERRED,
    FORWARD,
    INPUT_GRAD,
    MIDDLE,
    Opcode,
    X,
    is_one_of,
    opcodes_that,
)
from dualpipe_jax._schedule.ir import LiveRanges, Program, Timeline, UnitActions

# The tick of an action that is never run.
NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, eq=False)
class Dependencies:
    """Names the producers of the values that actions read: int64[num_actions] into `program.units`.

    `payload` makes its x or its cotangent, maybe on a neighbour; `own` is the F that an I follows
    and the I that a W follows, on the same rank. -1 is none. (The lower half of a full
    backward reads the cotangent that the upper half makes.)
    """

    payload: np.ndarray
    own: np.ndarray


def find_dependencies(program: Program) -> Dependencies:
    """Finds the producers of the values that a program's actions read.

    In an illegal program a producer may be missing, as if nothing were needed, or occur twice; then
    it is the first one.
    """
    return _find_dependencies(program.units, program.num_stages, program.num_microbatches)


# Every pass asks for those of the same few programs.
@lru_cache(maxsize=8)
def _find_dependencies(units: UnitActions, num_stages: int, num_microbatches: int) -> Dependencies:
    opcode, stage, microbatch = units.opcode, units.stage, units.microbatch
    last = num_stages - 1

    def find(opcodes: tuple[Opcode, ...], stage: np.ndarray | int) -> np.ndarray:
        """Finds, for each action, one of these opcodes at a stage of the same microbatch."""
        return _index(units, opcodes, shape=(num_stages, num_microbatches))[stage, microbatch]

    units_followed = FORWARD, INPUT_GRAD
    own = np.select(
        [is_one_of(opcode, opcodes_that(follows=unit)) for unit in units_followed],
        [find(opcodes_that(unit=unit), stage) for unit in units_followed],
        -1,
    )
    takes_x, takes_cotangent, takes_middle = (
        is_one_of(opcode, opcodes_that(takes=value)) for value in (X, COTANGENT, MIDDLE)
    )
    payload = np.select(
        [takes_x & (stage > 0), takes_cotangent & (stage == last), takes_cotangent, takes_middle],
        [
            find(opcodes_that(makes=X), stage - 1),
            own,  # the head makes the first cotangent
            find(opcodes_that(makes=COTANGENT), np.minimum(stage + 1, last)),
            own,
        ],
        -1,
    )
    return Dependencies(payload, own)


def _index(
    units: UnitActions, opcodes: tuple[Opcode, ...], *, shape: tuple[int, int]
) -> np.ndarray:
    """Finds the first action of some opcodes: int64[num_stages, num_microbatches], -1 for none."""
    here = np.flatnonzero(is_one_of(units.opcode, opcodes))
    first = np.full(shape, len(units))
    np.minimum.at(first, (units.stage[here], units.microbatch[here]), here)
    return np.where(first < len(units), first, -1)


def find_travelling(program: Program, needs: Dependencies) -> np.ndarray:
    """Finds the actions whose x or cotangent another rank makes: bool[num_actions]."""
    rank = program.units.rank
    return (needs.payload >= 0) & (rank[needs.payload] != rank)


def run_in_order(
    program: Program, needs: Dependencies, *, earliest: np.ndarray | None = None, lag: int = 1
) -> np.ndarray:
    """Runs a program as far as it goes, every action as soon as it can, in program order.

    Args:
        program: The program.
        needs: Its dependencies.
        earliest: int64[num_actions], the tick before which each must not run; by default 0.
        lag: How many ticks after another rank has made a value an action may read it.

    Returns:
        int64[num_actions], the tick of each action; `NEVER` where ranks wait for each other.
    """
    units = program.units
    # One entry more, for "needs nothing": index -1, done before the first tick.
    tick_of = [NEVER] * len(units) + [-1]
    payload, own = needs.payload.tolist(), needs.own.tolist()
    soonest = [0] * len(units) if earliest is None else earliest.tolist()
    after = np.where(find_travelling(program, needs), lag, 1).tolist()
    upcoming, stop = units.row_start[:-1].tolist(), units.row_start[1:].tolist()
    free = [0] * program.num_ranks
    # For an action that has not run yet, the ranks that wait for it. A rank waits for one action at
    # a time, and runs on when that has run, so that every action is looked at a few times only.
    waiting: dict[int, list[int]] = {}
    runnable = list(range(program.num_ranks))
    while runnable:
        rank = runnable.pop()
        while (action := upcoming[rank]) < stop[rank]:
            made, before = payload[action], own[action]
            missing = made if tick_of[made] == NEVER else before
            if tick_of[missing] == NEVER:
                waiting.setdefault(missing, []).append(rank)
                break
            tick = max(tick_of[made] + after[action], tick_of[before] + 1)
            tick_of[action] = tick = max(tick, free[rank], soonest[action])
            free[rank], upcoming[rank] = tick + 1, action + 1
            runnable += waiting.pop(action, ())
    return np.array(tick_of[:-1], np.int64)


def find_live_ranges(
    program: Program, tick_of: np.ndarray, sent_in: np.ndarray
) -> dict[str, LiveRanges]:
    """Finds when the values of a timeline live, for each of its buffers.

    A payload lives from the tick after it was made, or sent, to its read; if it is sent later than
    made, it lives on its producer's rank until then. A value of another buffer lives from the
    action that writes it to the one that frees it.
    """
    units, shape = program.units, (program.num_stages, program.num_microbatches)
    live = {"received": _find_received(program, tick_of, sent_in)}
    for buffer in (*BUFFERS[1:], DEFERRED):
        producer_of = _index(units, opcodes_that(writes=buffer), shape=shape)
        consumer = np.flatnonzero(is_one_of(units.opcode, opcodes_that(frees=buffer)))
        producer = producer_of[units.stage[consumer], units.microbatch[consumer]]
        if buffer != DEFERRED or consumer.size:
            ticks = tick_of[producer], tick_of[consumer]
            live[buffer] = LiveRanges(units.rank[consumer], *ticks, producer, consumer)
    return live


def _find_received(program: Program, tick_of: np.ndarray, sent_in: np.ndarray) -> LiveRanges:
    rank, payload = program.units.rank, find_dependencies(program).payload
    reads = np.flatnonzero(payload >= 0)
    made = payload[reads]
    is_late = sent_in[made] > tick_of[made]
    waits, waits_for = made[is_late], reads[is_late]
    return LiveRanges(
        rank=np.concatenate([rank[reads], rank[waits]]),
        start=np.concatenate([sent_in[made], tick_of[waits]]) + 1,
        # In its tick the output is stored before it is sent: then its slot is still taken.
        end=np.concatenate([tick_of[reads], sent_in[waits] + 1]),
        producer=np.concatenate([made, waits]),
        consumer=np.concatenate([reads, waits_for]),
    )


def count_live(live: LiveRanges, *, num_ticks: int, num_ranks: int) -> np.ndarray:
    """Counts the values alive: int64[num_ticks, num_ranks]."""
    change = np.zeros((num_ticks + 1, num_ranks), np.int64)
    np.add.at(change, (live.start, live.rank), 1)
    np.add.at(change, (live.end + 1, live.rank), -1)
    return change.cumsum(axis=0)[:-1]


def build_timeline(
    program: Program,
    tick_of: np.ndarray,
    *,
    sent_in: np.ndarray | None = None,
    timetable: str = "shortest",
) -> Timeline:
    """Joins a program and its ticks into a timeline, counting the slots that it takes.

    An action's value is sent in the tick in which it is made, unless `sent_in` says another one.
    """
    sent_in = tick_of if sent_in is None else sent_in
    num_ticks = int(tick_of.max()) + 1
    num_slots = {
        buffer: int(count_live(live, num_ticks=num_ticks, num_ranks=program.num_ranks).max())
        for buffer, live in find_live_ranges(program, tick_of, sent_in).items()
    }
    return Timeline(program, tick_of, sent_in, num_slots, timetable)
