"""Verifies `Tables.steady` by the tables alone: its beats run the actions of the tables' ticks."""

import numpy as np

from dualpipe_jax._schedule.actions import FORWARD, INPUT_GRAD, WEIGHT_GRAD
from dualpipe_jax._schedule.excerpt import fail_at
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT
from dualpipe_jax._schedule.tables import Pairs, Steady, Tables
from dualpipe_jax._schedule.verify.tokens import OF_W


def verify_steady(tables: Tables) -> None:
    """Checks the steady phase of verified tables, if there is one.

    - Its beats are a multiple of its period, all within the tables. In beat b every rank runs F for
      its chunk b modulo the period, then I and W of one microbatch for the chunk in `backward`,
      split and not deferred.
    - The values that the first beat reads, and those that were waiting when it began, are in their
      slots when the phase begins.
    - Every later x and cotangent was sent to that rank by the beat before, or by an earlier one if
      values wait on this rank, or given by the rank's own head in the beat before; a rank that is
      sent nothing needs nothing. No rank sends, or is sent, twice.
    - The values that are on their way or wait after the last beat are those that the tables store
      then, in the same slots, and nothing else of the phase is stored for later.
    - If a buffer is idle, a W has read every slot that an I wrote before the phase. (At its end
      this holds, too: the W's of the phase's own I's are in it.)

    Raises:
        ScheduleError: naming action, rank and tick, and showing the ticks around.
    """
    if tables.steady is None:
        return
    steady = tables.steady
    assert steady.num_beats > 0, "a steady phase has beats"
    assert steady.num_beats % steady.period == 0, "a steady phase has whole periods"
    inside = 0 <= steady.first_tick <= steady.ticks.stop <= tables.num_ticks
    assert inside, "a steady phase is in its tables"
    _check_actions(tables, steady)
    for buffer in steady.idle:
        _check_idle(tables, steady, buffer)
    _check_entry(tables, steady)
    for beat in range(1, steady.num_beats):
        _check_reads(tables, steady, beat)
    _check_exit(tables, steady)


def _check_actions(tables: Tables, steady: Steady) -> None:
    for beat in range(steady.num_beats):
        tick = steady.first_tick + TICKS_PER_BEAT * beat
        forward = beat % steady.period
        backward = steady.backward[forward]
        roles = ((FORWARD, forward), (INPUT_GRAD, backward), (WEIGHT_GRAD, backward))
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
    """Requires slots that are read as the phase begins to be filled before, not by its actions."""
    first = steady.first_tick
    for after, wait in ((0, steady.x_wait), (1, steady.cotangent_wait)):
        for beat in range(1 + wait.max()):
            tick = first + TICKS_PER_BEAT * beat + after
            slot = tables.read[tick]
            is_entry = (slot >= 0) & (beat <= wait)
            if after == 1 and beat > 0:
                _, from_head, _ = _made(tables, tick - after - TICKS_PER_BEAT)
                is_entry &= from_head < 0
            late = (tables.keep[first:tick] == slot).any(axis=0)
            for arrivals in (tables.from_left, tables.from_right):
                late |= (arrivals[first + 1 : tick + 1] == slot).any(axis=0)
            _fail_where(tables, tick, is_entry & late, "must find its value before the first beat")


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


def _arrivals(
    tables: Tables, steady: Steady, beat: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the values that a beat gives each rank: tokens, -1 for none.

    The x and the cotangent that are sent to it, and the cotangent of its head.
    """
    made_x, from_head, made_cotangent = _made(tables, steady.first_tick + TICKS_PER_BEAT * beat)
    x = _travel(steady.x_pairs[beat % steady.period], made_x)
    cotangent = _travel(steady.cotangent_pairs[beat % steady.period], made_cotangent)
    return x, cotangent, from_head


def _travel(pairs: Pairs, made: np.ndarray) -> np.ndarray:
    sources, targets = zip(*pairs, strict=True) if pairs else ((), ())
    assert len(set(sources)) == len(sources), "no rank sends twice"
    assert len(set(targets)) == len(targets), "no rank is sent two values"
    arrived = np.full_like(made, -1)
    arrived[list(targets)] = made[list(sources)]
    return arrived


def _check_reads(tables: Tables, steady: Steady, beat: int) -> None:
    """Requires a beat's reads to be those that are due then; `_check_entry` has those of before."""
    tick = steady.first_tick + TICKS_PER_BEAT * beat
    x, cotangent, is_known = _due(tables, steady, beat)
    stage = tables.stage[tick]
    wanted = np.where(stage == 0, -1, _token(tables, stage, tables.microbatch[tick]))
    _fail_where(
        tables, tick, is_known[0] & (wanted != x), "does not get its x from the beat before"
    )
    wanted = _token(tables, tables.stage[tick + 1], tables.microbatch[tick + 1])
    wrong = is_known[1] & (wanted != cotangent)
    _fail_where(tables, tick + 1, wrong, "does not get its cotangent from it")


def _due(tables: Tables, steady: Steady, beat: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds the x and the cotangent that each rank reads in a beat, or would after the last one.

    Returns:
        Their tokens, -1 for none, and bool[2, num_ranks]: whether the phase itself makes them.
    """
    waits = np.stack([steady.x_wait, steady.cotangent_wait])
    made_in = beat - 1 - waits
    due = np.full(waits.shape, -1)
    from_head = np.full(tables.num_ranks, -1)
    for before in range(max(0, int(made_in.min())), min(beat, steady.num_beats)):
        *sent, head = _arrivals(tables, steady, before)
        due = np.where(made_in == before, np.stack(sent), due)
        if before == beat - 1:
            from_head = head
    is_known = made_in >= 0
    is_known[1] |= from_head >= 0
    tick = min(steady.first_tick + TICKS_PER_BEAT * beat, tables.num_ticks) - 1
    twice = (due[1] >= 0) & (from_head >= 0)
    _fail_where(tables, tick, twice, "gets a cotangent from its head and from another rank")
    return due[0], np.where(from_head >= 0, from_head, due[1]), is_known


def _check_exit(tables: Tables, steady: Steady) -> None:
    last = steady.ticks.stop - TICKS_PER_BEAT
    for column in (tables.from_left, tables.from_right):
        if last + TICKS_PER_BEAT < tables.num_ticks:
            late = column[last + TICKS_PER_BEAT] >= 0
            _fail_where(tables, last + TICKS_PER_BEAT, late, "stores a value of a weight grad")
    _check_stores(tables, steady)
    num_due = len(steady.x_slot), len(steady.cotangent_slot)
    for after in range(max(num_due)):
        x, cotangent, _ = _due(tables, steady, steady.num_beats + after)
        for number, (slots, due) in enumerate(
            ((steady.x_slot, x), (steady.cotangent_slot, cotangent))
        ):
            if after >= num_due[number]:
                continue
            stored = _stored(tables, steady, number, due)
            wrong = slots[after] != stored
            _fail_where(
                tables, last, wrong, "leaves its last values in other slots than the tables"
            )


def _stored(tables: Tables, steady: Steady, number: int, due: np.ndarray) -> np.ndarray:
    """Finds the slots in which the tables store x's (0) or cotangents (1): -1 for none."""
    found = np.full(tables.num_ranks, -1)
    wait = (steady.x_wait, steady.cotangent_wait)[number].max()
    for before in range(max(0, steady.num_beats - 1 - wait), steady.num_beats):
        for column, token in _stores(tables, steady, before)[number]:
            found = np.where((column >= 0) & (token == due) & (due >= 0), column, found)
    return found


def _stores(
    tables: Tables, steady: Steady, beat: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[tuple[np.ndarray, np.ndarray]]]:
    """Lists the columns that store the x's and the cotangents of a beat, and their tokens."""
    tick = steady.first_tick + TICKS_PER_BEAT * beat
    made_x, from_head, made_cotangent = _made(tables, tick)
    has_head = from_head >= 0
    of_x = [(np.where(has_head, -1, tables.keep[tick]), made_x)]
    of_cotangent = [
        (np.where(has_head, tables.keep[tick], -1), from_head),
        (tables.keep[tick + 1], made_cotangent),
    ]
    for column, step in ((tables.from_left, 1), (tables.from_right, -1)):
        of_x.append((column[tick + 1], np.roll(made_x, step)))
        of_cotangent.append((column[tick + 2], np.roll(made_cotangent, step)))
    return of_x, of_cotangent


def _check_stores(tables: Tables, steady: Steady) -> None:
    """Requires every value that the last beats store to be one that is due after them."""
    last = steady.num_beats - 1
    for number, wait in enumerate((steady.x_wait, steady.cotangent_wait)):
        due = [
            _due(tables, steady, steady.num_beats + after)[number]
            for after in range(1 + wait.max())
        ]
        for column, token in _stores(tables, steady, last)[number]:
            wrong = (column >= 0) & (np.stack(due) != token).all(axis=0)
            _fail_where(
                tables,
                steady.ticks.stop - TICKS_PER_BEAT,
                wrong,
                "leaves another value than the tables store",
            )


def _fail_where(tables: Tables, tick: int, mask: np.ndarray, fault: str) -> None:
    if mask.any():
        fail_at(tables, tick, int(np.flatnonzero(mask)[0]), fault)
