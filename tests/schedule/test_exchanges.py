"""Exchanges: all that is stored was sent in a pair, nobody is in a pair for nothing, few sets."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import Opcode, letter_of
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.exchanges import add_exchanges
from dualpipe_jax._schedule.tables import MOST_SETS, Exchange, Tables
from dualpipe_jax._schedule.verify import verify_tables
from tests import table_interpreter
from tests.schedule.mutations import draw_changed
from tests.schedule.random_programs import programs
from tests.schedules_under_test import FORWARD_ONLY_GRID, NAMES, WIDE_GRID, compiled

PARTS = (1, 2, 4)
NO_LIMIT = 10**6

# (tick, to the right or to the left, source, target) of each value that travels in a permute.
Sent = set[tuple[int, int, int, int]]


def sent_by_program(made: Compiled) -> Sent:
    """Finds all that travels in ramps, by the program: knows no column of slots."""
    program, tables, last = made.program, made.tables, made.program.num_stages - 1
    tick_of = {}
    for tick, rank in np.argwhere(tables.opcode).tolist():
        cells = (tables.opcode, tables.stage, tables.microbatch)
        opcode, stage, microbatch = (int(cell[tick, rank]) for cell in cells)
        # An upper half makes no value that is sent; a lower one does.
        makes = letter_of(opcode) if opcode != Opcode.BACKWARD_UPPER else "none"
        tick_of[makes, stage, microbatch] = tick
    rank_of, sent = program.rank_of.tolist(), set()
    ticks = tables.steady.ticks if tables.steady is not None else slice(0)
    in_run = range(*ticks.indices(tables.num_ticks))
    for stage in range(last):
        for microbatch in range(program.num_microbatches):
            here, there = rank_of[stage][microbatch], rank_of[stage + 1][microbatch]
            ends = [(tick_of["F", stage, microbatch], here, there)]
            if not program.forward_only:
                makes = "I" if ("I", stage + 1, microbatch) in tick_of else "W"
                ends.append((tick_of[makes, stage + 1, microbatch], there, here))
            for tick, source, target in ends:
                if source != target and tick not in in_run:
                    # On a ring of two, a neighbour is to one side only.
                    is_right = target == source + 1 or (
                        source - target == program.num_ranks - 1 > 1
                    )
                    sent.add((tick, 0 if is_right else 1, source, target))
    return sent


def sent_by_tables(tables: Tables) -> Sent:
    """Lists all pairs of all exchanges."""
    return {
        (tick, side, source, target)
        for tick in range(tables.num_ticks)
        for part, number in enumerate(tables.exchange[tick].tolist())
        if number >= 0
        for side, pairs in enumerate(tables.exchanges[part][number])
        for source, target in pairs
    }


def sets_of(tables: Tables, side: int) -> list[frozenset[tuple[int, int]]]:
    """Lists the sets of pairs of the permutes to one side, over all parts."""
    sets = ({each[side] for each in of_part} - {()} for of_part in tables.exchanges)
    return [frozenset(pairs) for of_part in sets for pairs in of_part]


# ---- of every schedule and size


@pytest.mark.parametrize("name", [*NAMES, "forward-only"])
def test_pairs_are_those_whose_value_is_stored(name: str) -> None:
    for case in WIDE_GRID + FORWARD_ONLY_GRID:
        if case[0] != name:
            continue
        made = compiled(*case)
        needed = sent_by_program(made)
        for num_parts in PARTS:
            tables = add_exchanges(made.tables, num_parts=num_parts)
            assert needed <= sent_by_tables(tables), (case, num_parts)
            of_side = [sets_of(tables, side) for side in (0, 1)]
            assert max(map(len, of_side)) <= MOST_SETS, (case, num_parts)
            exact = add_exchanges(made.tables, num_parts=num_parts, most_sets=NO_LIMIT)
            assert needed == sent_by_tables(exact), (case, num_parts)
            # Where there are few sets in each part, to each side, none is merged; else some are.
            limit = MOST_SETS // len(exact.exchanges)
            is_few = all(
                len({each[side] for each in of_part} - {()}) <= limit
                for of_part in exact.exchanges
                for side in (0, 1)
            )
            assert (needed == sent_by_tables(tables)) == is_few, (case, num_parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("timetable", "full_backward"), [("aligned", False), ("aligned", True), ("shortest", True)]
)
def test_exchanges_around_steady_phases_and_full_backwards(
    name: str, timetable: str, full_backward: bool
) -> None:
    for size in ((1, 4), (2, 8), (3, 7), (4, 10), (5, 21), (8, 18)):
        made = compiled(name, *size, timetable, full_backward=full_backward)
        exact = add_exchanges(made.tables, num_parts=2, most_sets=NO_LIMIT)
        assert sent_by_program(made) == sent_by_tables(exact), size
        if exact.steady is not None:
            assert (exact.exchange[exact.steady.ticks] == -1).all()


@given(programs(), st.sampled_from(PARTS), st.integers(4, 12))
@settings(max_examples=100, deadline=None)
def test_random_programs_send_all_stored_values(program, num_parts, most_sets):
    made = compile_program(program)
    tables = add_exchanges(made.tables, num_parts=num_parts, most_sets=most_sets)
    assert sent_by_program(made) <= sent_by_tables(tables)
    verify_tables(tables)
    exact = add_exchanges(made.tables, num_parts=num_parts, most_sets=NO_LIMIT)
    assert sent_by_program(made) == sent_by_tables(exact)


@pytest.mark.parametrize("most_sets", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("name", "size"), [("interleaved-1f1b", (8, 16)), ("dualpipe", (8, 12)), ("zb-h1", (6, 13))]
)
def test_sets_become_the_smallest_kept_one(
    name: str, size: tuple[int, int], most_sets: int
) -> None:
    made = compiled(name, *size)
    exact = add_exchanges(made.tables, most_sets=NO_LIMIT)
    merged = add_exchanges(made.tables, most_sets=most_sets)
    table_interpreter.assert_computes_loss_and_grads(merged)
    for side in (0, 1):
        kept = sets_of(merged, side)
        assert 0 < len(kept) <= most_sets
        for tick in range(merged.num_ticks):
            needs, gets = (
                frozenset(each.exchanges[0][each.exchange[tick, 0]][side])
                for each in (exact, merged)
            )
            fitting = [len(pairs) for pairs in [frozenset(), *kept] if needs <= pairs]
            assert needs <= gets
            assert len(gets) == min(fitting)


@pytest.mark.parametrize(("most_sets", "num_false_waits"), [(1, 6), (2, 4), (3, 2), (4, 1), (5, 0)])
def test_kept_sets_have_the_fewest_false_waits_by_hand(
    most_sets: int, num_false_waits: int
) -> None:
    # GPipe on four ranks fills its three links one by one, uses all, and empties them one by one.
    # To the right, by left ends: 0, 01, 012, 012, 12, 2. Where all become 012, they have 2, 1, 0,
    # 0, 1 and 2 pairs too many. To keep 0 saves 2, and so does 2; then 01 saves 1, and so does 12.
    tables = compiled("gpipe", 4, 4).tables
    exact = add_exchanges(tables, most_sets=NO_LIMIT)
    merged = add_exchanges(tables, most_sets=most_sets)
    to_right = [
        {each for each in sent_by_tables(tables) if each[1] == 0} for tables in (exact, merged)
    ]
    assert len(to_right[0]) == 3 * 4
    assert len(to_right[1] - to_right[0]) == num_false_waits


@pytest.mark.parametrize("num_ranks", [8, 16, 32])
def test_sets_are_few_at_any_size(num_ranks: int) -> None:
    for name in ("interleaved-1f1b", "dualpipev"):
        tables = compiled(name, num_ranks, num_ranks).tables
        for num_parts in PARTS:
            cut = add_exchanges(tables, num_parts=num_parts)
            assert all(0 < len(sets_of(cut, side)) <= 12 for side in (0, 1)), (name, num_parts)


def test_parts_are_stretches_of_the_line() -> None:
    tables = add_exchanges(compiled("interleaved-1f1b", 8, 16).tables, num_parts=4)
    # Links by their left ends; 7 joins the last rank to the first.
    links: list[set[int]] = []
    for of_part in tables.exchanges:
        pairs = [pair for exchange in of_part for side in exchange for pair in side]
        links.append({7 if {*pair} == {0, 7} else min(pair) for pair in pairs})
    assert links == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    # Two ranks have one link, and one rank none.
    assert len(add_exchanges(compiled("1f1b", 2, 4).tables, num_parts=4).exchanges) == 1
    assert add_exchanges(compiled("1f1b", 1, 4).tables, num_parts=4).exchanges == ((((), ()),),)


# ---- faults that the verifier refuses


def with_pairs(tables: Tables, part: int, number: int, exchange: Exchange) -> Tables:
    """Replaces an exchange by another."""
    parts = [list(of_part) for of_part in tables.exchanges]
    parts[part][number] = exchange
    return dataclasses.replace(tables, exchanges=tuple(map(tuple, parts)))


def refuse(tables: Tables, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        verify_tables(tables)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_a_dropped_pair_is_caught(data: Any) -> None:
    name, num_parts = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(PARTS))
    tables = compiled(name, data.draw(st.integers(2, 5)), data.draw(st.integers(1, 8))).tables
    tables = add_exchanges(tables, num_parts=num_parts, most_sets=NO_LIMIT)
    part = data.draw(st.integers(0, len(tables.exchanges) - 1))
    number = data.draw(st.integers(1, len(tables.exchanges[part]) - 1))
    right, left = tables.exchanges[part][number]
    dropped = data.draw(st.sampled_from([*right, *left]))
    right, left = (tuple(pair for pair in side if pair != dropped) for side in (right, left))
    refuse(with_pairs(tables, part, number, (right, left)), "but nothing was sent")


def test_a_wrong_merge_is_caught() -> None:
    # Tick 1 of three ranks needs 0 -> 1 and 1 -> 2; tick 0 has 0 -> 1 alone.
    tables = compiled("1f1b", 3, 3).tables
    exchange = tables.exchange.copy()
    exchange[1] = exchange[0]
    refuse(
        dataclasses.replace(tables, exchange=exchange),
        r"2F0 on rank 2 in tick 2: from_left stores in received slot 0, but nothing was sent",
    )


@pytest.mark.parametrize("pair", [(0, 2), (1, 1), (3, 0), (3, 4), (-1, 0), (1, 0)])
def test_pairs_of_no_neighbours_are_caught(pair: tuple[int, int]) -> None:
    """To the right, on a line of four ranks."""
    tables = compiled("1f1b", 4, 4).tables
    right, left = tables.exchanges[0][1]
    refuse(
        with_pairs(tables, 0, 1, ((*right, pair), left)),
        f"exchanges pair {pair[0]} and {pair[1]}: no neighbours",
    )


def test_rings_have_one_pair_more() -> None:
    tables = compiled("interleaved-1f1b", 3, 4).tables
    assert tables.wraps
    right, left = tables.exchanges[0][1]
    for extra in ((2, 0), (0, 1), (1, 2)):
        verify_tables(with_pairs(tables, 0, 1, (tuple({*right, extra}), left)))
    refuse(with_pairs(tables, 0, 1, (right, (*left, (2, 0)))), "pair 2 and 0: no neighbours")


def test_a_pair_twice_is_caught() -> None:
    tables = add_exchanges(compiled("1f1b", 4, 6).tables, num_parts=2)
    right, left = tables.exchanges[1][1]
    pair = (0, 1)
    assert any(pair in each[0] for each in tables.exchanges[0])
    message = "a pair twice in a set, or in two parts"
    refuse(with_pairs(tables, 1, 1, ((*right, pair), left)), message)
    number = next(n for n, each in enumerate(tables.exchanges[0]) if pair in each[0])
    right, left = tables.exchanges[0][number]
    refuse(with_pairs(tables, 0, number, ((*right, pair), left)), message)


def test_too_many_sets_are_caught() -> None:
    made = compiled("interleaved-1f1b", 8, 16)
    for num_parts in (1, 2):
        exact = add_exchanges(made.tables, num_parts=num_parts, most_sets=NO_LIMIT)
        num_sets = max(len(sets_of(exact, side)) for side in (0, 1))
        assert num_sets > MOST_SETS
        refuse(exact, r"exchanges have \d+ distinct sets of pairs to one side, more than 12")
    verify_tables(add_exchanges(made.tables))


def test_numbers_and_shapes_of_exchanges_are_caught() -> None:
    tables = compiled("dualpipe", 4, 10, "aligned").tables
    steady, most = tables.steady, len(tables.exchanges[0]) - 1
    assert steady is not None

    def changed(tick: int, number: int) -> Tables:
        exchange = tables.exchange.copy()
        exchange[tick] = number
        return dataclasses.replace(tables, exchange=exchange)

    for tick in (steady.ticks.start, steady.ticks.stop - 1):
        refuse(changed(tick, 0), f"in tick {tick}: exchange 0 must be -1")
    for tick in (0, steady.ticks.start - 1, steady.ticks.stop, tables.num_ticks - 1):
        for number in (-1, most + 1):
            refuse(changed(tick, number), rf"exchange {number} must be in 0\.\.{most}")
    for exchange in (
        tables.exchange[:-1],
        tables.exchange[:, 0],
        np.repeat(tables.exchange, 2, axis=1),
        tables.exchange.astype(np.int64),
    ):
        refuse(dataclasses.replace(tables, exchange=exchange), "exchange is .*, not int32")
    nothing: Exchange = (), ()
    two_parts = dataclasses.replace(tables, exchanges=(*tables.exchanges, (nothing,)))
    refuse(two_parts, "exchange is .*, not int32")


def test_a_first_exchange_that_is_not_empty_is_caught() -> None:
    """Replay and executor pass over number 0, so that nothing would be sent in its ticks."""
    tables = compiled("1f1b", 4, 4).tables
    (one, two, *others), exchange = tables.exchanges[0], tables.exchange
    swapped = np.where(exchange < 2, 1 - exchange, exchange).astype(np.int32)
    wrong = dataclasses.replace(tables, exchanges=((two, one, *others),), exchange=swapped)
    refuse(wrong, "exchange")


cases = st.tuples(st.sampled_from(NAMES), st.integers(2, 5), st.integers(1, 8))


@given(cases, st.sampled_from(["shortest", "aligned"]), st.sampled_from(PARTS), st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_exchange_is_caught_or_has_more_pairs(case, timetable, num_parts, data):
    made = compiled(*case, timetable)
    tables = add_exchanges(made.tables, num_parts=num_parts)
    changed = draw_changed(data, tables, "exchange")
    try:
        verify_tables(changed)
    except ScheduleError:
        return
    assert sent_by_program(made) <= sent_by_tables(changed)
    table_interpreter.assert_computes_loss_and_grads(changed)
