"""What each action needs, who produces it, and how long the values in between live.

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

import numpy as np

from dualpipe_jax._schedule.ir import (
    DEFERRED,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    LiveRanges,
    Program,
    Timeline,
)

# The tick of an action that is never run.
NEVER = int(np.iinfo(np.int64).max)


@dataclass(frozen=True, eq=False)
class Dependencies:
    """Names the producers of what each action reads: int64[num_actions] into `program.units`.

    `payload` makes its x or its cotangent, maybe on a neighbour; `own` is the F that an I follows
    and the I that a W follows, on the same rank. -1 is none. (Of a full backward in halves the W
    reads the cotangent that its I leaves, and makes the one of x.)
    """

    payload: np.ndarray
    own: np.ndarray


def find_dependencies(program: Program) -> Dependencies:
    """Finds the producers of what each action of a program reads.

    Of a program that is not legal a producer may be missing, as if nothing were needed, or be
    there twice; then the first is meant.
    """
    units = program.units
    last = program.num_stages - 1
    first = np.full((4, program.num_stages, program.num_microbatches), len(units))
    np.minimum.at(first, (units.opcode, units.stage, units.microbatch), np.arange(len(units)))
    index = np.where(first < len(units), first, -1)

    opcode, stage, microbatch = units.opcode, units.stage, units.microbatch
    is_f, is_i, is_w = (opcode == o for o in (FORWARD, INPUT_GRAD, WEIGHT_GRAD))
    behind = index[INPUT_GRAD, np.minimum(stage + 1, last), microbatch]
    payload = np.select(
        [is_f & (stage > 0), is_i & (stage == last), is_i, is_w & program.in_halves],
        [
            index[FORWARD, stage - 1, microbatch],
            index[FORWARD, last, microbatch],  # the head makes the first cotangent
            behind + (program.in_halves[behind] & (behind >= 0)),
            index[INPUT_GRAD, stage, microbatch],
        ],
        -1,
    )
    own = np.select(
        [is_i, is_w], [index[FORWARD, stage, microbatch], index[INPUT_GRAD, stage, microbatch]], -1
    )
    return Dependencies(payload, own)


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
        needs: What its actions need.
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
    program: Program,
    tick_of: np.ndarray,
    sent_in: np.ndarray,
    *,
    stash_deferred: bool = True,
) -> dict[str, LiveRanges]:
    """Finds when the values of a timeline live, for each of `BUFFERS`.

    A payload lives from the tick after its producer, or after it was sent; if that is later, on its
    producer's rank until then. A residual lives from its F to its I (of a full backward in halves
    to its W), a weight residual from its F to its W, a stash from its I to its W. Unless
    `stash_deferred`, the values for a deferred W lie not in the stash but in `DEFERRED`.
    """
    units, needs = program.units, find_dependencies(program)

    def ranges(producer: np.ndarray, consumer: np.ndarray) -> LiveRanges:
        start, end = tick_of[producer], tick_of[consumer]
        return LiveRanges(units.rank[consumer], start, end, producer, consumer)

    reads, of_i, of_w = (
        np.flatnonzero(mask)
        for mask in (needs.payload >= 0, units.opcode == INPUT_GRAD, units.opcode == WEIGHT_GRAD)
    )
    made = needs.payload[reads]
    is_late = sent_in[made] > tick_of[made]
    waits, waits_for = made[is_late], reads[is_late]
    received = (
        np.concatenate([units.rank[reads], units.rank[waits]]),
        np.concatenate([sent_in[made], tick_of[waits]]) + 1,
        # In its tick the output is stored before it is sent: then its slot is still taken.
        np.concatenate([tick_of[reads], sent_in[waits] + 1]),
        np.concatenate([made, waits]),
        np.concatenate([reads, waits_for]),
    )
    live = {
        "received": LiveRanges(*received),
        "residual": ranges(needs.own[of_i], of_i + program.in_halves[of_i]),
        "weight_residual": ranges(needs.own[needs.own[of_w]], of_w),
    }
    # Actions of a rank are numbered in program order.
    is_deferred = needs.own[of_w] != of_w - 1
    if stash_deferred or not is_deferred.any():
        return {**live, "stash": ranges(needs.own[of_w], of_w)}
    now, later = of_w[~is_deferred], of_w[is_deferred]
    return {
        **live,
        "stash": ranges(needs.own[now], now),
        DEFERRED: ranges(needs.own[later], later),
    }


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
    """Joins a program and its ticks to a timeline, counting the slots that it takes.

    An action's value is sent in the tick in which it is made, unless `sent_in` says another one.
    """
    sent_in = tick_of if sent_in is None else sent_in
    num_ticks = int(tick_of.max()) + 1
    num_slots = {
        buffer: int(count_live(live, num_ticks=num_ticks, num_ranks=program.num_ranks).max())
        for buffer, live in find_live_ranges(program, tick_of, sent_in).items()
    }
    return Timeline(program, tick_of, sent_in, num_slots, timetable)
