"""Aligned timelines: their published figures and rules, and the contracts of the timetable."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import FORWARD
from dualpipe_jax._schedule.align import align
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.dependencies import find_dependencies
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.ir import Pair, Program, Timeline
from dualpipe_jax._schedule.place import place_shortest
from dualpipe_jax._schedule.verify import verify_pairs, verify_timeline
from dualpipe_jax.schedules import Schedule
from tests import table_interpreter
from tests.schedule.random_programs import programs
from tests.schedules_under_test import NAMES, WIDE_GRID, compiled


def aligned(name: str, num_ranks: int, num_microbatches: int) -> Timeline:
    """Aligns a timeline, and leaves the ticks that this costs."""
    timeline = align(compiled(name, num_ranks, num_microbatches).timeline)
    verify_timeline(timeline)
    verify_pairs(timeline)
    return timeline


RANKS = sorted({P for _, P, _ in WIDE_GRID})


def count_beats(timeline: Timeline) -> int:
    """Counts the beats cell by cell: F, I, W of a pair in three adjacent ticks of every rank."""
    rows = list(zip(*timeline.actions, strict=True))
    pairs = [
        {
            tuple(str(action) for action in cell.unit_actions())
            for cell in row
            if isinstance(cell, Pair)
        }
        for row in timeline.program.rows
    ]
    return sum(
        all(row[tick : tick + 3] in of_rank for row, of_rank in zip(rows, pairs, strict=True))
        for tick in range(timeline.num_ticks)
    )


@pytest.mark.parametrize(
    ("num_ranks", "num_microbatches", "num_beats"),
    [(4, 16, 10), (8, 32, 18), (8, 64, 50), (16, 128, 97)],
)
def test_dualpipe_has_beats(num_ranks: int, num_microbatches: int, num_beats: int) -> None:
    timeline = aligned("dualpipe", num_ranks, num_microbatches)
    assert count_beats(timeline) == len(timeline.beats) == num_beats


@pytest.mark.parametrize("num_ranks", [*range(2, 17, 2), 24, 32])
def test_dualpipe_takes_the_published_time(num_ranks: int) -> None:
    for num_microbatches in (2 * num_ranks, 2 * num_ranks + 2, 3 * num_ranks, 5 * num_ranks):
        timeline = aligned("dualpipe", num_ranks, num_microbatches)
        # A bubble of (P/2 - 1)(F&B + B - 3W), which is P - 2 at F = I = W = 1.
        assert timeline.num_ticks == 3 * num_microbatches + num_ranks - 2
        assert count_beats(timeline) == len(timeline.beats) > 0
        # No more is live than in the shortest timetable: the order of each rank is the same.
        assert timeline.num_slots["residual"] <= num_ranks + 1
        assert timeline.num_slots["weight_residual"] <= num_ranks + 1


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", NAMES)
def test_aligned_tables_compute_loss_and_grads(name: str, num_ranks: int) -> None:
    cases = [case for case in WIDE_GRID if case[:2] == (name, num_ranks)]
    # Some sizes of the others will do: most have no pairs, and are not changed.
    for case in cases if name in ("dualpipe", "dualpipev") else cases[::5]:
        result = compiled(*case, "aligned")  # passes all verifiers, or raises
        shortest = compiled(*case)
        assert result.timeline.timetable == "aligned"
        assert (result.timeline.tick_of >= shortest.timeline.tick_of).all(), case
        if (result.program.units.pair < 0).all():
            np.testing.assert_array_equal(result.timeline.tick_of, shortest.timeline.tick_of)
            continue
        tables = result.tables
        model = table_interpreter.random_model(tables.num_stages, tables.num_microbatches)
        loss, grads = table_interpreter.run(tables, *model)
        expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
        # The order of summation differs; float64 keeps 1e-12 with room to spare.
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12, err_msg=str(case))
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12, err_msg=str(case))


def follow_constraints(program: Program, phase: int) -> np.ndarray | None:
    """Raises ticks from 0 until all hold: order, needs, pairs. None if they rise for ever."""
    units, needs = program.units, find_dependencies(program)
    tick_of = [0] * len(units)
    # Every action after the last, each two ticks late for its phase, is the worst that can be.
    worst = 3 * len(units) + 3
    while True:
        before = list(tick_of)
        for i in range(len(units)):
            if i and units.rank[i] == units.rank[i - 1]:
                tick_of[i] = max(tick_of[i], tick_of[i - 1] + 1)
            for producer in (int(needs.payload[i]), int(needs.own[i])):
                if producer >= 0:
                    tick_of[i] = max(tick_of[i], tick_of[producer] + 1)
            if units.pair[i] >= 0:
                first = i
                while first and units.pair[first - 1] == units.pair[i]:
                    first -= 1
                start = tick_of[i] - (i - first)
                tick_of[first] = max(tick_of[first], start + (phase - start) % 3)
                tick_of[i] = max(tick_of[i], tick_of[first] + i - first)
        if max(tick_of) > worst:
            return None
        if tick_of == before:
            return np.array(tick_of)


@st.composite
def programs_with_pairs(draw) -> Program:
    """Draws a program and joins some of its Fs and Is, or Bs, that follow each other."""
    program = draw(programs().filter(lambda program: not program.forward_only))
    rows = []
    for row in program.rows:
        cells, waiting = [], list(row)
        while waiting:
            cell = waiting.pop(0)
            after = waiting[0] if waiting else None
            if cell.kind == "F" and after and after.kind == "I" and draw(st.booleans()):
                backward = waiting.pop(0)
                if waiting and waiting[0] == backward._replace(kind="W"):
                    waiting.pop(0)
                    backward = backward._replace(kind="B")
                cells.append(Pair(cell, backward))
            else:
                cells.append(cell)
        rows.append(tuple(cells))
    return dataclasses.replace(program, rows=tuple(rows))


@given(programs_with_pairs())
@settings(max_examples=200, deadline=None)
def test_no_action_could_come_earlier(program: Program) -> None:
    expected = [follow_constraints(program, phase) for phase in range(3)]
    found = [ticks for ticks in expected if ticks is not None]
    if not found:
        with pytest.raises(ScheduleError, match=r"cannot be aligned(?s:.*)\n  tick  "):
            compile_program(program, timetable="aligned")
        return
    compile_program(program, timetable="aligned")  # passes all verifiers
    timeline = align(place_shortest(program))
    assert timeline.num_ticks == min(ticks.max() for ticks in found) + 1
    assert any((timeline.tick_of == ticks).all() for ticks in found)
    assert count_beats(timeline) == len(timeline.beats)


def test_a_pair_that_waits_for_itself_is_refused() -> None:
    # 0I0 awaits 1I0, which needs the 0F1 of its own pair to have come back from rank 1.
    schedule = Schedule.from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1F1,1B0,1B1", name="mine")
    assert schedule.timeline().num_ticks == 8
    with pytest.raises(ScheduleError) as error:
        schedule.timeline(overlap=True)
    assert str(error.value).splitlines() == [
        (
            "schedule 'mine' cannot be aligned at 0F1 on rank 0 in tick 1: nothing may come "
            "between the F and the I of a pair, and so these ranks wait for each other; write a "
            "pair of them as F and B:"
        ),
        "  rank 0: 0F1, paired with 0I0, waits for 1I0 of rank 1",
        "  rank 1: 1F1 waits for 0F1 of rank 0",
        "  tick     0    1",
        "  rank 0  0F0 [0F1]",
        "  rank 1   .   1F0",
    ]


@pytest.mark.parametrize(
    ("late", "message"),
    [
        (0, r"1F1 on rank 1 in tick 5 must start its pair at the same tick modulo 3 as 1F3"),
        (1, r"0I0 on rank 0 in tick 7 must run right after 1F3, the two being of one pair"),
    ],
)
def test_a_timeline_out_of_step_is_refused(late: int, message: str) -> None:
    """Delays the rest of rank 0, from its pair's F or from its I on."""
    timeline = aligned("dualpipe", 2, 4)
    units = timeline.program.units
    start = next(i for i in range(len(units)) if units.pair[i] >= 0 and units.opcode[i] == FORWARD)
    tick_of = timeline.tick_of.copy()
    tick_of[start + late : units.row_start[1]] += 1
    delayed = dataclasses.replace(timeline, tick_of=tick_of, sent_in=tick_of)
    with pytest.raises(ScheduleError, match=message):
        verify_pairs(delayed)
    verify_timeline(delayed)


def test_unknown_timetable_names_the_known() -> None:
    schedule = schedules.dualpipe(num_ranks=2, num_microbatches=4)
    with pytest.raises(ValueError, match="overlap='long': must be True, False, 'two-tick'"):
        schedule.timeline(overlap="long")  # pyrefly: ignore[bad-argument-type]


def test_each_timetable_is_compiled_once() -> None:
    schedule = schedules.dualpipe(num_ranks=4, num_microbatches=8)
    aligned = schedule.compiled(overlap=True)
    assert schedule.compiled(overlap=True) is aligned
    assert schedule.compiled(overlap=False) is schedule.compiled() is not aligned


def test_large_schedule_is_aligned_in_seconds() -> None:
    start = time.process_time()
    program = GENERATORS["dualpipe"](num_ranks=64, num_microbatches=1024)
    timeline = compile_program(program, timetable="aligned").timeline
    assert timeline.num_ticks == 3 * 1024 + 64 // 2 - 1
    assert time.process_time() - start < 8  # of this process: other load does not count
