"""The steady phase: its length, its rules, and an interpreter that runs it."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Opcode, letter_of
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT
from dualpipe_jax._schedule.tables import Steady, Tables
from dualpipe_jax._schedule.verify import verify_steady, verify_tables
from dualpipe_jax.schedules import Schedule
from tests.schedules_under_test import NAMES, PAIRED, RUN_SIZES, WIDE_GRID, compiled


def by_hand(each_way: int, near: int, far: int) -> Schedule:
    """As DualPipe on two ranks, but with so many forwards of either stage before the first pair."""
    rows = []
    for mine, other in ((0, each_way), (each_way, 0)):
        queues = {
            f"{stage}{kind}": [f"{stage}{kind}{first + m}" for m in range(each_way)]
            for stage, first in ((0, mine), (1, other))
            for kind in "FB"
        }
        row = [queues["0F"].pop(0) for _ in range(near)] + [queues["1F"].pop(0) for _ in range(far)]
        for forward, backward in itertools.cycle([("0F", "1B"), ("1F", "0B")]):
            if not any(queues.values()):
                break
            cells = [queues[name].pop(0) for name in (forward, backward) if queues[name]]
            row.append(f"({';'.join(cells)})OVERLAP_F_B" if len(cells) == 2 else "".join(cells))
        rows.append(",".join(cell for cell in row if cell))
    return Schedule.from_csv("\n".join(rows))


def tables_of(name: str, num_ranks: int, num_microbatches: int) -> Tables:
    tables = compiled(name, num_ranks, num_microbatches, "aligned").tables
    assert tables.steady is not None
    return tables


def run_with_steady(tables: Tables) -> Counter[str]:
    """Executes the ramps by the tables and the steady phase by the words of `Steady`, with tokens.

    A received slot holds ("x", s, m), read by F of stage s and microbatch m, or ("dx", s, m),
    read by its I; a residual's or a stash's holds (s, m).

    Returns:
      How often each action ran.
    """
    ranks, last, steady = range(tables.num_ranks), tables.num_stages - 1, tables.steady
    count: Counter[str] = Counter()
    received: list[dict[int, Any]] = [{} for _ in ranks]
    saved: list[dict[tuple[str, int], Any]] = [{} for _ in ranks]

    def cell(tick: int, rank: int) -> dict[str, int]:
        return {name: int(getattr(tables, name)[tick, rank]) for name in Tables.columns()}

    def did(opcode: int, stage: int, microbatch: int) -> None:
        count[f"{stage}{letter_of(opcode)}{microbatch}"] += 1

    def put(rank: int, buffer: str, slot: int, value: Any) -> None:
        assert slot >= 0, (buffer, rank)
        assert (buffer, slot) not in saved[rank], (buffer, rank, "still to be read")
        saved[rank][buffer, slot] = value

    def take(rank: int, buffer: str, slot: int, value: Any) -> None:
        assert saved[rank].pop((buffer, slot), None) == value, (buffer, rank)

    def forward(rank: int, row: dict[str, int], stage: int, x: Any) -> Any:
        m = row["microbatch"]
        assert stage == 0 or x == ("x", stage, m), (rank, x)
        did(FORWARD, stage, m)
        put(rank, "residual", row["residual"], (stage, m))
        put(rank, "weight_residual", row["weight_residual"], (stage, m))
        return ("dx", stage, m) if stage == last else ("x", stage + 1, m)

    def input_grad(rank: int, row: dict[str, int], stage: int, cotangent: Any) -> Any:
        m = row["microbatch"]
        assert cotangent == ("dx", stage, m), (rank, cotangent)
        did(INPUT_GRAD, stage, m)
        take(rank, "residual", row["residual"], (stage, m))
        put(rank, "stash", row["stash"], (stage, m))
        return ("dx", stage - 1, m) if stage else None

    def weight_grad(rank: int, row: dict[str, int], stage: int) -> None:
        m = row["microbatch"]
        did(WEIGHT_GRAD, stage, m)
        take(rank, "weight_residual", row["weight_residual"], (stage, m))
        take(rank, "stash", row["stash"], (stage, m))

    def arrive(tick: int, sent: list[Any]) -> None:
        for rank in ranks:
            for column, sender in (("from_left", rank - 1), ("from_right", rank + 1)):
                if (slot := cell(tick, rank)[column]) >= 0:
                    received[rank][slot] = sent[sender % tables.num_ranks]

    def run_tick(tick: int) -> list[Any]:
        sent: list[Any] = [None for _ in ranks]
        for rank in ranks:
            row = cell(tick, rank)
            if row["opcode"] == FORWARD:
                sent[rank] = forward(rank, row, row["stage"], received[rank].get(row["read"]))
            elif row["opcode"] == INPUT_GRAD:
                sent[rank] = input_grad(rank, row, row["stage"], received[rank].pop(row["read"]))
            elif row["opcode"] == WEIGHT_GRAD:
                weight_grad(rank, row, row["stage"])
            if row["keep"] >= 0:
                received[rank][row["keep"]] = sent[rank]
        return sent

    def run_beats(steady: Steady) -> None:
        first = steady.first_tick
        for rank in ranks:
            assert not [buffer for buffer, _ in saved[rank] if buffer in steady.idle], rank
        # For the next beats the values that each rank reads, and those that wait behind them.
        waits = steady.x_wait.tolist(), steady.cotangent_wait.tolist()
        xs, cotangents = (
            [
                [
                    received[r].get(cell(first + 3 * b + after, r)["read"])
                    for b in range(1 + wait[r])
                ]
                for r in ranks
            ]
            for after, wait in enumerate(waits)
        )
        for rank in ranks:
            for after, read in enumerate((xs, cotangents)):
                for beat, _ in enumerate(read[rank]):
                    received[rank].pop(cell(first + 3 * beat + after, rank)["read"], None)
        for beat in range(steady.num_beats):
            tick, number = first + TICKS_PER_BEAT * beat, beat % len(steady.backward)
            made, made_cotangent = [], []
            for rank in ranks:
                chunks = number, steady.backward[number]
                mine = [int(tables.stage_of[chunk, rank]) for chunk in chunks]
                f_row, i_row = cell(tick, rank), cell(tick + 1, rank)
                made.append(forward(rank, f_row, mine[0], xs[rank].pop(0)))
                made_cotangent.append(input_grad(rank, i_row, mine[1], cotangents[rank].pop(0)))
                weight_grad(rank, i_row, mine[1])
                xs[rank].append(None)
                cotangents[rank].append(None)
            for source, target in steady.x_pairs[number]:
                xs[target][-1] = made[source]
            for source, target in steady.cotangent_pairs[number]:
                cotangents[target][-1] = made_cotangent[source]
            for rank in ranks:
                if int(tables.stage_of[number, rank]) == last:
                    cotangents[rank][0] = made[rank]
        for slots, values in ((steady.x_slot, xs), (steady.cotangent_slot, cotangents)):
            for rank in ranks:
                for after, slot in enumerate(slots[:, rank].tolist()):
                    if slot >= 0:
                        received[rank][slot] = values[rank][after]
                assert not [buffer for buffer, _ in saved[rank] if buffer in steady.idle], rank

    tick, sent = 0, [None for _ in ranks]
    while tick < tables.num_ticks:
        arrive(tick, sent)
        if steady is not None and tick == steady.first_tick:
            run_beats(steady)
            tick, sent = steady.ticks.stop, [None for _ in ranks]
        else:
            tick, sent = tick + 1, run_tick(tick)
    assert not any(saved), "all slots end free"
    return count


def every_action_once(tables: Tables) -> Counter[str]:
    return Counter(
        f"{stage}{letter}{microbatch}"
        for letter in "FIW"
        for stage in range(tables.num_stages)
        for microbatch in range(tables.num_microbatches)
    )


# ---- which schedules have a steady phase, and how long it is


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_microbatches", "num_beats"),
    [
        ("dualpipe", 2, 8, 4),
        ("dualpipe", 4, 16, 10),
        ("dualpipe", 8, 32, 16),
        ("dualpipe", 8, 64, 48),
        ("dualpipe", 16, 128, 96),
        ("dualpipev", 1, 4, 4),
        ("dualpipev", 4, 16, 16),
        ("interleaved-paired", 2, 8, 8),
        ("interleaved-paired", 4, 16, 16),
        ("interleaved-paired", 8, 32, 32),
    ],
)
def test_length(name: str, num_ranks: int, num_microbatches: int, num_beats: int) -> None:
    steady = tables_of(name, num_ranks, num_microbatches).steady
    assert steady is not None
    assert steady.num_beats == num_beats


@pytest.mark.parametrize("name", NAMES)
def test_only_some_schedules_have_a_run(name: str) -> None:
    """Those with pairs, aligned; chimera's and the others' backwards are no part of pairs."""
    sizes = [(P, N) for n, P, N in WIDE_GRID if n == name][::7]
    runs = [compiled(name, P, N, "aligned").tables.steady for P, N in sizes]
    assert any(runs) == (name in PAIRED)
    assert all(compiled(name, P, N).tables.steady is None for P, N in sizes)


def pairs_of_cells(program: Any) -> set[tuple[str, str, str]]:
    """All pairs of a program as the cells of their three ticks."""
    pairs = set()
    for row in program.to_csv().splitlines():
        for cell in row.split(","):
            if cell.startswith("("):
                forward, backward = cell[1 : cell.index(")")].split(";")
                pairs.add((forward, *(backward.replace("B", letter) for letter in "IW")))
    return pairs


@pytest.mark.parametrize("name", PAIRED)
def test_a_run_is_pairs_in_roles_that_repeat(name: str) -> None:
    """Read off the cells of the timeline, by directions and stages instead of chunks."""
    num_runs = 0
    for _, P, N in [case for case in WIDE_GRID if case[0] == name][::3]:
        made = compiled(name, P, N, "aligned")
        steady = made.tables.steady
        if steady is None:
            continue
        num_runs += 1
        assert steady.num_beats % 2 == 0
        pairs, actions = pairs_of_cells(made.program), made.timeline.actions
        roles = []
        for beat in range(steady.num_beats):
            tick = steady.first_tick + TICKS_PER_BEAT * beat
            cells = list(zip(*actions[tick : tick + TICKS_PER_BEAT], strict=True))
            assert set(cells) <= pairs
            direction = made.timeline.direction[tick : tick + 2].tolist()
            stage = made.timeline.stage[tick : tick + 2].tolist()
            roles.append(
                [list(zip(*each, strict=True)) for each in zip(direction, stage, strict=True)]
            )
        for before, after in itertools.pairwise(roles):
            assert before == after[::-1]  # who ran forward runs backward, and the other way round
    assert num_runs > 5


@pytest.mark.parametrize("num_stages_per_rank", [2, 3, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_any_number_of_chunks(num_ranks: int, num_stages_per_rank: int) -> None:
    """Values wait at the end of a round as long as chunks and ranks demand it."""
    P, v, num_runs = num_ranks, num_stages_per_rank, 0
    for N in (1, 2 * P, 4 * P + 1, 6 * P):
        schedule = schedules.interleaved_paired(
            num_ranks=P, num_microbatches=N, num_stages_per_rank=v
        )
        tables = schedule.compiled(overlap=True).tables
        assert run_with_steady(tables) == every_action_once(tables)
        if tables.steady is None:
            continue
        num_runs += 1
        assert tables.steady.num_beats % v == 0
        wait = (1 - P) % v
        assert tables.steady.x_wait.tolist() == [wait] + [0] * (P - 1)
        assert tables.steady.cotangent_wait.tolist() == [0] * (P - 1) + [wait]
    assert num_runs >= 2


@pytest.mark.parametrize("name", PAIRED)
def test_ramps_and_run_do_every_action_once(name: str) -> None:
    num_runs = 0
    for _, P, N in [case for case in WIDE_GRID if case[0] == name][::2]:
        tables = compiled(name, P, N, "aligned").tables
        assert run_with_steady(tables) == every_action_once(tables)
        num_runs += tables.steady is not None
    assert num_runs > 10


def test_the_steady_phase_is_the_same_where_deferred_weight_grads_recompute() -> None:
    """A W in a pair follows its I at once: it has its stash, whatever the others do."""
    some_recompute = False
    for name, P, N in RUN_SIZES:
        program = compiled(name, P, N).program
        kept, recomputed = (
            compile_program(program, timetable="aligned", stash_deferred=stash).tables
            for stash in (True, False)
        )
        a, b = kept.steady, recomputed.steady
        assert a is not None
        assert b is not None
        assert (a.first_tick, a.num_beats, a.x_pairs) == (b.first_tick, b.num_beats, b.x_pairs)
        assert (recomputed.deferred[b.ticks] < 0).all()
        some_recompute |= bool((recomputed.deferred >= 0).any())
    assert some_recompute


def test_a_schedule_by_hand_has_a_steady_phase() -> None:
    tables = by_hand(5, near=2, far=2).compiled(overlap=True).tables
    assert tables.steady is not None
    assert run_with_steady(tables) == every_action_once(tables)


def test_schedules_of_many_orders() -> None:
    """With more or fewer on their way: a steady phase or none, the same actions."""
    num_runs = num_without = 0
    for each_way, near, far in itertools.product((4, 6), (1, 2, 3), (1, 2, 3)):
        try:
            tables = by_hand(each_way, near, far).compiled(overlap=True).tables
        except ScheduleError:  # they wait for each other
            continue
        assert run_with_steady(tables) == every_action_once(tables)
        num_runs += tables.steady is not None
        num_without += tables.steady is None
    assert num_runs > 3
    assert num_without > 0


# ---- faults that the verifier refuses


def change(tables: Tables, **fields: Any) -> Tables:
    """Replaces fields of the tables' `steady`."""
    assert tables.steady is not None
    return dataclasses.replace(tables, steady=dataclasses.replace(tables.steady, **fields))


def change_cell(tables: Tables, column: str, tick: int, rank: int, value: int) -> Tables:
    """Replaces an entry of a table."""
    table = getattr(tables, column).copy()
    table[tick, rank] = value
    return dataclasses.replace(tables, **{column: table})


def swap(pairs: Any) -> Any:
    """Has the first two pairs go to each other's targets."""
    (a, to_a), (b, to_b), *others = pairs
    return ((a, to_b), (b, to_a), *others)


TABLES = tables_of("dualpipe", 4, 16)
STEADY = TABLES.steady
assert STEADY is not None
FIRST, STOP = STEADY.ticks.start, STEADY.ticks.stop
LAST = STOP - TICKS_PER_BEAT
# Two beats: the values of the last one are read in the ramp only.
SHORT = tables_of("dualpipe", 4, 8)
assert SHORT.steady is not None
assert SHORT.steady.num_beats == 2


def exchange_weight_grads() -> Tables:
    """Exchanges the W's of two beats on one rank."""
    tables = TABLES
    a, b = FIRST + 2, FIRST + 2 + 2 * TICKS_PER_BEAT
    for column in ("microbatch", "weight_residual", "stash"):
        table = getattr(TABLES, column)
        tables = change_cell(tables, column, a, 1, table[b, 1])
        tables = change_cell(tables, column, b, 1, table[a, 1])
    return tables


def renumber_chunks() -> Tables:
    """Numbers the chunks of one rank the other way round: the same ticks, legal tables."""
    chunk, stage_of = TABLES.chunk.copy(), TABLES.stage_of.copy()
    acts = chunk[:, 2] >= 0
    chunk[acts, 2] ^= 1
    stage_of[:, 2] = stage_of[::-1, 2]
    tables = dataclasses.replace(TABLES, chunk=chunk, stage_of=stage_of)
    verify_tables(tables)
    return tables


def in_use(buffer: str) -> Tables:
    """Has an I of rank 1 write a slot before the steady phase that no W reads there."""
    tick = int(np.flatnonzero(TABLES.opcode[:FIRST, 1] == INPUT_GRAD)[-1])
    return change_cell(change(TABLES, idle=(buffer,)), buffer, tick, 1, 1)


def deferred_in_run() -> Tables:
    """Has an I of a beat keep its W's operands in a slot of the deferred kind: legal tables."""
    tables = dataclasses.replace(TABLES, num_slots={**TABLES.num_slots, "deferred": 1})
    opcodes = Opcode.INPUT_GRAD_DEFERRING, Opcode.WEIGHT_GRAD_DEFERRED
    for tick, opcode in zip((FIRST + 1, FIRST + 2), opcodes, strict=True):
        tables = change_cell(tables, "opcode", tick, 1, opcode)
        tables = change_cell(tables, "stash", tick, 1, -1)
        tables = change_cell(tables, "deferred", tick, 1, 0)
    verify_tables(tables)
    return tables


def late_cotangent(column: str, tick: int) -> Tables:
    return change_cell(TABLES, column, tick, 1, int(TABLES.read[FIRST + 1, 1]))


def with_slot(field: str, rank: int, slot: int) -> Tables:
    slots = getattr(STEADY, field).copy()
    assert slots[0, rank] != slot
    slots[0, rank] = slot
    return change(TABLES, **{field: slots})


even, odd = STEADY.x_pairs
SHORT_PAIRS = SHORT.steady.x_pairs[0]
FAULTS = {
    "no beats": (change(TABLES, num_beats=0), "a steady phase has beats"),
    "fewer than none": (change(TABLES, num_beats=-2), "a steady phase has beats"),
    "odd": (change(TABLES, num_beats=STEADY.num_beats - 1), "has whole periods"),
    "before all ticks": (change(TABLES, first_tick=-3), "a steady phase is in its tables"),
    "past all ticks": (change(TABLES, num_beats=40), "a steady phase is in its tables"),
    "a tick early": (change(TABLES, first_tick=FIRST - 1), "the action of all ranks"),
    "a tick late": (change(TABLES, first_tick=FIRST + 1), "the action of all ranks"),
    "a beat early": (change(TABLES, first_tick=FIRST - 3), "the action of all ranks"),
    "too long": (change(TABLES, num_beats=STEADY.num_beats + 2), "the action of all ranks"),
    "other chunks": (renumber_chunks(), "on rank 2 .*the action of all ranks"),
    "another W": (exchange_weight_grads(), "must follow the input grad of its microbatch"),
    "no stash": (deferred_in_run(), "the action of all ranks"),
    "kept late": (late_cotangent("keep", FIRST), "its value before the first beat"),
    "from the left late": (late_cotangent("from_left", FIRST + 1), "before the first beat"),
    "from the right late": (late_cotangent("from_right", FIRST + 1), "before the first beat"),
    "x to another": (change(TABLES, x_pairs=(swap(even), odd)), "does not get its x"),
    "no x": (change(TABLES, x_pairs=(even, odd[1:])), "does not get its x"),
    "cotangent to another": (
        change(TABLES, cotangent_pairs=(swap(even), odd)),
        "does not get its cotangent",
    ),
    "no cotangent": (change(TABLES, cotangent_pairs=(even[1:], odd)), "not get its cotangent"),
    "two cotangents": (
        change(TABLES, cotangent_pairs=(even, ((1, 0), (2, 1)))),
        "from its head and from another rank",
    ),
    "sent twice": (change(TABLES, x_pairs=((*even, (0, 2)), odd)), "no rank sends twice"),
    "sent two": (change(TABLES, x_pairs=(even, (*odd, (0, 1)))), "no rank is sent two values"),
    "x in another slot": (with_slot("x_slot", 1, 1), "in other slots than the tables"),
    "x nowhere": (with_slot("x_slot", 1, -1), "in other slots than the tables"),
    "x for nobody": (with_slot("x_slot", 0, 0), "in other slots than the tables"),
    "cotangent in another slot": (with_slot("cotangent_slot", 3, 0), "in other slots"),
    "cotangent nowhere": (with_slot("cotangent_slot", 0, -1), "in other slots"),
    "two x": (
        change_cell(TABLES, "from_right", LAST + 1, 1, 0)
        if TABLES.from_right[LAST + 1, 1] < 0
        else change_cell(TABLES, "from_left", LAST + 1, 1, 0),
        "leaves another value than the tables store",
    ),
    "from a weight grad": (
        change_cell(TABLES, "from_left", STOP, 1, 0),
        "a value of a weight grad",
    ),
    "another last x": (
        change(SHORT, x_pairs=(SHORT_PAIRS, ((1, 1), (2, 2)))),
        "leaves another value than the tables store",
    ),
    "a stash in use": (in_use("stash"), "on rank 1 .*has a slot of stash in use"),
    "deferred operands in use": (in_use("deferred"), "on rank 1 .*has a slot of deferred in use"),
    "another last cotangent": (
        change(SHORT, cotangent_pairs=(SHORT_PAIRS, ((1, 1), (2, 2)))),
        "leaves another value than the tables store",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_verifier_refuses(fault: str) -> None:
    """Each of its rules has a fault that it alone finds: by its own words."""
    tables, message = FAULTS[fault]
    with pytest.raises((ScheduleError, AssertionError), match=message):
        verify_steady(tables)


def test_a_fault_shows_the_ticks_around() -> None:
    with pytest.raises(ScheduleError) as error:
        verify_steady(FAULTS["no x"][0])
    lines = str(error.value).splitlines()
    # Beat 2 reads the values of beat 1: rank 2 has no x for its F.
    assert "on rank 2 in tick 14: does not get its x" in lines[0]
    assert any("[" in line for line in lines if line.startswith("  rank 2"))


@st.composite
def changed(draw) -> Tables:
    """Draws a steady phase with one entry of one field changed."""
    tables = tables_of(*draw(st.sampled_from(RUN_SIZES)))
    steady, ranks = tables.steady, st.integers(0, tables.num_ranks - 1)
    assert steady is not None
    fields = [field.name for field in dataclasses.fields(Steady)]
    name = draw(st.sampled_from(fields))
    if name == "first_tick":
        return change(tables, first_tick=draw(st.integers(0, tables.num_ticks)))
    if name == "num_beats":
        return change(tables, num_beats=draw(st.integers(-2, tables.num_ticks // 3)))
    if name in ("x_slot", "cotangent_slot"):
        slots = getattr(steady, name).copy()
        entry = draw(st.integers(0, len(slots) - 1)), draw(ranks)
        slots[entry] = draw(st.integers(-1, tables.num_slots["received"] - 1))
        return change(tables, **{name: slots})
    if name in ("x_wait", "cotangent_wait"):
        # No longer than the most: as many values wait.
        waits = getattr(steady, name).copy()
        waits[draw(ranks)] = draw(st.integers(0, int(waits.max())))
        return change(tables, **{name: waits})
    if name == "backward":
        roles = list(steady.backward)
        roles[draw(st.integers(0, len(roles) - 1))] = draw(st.integers(0, len(roles) - 1))
        return change(tables, backward=tuple(roles))
    if name == "idle":
        names = st.lists(st.sampled_from(["stash", "deferred"]), unique=True)
        return change(tables, idle=tuple(draw(names)))
    both = list(getattr(steady, name))
    parity = draw(st.integers(0, 1))
    pairs = dict(both[parity])
    source = draw(ranks)
    if draw(st.booleans()):
        pairs[source] = draw(ranks)  # another way, or one more
    else:
        pairs.pop(source, None)
    both[parity] = tuple(sorted(pairs.items()))
    return change(tables, **{name: tuple(both)})


@given(changed())
@settings(max_examples=400, deadline=None)
def test_accepted_tables_run_every_action_once(tables: Tables) -> None:
    """A change that alters the actions that run is refused; the others are harmless."""
    try:
        verify_steady(tables)
    except (ScheduleError, AssertionError):
        return
    assert run_with_steady(tables) == every_action_once(tables)


@given(st.sampled_from(RUN_SIZES), st.sampled_from(Tables.columns()), st.data())
@settings(max_examples=200, deadline=None)
def test_a_changed_entry_of_a_steady_phase_is_refused(case: Any, column: str, data: Any) -> None:
    tables = tables_of(*case)
    assert tables.steady is not None
    ticks = range(tables.num_ticks)[tables.steady.ticks]
    tick = data.draw(st.sampled_from(ticks))
    rank = data.draw(st.integers(0, tables.num_ranks - 1))
    old = int(getattr(tables, column)[tick, rank])
    value = data.draw(st.integers(-1, max(getattr(tables, column).max(), 1) + 1))
    if value == old:
        return
    with pytest.raises(ScheduleError):
        verify_tables(change_cell(tables, column, tick, rank, value))
