"""Each verifier accepts the outcome of its pass and refuses broken ones, saying where."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._schedule.verify import (
    verify_allocation,
    verify_program,
    verify_tables,
    verify_timeline,
)
from tests.schedule.mutations import draw_changed
from tests.schedules_under_test import NAMES, compiled

SLOT_COLUMNS = Tables.columns()[4:]


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        ("0F0,0B0\n1F0,1I0", r"must have exactly one F, one I and one W .*\n  1W0 \(no\)(?m:$)"),
        ("0F0,0B0,0F0\n1F0,1B0", r"exactly one F.*\n  0F0 \(2 times, on rank 0, 0\)(?m:$)"),
        ("0F0,0B0\n1F0,1B0,1W0", r"exactly one F.*\n  1W0 \(2 times, on rank 1, 1\)(?m:$)"),
        ("0F0,0B0,0F2,0B2", r"of each stage and microbatch, .*:\n  microbatch 1 has none$"),
        ("0F0,0B0,2F0,2B0", r"of each stage and microbatch, .*:\n  stage 1 has none$"),
        ("0F0,0F999999999999", r"\n  microbatch 8 has none\n  and 999999999990 more(?m:$)"),
        ("0F0,1B0\n1F0,0B0", r"0F0 is on rank 0 and 0I0 on rank 1\n  1F0 is on rank 1 and"),
        ("0F0,0B0\n1B0,1F0", r"must run F, then I, then W .*\n  1I0 is before 1F0 on rank 1(?m:$)"),
        ("0F0,0W0,0I0", r"\n  0W0 is before 0I0 on rank 0(?m:$)"),
        (
            "0F0,0B0\n3F0,3B0\n1F0,1B0\n2F0,2B0",
            r"ranks:\n  microbatch 0 goes from rank 0 \(stage 0\) to rank 2\n  .*to rank 1(?m:$)",
        ),
    ],
)
def test_illegal_programs(csv, message):
    with pytest.raises(ScheduleError, match=r"schedule 'mine'(?s:.*)" + message):
        verify_program(parse_program(csv, name="mine"))


def test_many_faults_are_counted():
    csv = ",".join(f"0F{m}" for m in range(0, 30, 2)) + ",0B0"
    with pytest.raises(ScheduleError, match=r"\n  and 6 more(?m:$)"):
        verify_program(parse_program(csv, name="mine"))


def test_program_and_sizes_must_agree():
    program = parse_program("0F0,0B0\n1F0,1B0", name="mine")
    with pytest.raises(ScheduleError, match="has 2 rows for 3 ranks"):
        verify_program(dataclasses.replace(program, num_ranks=3))
    with pytest.raises(ScheduleError, match=r"must name stages in 0..0 and(?s:.*)1F0 on rank 1"):
        verify_program(dataclasses.replace(program, num_stages=1))


def test_timeline_with_an_early_action():
    timeline = compiled("1f1b", 2, 2).timeline
    tick_of = timeline.tick_of.copy()
    units = timeline.program.units
    first = [units.name(i) for i in range(len(units))].index("1F0")
    tick_of[first] = 0
    with pytest.raises(ScheduleError) as error:
        verify_timeline(dataclasses.replace(timeline, tick_of=tick_of))
    assert str(error.value).splitlines()[0] == (
        "schedule '1f1b': 1F0 on rank 1 in tick 0 needs 0F0, which runs on rank 0 only in tick 0"
    )
    assert "\n  rank 1 [1F0]" in str(error.value)


def test_timeline_with_an_urgent_transfer_is_no_two_tick_one():
    timeline = compiled("1f1b", 2, 2).timeline
    message = (
        "0I0 on rank 0 in tick 3 needs 1I0, which runs on rank 1 only in tick 2, and whose value "
        "is there from tick 4 on"
    )
    with pytest.raises(ScheduleError, match=message):
        verify_timeline(dataclasses.replace(timeline, timetable="two-tick"))


@pytest.mark.parametrize(
    ("sent_in", "message"),
    [
        ({"0F1": 0}, "0F1 on rank 0 in tick 1 sends its value in tick 0, before it is made"),
        ({"0F0": 1}, "0F1 on rank 0 in tick 1 sends its value in tick 1, as 0F0 does"),
        ({"1I0": 3}, "0I0 on rank 0 .* only in tick 2, and whose value is there from tick 4 on"),
    ],
)
def test_timeline_with_a_value_sent_too_soon_or_too_late(sent_in, message):
    timeline = compiled("1f1b", 2, 2).timeline
    units, changed = timeline.program.units, timeline.sent_in.copy()
    names = [units.name(i) for i in range(len(units))]
    for name, tick in sent_in.items():
        changed[names.index(name)] = tick
    with pytest.raises(ScheduleError, match=message):
        verify_timeline(dataclasses.replace(timeline, sent_in=changed))


def test_timeline_with_two_actions_at_once():
    timeline = compiled("1f1b", 2, 2).timeline
    tick_of = timeline.tick_of.copy()
    tick_of[1] = tick_of[0]
    with pytest.raises(ScheduleError, match="0F1 on rank 0 in tick 0 must run after 0F0"):
        verify_timeline(dataclasses.replace(timeline, tick_of=tick_of))


def test_timeline_before_time():
    timeline = compiled("1f1b", 2, 2).timeline
    with pytest.raises(ScheduleError, match="0F0 on rank 0 has tick -1 < 0"):
        verify_timeline(dataclasses.replace(timeline, tick_of=timeline.tick_of - 1))


def test_allocation_with_an_overlap():
    result = compiled("1f1b", 2, 2)
    slot_of = result.allocation.slot_of | {"residual": np.zeros(4, np.int64)}
    allocation = dataclasses.replace(result.allocation, slot_of=slot_of)
    with pytest.raises(ScheduleError) as error:
        verify_allocation(result.timeline, allocation)
    assert str(error.value).splitlines()[0] == (
        "schedule '1f1b': residual slot 0 of rank 0 gets a value of 0F1 in tick 1, while that of "
        "0F0 lives until tick 3"
    )


def test_allocation_with_a_slot_too_many():
    result = compiled("1f1b", 2, 2)
    slots = result.allocation.slot_of["residual"]
    slot_of = result.allocation.slot_of | {"residual": slots + (slots == slots.max())}
    allocation = dataclasses.replace(result.allocation, slot_of=slot_of)
    with pytest.raises(ScheduleError, match="the 2 residual slots must be as many as live at once"):
        verify_allocation(result.timeline, allocation)


def _mutate(tables: Tables, **columns: Any) -> Tables:
    return dataclasses.replace(tables, **columns)


def test_tables_fault_shows_the_ticks_around():
    tables = compiled("1f1b", 2, 2).tables
    read = tables.read.copy()
    read[1, 1] = -1
    with pytest.raises(ScheduleError) as error:
        verify_tables(_mutate(tables, read=read))
    lines = str(error.value).splitlines()
    assert lines[0] == "tables: 1F0 on rank 1 in tick 1: needs a slot in read"
    assert [line.split() for line in lines[1:]] == [
        ["tick", "0", "1", "2", "3", "4", "5"],
        ["rank", "0", "0F0", "0F1", ".", "0I0", "0W0", "."],
        ["rank", "1", ".", "[1F0]", "1I0", "1W0", "1F1", "1I1"],
    ]


def test_tables_say_which_value_was_found():
    tables = compiled("dualpipe", 2, 4).tables
    swapped = tables.residual.copy()
    (tick,) = np.flatnonzero((tables.opcode[:, 0] == 2) & (tables.microbatch[:, 0] == 0))
    swapped[tick, 0] = 1 - swapped[tick, 0]
    with pytest.raises(
        ScheduleError, match=r"0I0 on rank 0 in .* expects the value that chunk 0 saved for stage 0"
    ):
        verify_tables(_mutate(tables, residual=swapped))


def test_a_lazy_arrival_is_not_there_in_the_next_tick():
    tables = compiled("1f1b", 2, 2).tables
    lazy = {"is_lazy": True, "exchange": tables.exchange[:, :0], "exchanges": ()}
    message = "1F0 on rank 1 in tick 1: expects the x of 1F0 in received slot 0 and finds nothing"
    with pytest.raises(ScheduleError, match=message):
        verify_tables(_mutate(tables, **lazy))


def test_lazy_tables_have_neither_exchanges_nor_beats():
    tables = compiled("dualpipe", 2, 8, "two-tick").tables
    steady = compiled("dualpipe", 2, 8, "aligned").tables.steady
    exchange = np.zeros((tables.num_ticks, 1), np.int32)
    one = {"exchange": exchange, "exchanges": ((((), ()),),)}
    for more in ({"steady": steady}, one):
        with pytest.raises(ScheduleError, match="lazy tables have exchanges, or a steady phase"):
            verify_tables(_mutate(tables, **more))


cases = st.tuples(
    st.sampled_from(NAMES),
    st.integers(1, 5),
    st.integers(1, 8),
    st.sampled_from(["shortest", "two-tick"]),
)


@given(cases, st.sampled_from(Tables.columns()), st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_entry_is_caught(case, column, data):
    tables = compiled(*case).tables
    changed = draw_changed(data, tables, column)
    with pytest.raises(ScheduleError):
        verify_tables(changed)


@given(cases, st.sampled_from(SLOT_COLUMNS), st.data())
@settings(max_examples=150, deadline=None)
def test_two_swapped_slots_are_caught(case, column, data):
    tables = compiled(*case).tables
    table = getattr(tables, column).copy()
    places = [st.sampled_from(np.argwhere(table == slot).tolist()) for slot in np.unique(table)]
    if len(places) < 2:
        return
    a, b = (tuple(data.draw(place)) for place in data.draw(st.permutations(places))[:2])
    table[a], table[b] = table[b], table[a]
    with pytest.raises(ScheduleError):
        verify_tables(_mutate(tables, **{column: table}))


@given(cases, st.data())
@settings(max_examples=150, deadline=None)
def test_a_dropped_action_is_caught(case, data):
    tables = compiled(*case).tables
    at = tuple(data.draw(st.sampled_from(np.argwhere(tables.opcode).tolist())))
    columns = {column: getattr(tables, column).copy() for column in Tables.columns()}
    for column, table in columns.items():
        table[at] = 0 if column == "opcode" else -1
    with pytest.raises(ScheduleError, match="must run exactly once"):
        verify_tables(_mutate(tables, **columns))


@given(cases, st.integers(-2, 2).filter(bool), st.data())
@settings(max_examples=150, deadline=None)
def test_a_rank_out_of_step_is_caught(case, shift, data):
    tables = compiled(*case).tables
    if tables.num_ranks == 1:
        return  # nobody to be out of step with
    rank = data.draw(st.integers(0, tables.num_ranks - 1))
    columns = {}
    for column in Tables.columns():
        idle = 0 if column == "opcode" else -1
        table = np.pad(getattr(tables, column), ((2, 2), (0, 0)), constant_values=idle)
        table[:, rank] = np.roll(table[:, rank], shift)
        columns[column] = table
    with pytest.raises(ScheduleError):
        verify_tables(_mutate(tables, **columns))
