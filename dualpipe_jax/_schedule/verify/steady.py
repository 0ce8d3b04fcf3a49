"""Verifies `Tables.steady` by the tables alone: its beats run the actions of the tables' ticks."""

import numpy as np

from dualpipe_jax._schedule.actions import FORWARD, INPUT_GRAD, WEIGHT_GRAD
from dualpipe_jax._schedule.excerpt import fail_at
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT
from dualpipe_jax._schedule.tables import Pairs, Steady, Tables
from dualpipe_jax._schedule.verify.interpreter import OF_W


def verify_steady(tables: Tables) -> None:
    """Checks the steady phase of verified tables, if there is one.

    - It has an even number of beats, all within the tables; in beat b every rank runs F of chunk
      b % 2, then I and W of the other chunk and of one microbatch, split and not deferred.
    - The values that the first beat reads are in their slots when the phase begins.
    - Every later x and cotangent was sent to that rank by the beat before, or given by the rank's
      own head; a rank that is sent nothing needs nothing. No rank sends, or is sent, twice.
    - The values that the last beat sends are those that the tables store then, in the same slots,
      and nothing else of the phase is stored for later.
    - If a buffer is idle, a W has read every slot that an I wrote before the phase. (At its end
      this holds, too: the W's of the phase's own I's are in it.)

    Raises:
        ScheduleError: naming action, rank and tick, and showing the ticks around.
    """
    if tables.steady is None:
        return
    steady = tables.steady
    assert steady.num_beats > 0, "a steady phase has beats"
    assert steady.num_beats % 2 == 0, "a steady phase has as many even beats as odd ones"
    inside = 0 <= steady.first_tick <= steady.ticks.stop <= tables.num_ticks
    assert inside, "a steady phase is in its tables"
    _check_actions(tables, steady)
    for buffer in steady.idle:
        _check_idle(tables, steady, buffer)
    _check_entry(tables, steady)
    for beat in range(1, steady.num_beats):
        _check_reads(tables, steady, beat, *_arrivals(tables, steady, beat - 1))
    _check_exit(tables, steady, *_arrivals(tables, steady, steady.num_beats - 1))


def _check_actions(tables: Tables, steady: Steady) -> None:
    for beat in range(steady.num_beats):
        tick = steady.first_tick + TICKS_PER_BEAT * beat
        roles = ((FORWARD, beat % 2), (INPUT_GRAD, 1 - beat % 2), (WEIGHT_GRAD, 1 - beat % 2))
        for after, (opcode, chunk) in enumerate(roles):
            wrong = tables.opcode[tick + after] != opcode
            wrong |= tables.chunk[tick + after] != chunk
            _fail_where(tables, tick + after, wrong, "is not the action of all ranks in this beat")
        same = tables.microbatch[tick + 1] == tables.microbatch[tick + 2]
        _fail_where(tables, tick + 2, ~same, "must follow the input grad of its microbatch")


def _check_idle(tables: Tables, steady: Steady, buffer: str) -> None:
    """Requires of each slot that a W names it last before the steady phase."""
    slots = getattr(tables, buffer)[: steady.first_tick]
    for rank in range(tables.num_ranks):
        ticks = np.flatnonzero(slots[:, rank] >= 0)
        last = dict(zip(slots[ticks, rank].tolist(), ticks.tolist(), strict=True))
        for tick in last.values():
            if tables.opcode[tick, rank] not in OF_W:
                fault = f"has a slot of {buffer} in use, which is idle in the steady phase"
                fail_at(tables, tick, rank, fault)


def _check_entry(tables: Tables, steady: Steady) -> None:
    """Requires the first I's slot to be filled before the first tick's action, not by it."""
    tick = steady.first_tick
    slot = tables.read[tick + 1]
    late = (tables.keep[tick] == slot) | (tables.from_left[tick + 1] == slot)
    late |= tables.from_right[tick + 1] == slot
    _fail_where(tables, tick + 1, late, "must find its cotangent before the first beat")


def _token(tables: Tables, stage: np.ndarray, microbatch: np.ndarray) -> np.ndarray:
    return stage.astype(np.int64) * tables.num_microbatches + microbatch


def _made(tables: Tables, tick: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names the values that ranks make in a beat: x, the head's cotangent, that of I.

    As tokens of the actions that read it; -1 for none.
    """
    stage, microbatch = tables.stage[tick], tables.microbatch[tick]
    is_last = stage == tables.num_stages - 1
    x = np.where(is_last, -1, _token(tables, stage + 1, microbatch))
    from_head = np.where(is_last, _token(tables, stage, microbatch), -1)
    stage, microbatch = tables.stage[tick + 1], tables.microbatch[tick + 1]
    return x, from_head, np.where(stage == 0, -1, _token(tables, stage - 1, microbatch))


def _arrivals(tables: Tables, steady: Steady, beat: int) -> tuple[np.ndarray, np.ndarray]:
    """Finds the x and cotangent of each rank after a beat, by the pairs: tokens, -1 for none."""
    tick = steady.first_tick + TICKS_PER_BEAT * beat
    made_x, from_head, made_cotangent = _made(tables, tick)
    x = _travel(steady.x_pairs[beat % 2], made_x)
    cotangent = _travel(steady.cotangent_pairs[beat % 2], made_cotangent)
    twice = (cotangent >= 0) & (from_head >= 0)
    _fail_where(tables, tick, twice, "gets a cotangent from its head and from another rank")
    return x, np.where(from_head >= 0, from_head, cotangent)


def _travel(pairs: Pairs, made: np.ndarray) -> np.ndarray:
    sources, targets = zip(*pairs, strict=True) if pairs else ((), ())
    assert len(set(sources)) == len(sources), "no rank sends twice"
    assert len(set(targets)) == len(targets), "no rank is sent two values"
    arrived = np.full_like(made, -1)
    arrived[list(targets)] = made[list(sources)]
    return arrived


def _check_reads(
    tables: Tables, steady: Steady, beat: int, x: np.ndarray, cotangent: np.ndarray
) -> None:
    tick = steady.first_tick + TICKS_PER_BEAT * beat
    stage = tables.stage[tick]
    wanted = np.where(stage == 0, -1, _token(tables, stage, tables.microbatch[tick]))
    _fail_where(tables, tick, wanted != x, "does not get its x from the beat before")
    wanted = _token(tables, tables.stage[tick + 1], tables.microbatch[tick + 1])
    _fail_where(tables, tick + 1, wanted != cotangent, "does not get its cotangent from it")


def _check_exit(tables: Tables, steady: Steady, x: np.ndarray, cotangent: np.ndarray) -> None:
    last = steady.ticks.stop - TICKS_PER_BEAT
    made_x, from_head, made_cotangent = _made(tables, last)
    has_head = from_head >= 0
    # Each column of the tables that may store values of the last beat, and which values.
    of_x = [(np.where(has_head, -1, tables.keep[last]), made_x)]
    of_cotangent = [
        (np.where(has_head, tables.keep[last], -1), from_head),
        (tables.keep[last + 1], made_cotangent),
    ]
    for column, step in ((tables.from_left, 1), (tables.from_right, -1)):
        of_x.append((column[last + 1], np.roll(made_x, step)))
        of_cotangent.append((column[last + 2], np.roll(made_cotangent, step)))
        if last + TICKS_PER_BEAT < tables.num_ticks:
            late = column[last + TICKS_PER_BEAT] >= 0
            _fail_where(tables, last + TICKS_PER_BEAT, late, "stores a value of a weight grad")
    for slots, stored, arrived in (
        (steady.x_slot, of_x, x),
        (steady.cotangent_slot, of_cotangent, cotangent),
    ):
        named = np.stack([column for column, _ in stored])
        _fail_where(tables, last, (named >= 0).sum(axis=0) > 1, "stores two values for later")
        wrong = slots != named.max(axis=0)
        _fail_where(tables, last, wrong, "leaves its last values in other slots than the tables")
        for column, token in stored:
            wrong = (column >= 0) & (token != arrived)
            _fail_where(tables, last, wrong, "leaves another value than the tables store")


def _fail_where(tables: Tables, tick: int, mask: np.ndarray, fault: str) -> None:
    if mask.any():
        fail_at(tables, tick, int(np.flatnonzero(mask)[0]), fault)
