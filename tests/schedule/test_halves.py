"""Tables in which an I and the W that directly follows it are the halves of a full backward."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import INPUT_GRAD, WEIGHT_GRAD, Opcode, unit_of
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import TIMETABLES
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._schedule.verify import verify_tables
from tests.schedule.mutations import draw_changed
from tests.schedule.random_programs import programs
from tests.schedules_under_test import NAMES, RUN_SIZES, compiled
from tests.table_interpreter import assert_computes_loss_and_grads

SIZES = [(1, 3), (2, 4), (2, 8), (3, 2), (3, 7), (4, 8), (4, 16), (5, 11), (8, 16), (8, 24)]


@pytest.mark.parametrize("timetable", TIMETABLES)
@pytest.mark.parametrize("stash_deferred", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_tables_compute_loss_and_grads(name: str, stash_deferred: bool, timetable: str) -> None:
    for size in SIZES:
        options = {"stash_deferred": stash_deferred, "full_backward": True}
        assert_computes_loss_and_grads(compiled(name, *size, timetable, **options).tables)


@given(programs().filter(lambda program: not program.forward_only), st.booleans())
@settings(max_examples=150, deadline=None)
def test_random_programs_compute_the_gradients(program, stash_deferred):
    options = {"stash_deferred": stash_deferred, "full_backward": True}
    assert_computes_loss_and_grads(compile_program(program, **options).tables)


@pytest.mark.parametrize("timetable", TIMETABLES)
@pytest.mark.parametrize("name", NAMES)
def test_a_directly_following_weight_grad_is_half_of_a_full_backward(
    name: str, timetable: str
) -> None:
    """Except in the steady phase, and in the pairs before it."""
    for size in SIZES:
        tables = compiled(name, *size, timetable, full_backward=True).tables
        assert Opcode.BACKWARD_UPPER in tables.opcodes
        for rank in range(tables.num_ranks):
            acts = np.flatnonzero(tables.opcode[:, rank])
            of = {c: getattr(tables, c)[acts, rank] for c in Tables.columns()}
            unit = unit_of(of["opcode"])
            follows = (unit[:-1] == INPUT_GRAD) & (unit[1:] == WEIGHT_GRAD)
            for column in ("stage", "microbatch"):
                follows &= of[column][:-1] == of[column][1:]
            is_half = of["opcode"][:-1] == Opcode.BACKWARD_UPPER
            assert (is_half == (of["opcode"][1:] == Opcode.BACKWARD_LOWER)).all()
            assert not (is_half & ~follows).any()
            if tables.steady is None:
                assert (is_half == follows).all()
            else:
                ticks = acts[:-1]
                in_run = (ticks >= tables.steady.ticks.start) & (ticks < tables.steady.ticks.stop)
                assert not is_half[in_run].any()
                assert is_half[follows & (ticks >= tables.steady.ticks.stop)].all()


@pytest.mark.parametrize(("name", "num_ranks", "num_microbatches"), RUN_SIZES)
def test_the_run_of_beats_is_the_same(name: str, num_ranks: int, num_microbatches: int) -> None:
    size = name, num_ranks, num_microbatches
    split, full = (compiled(*size, "aligned", full_backward=on).tables for on in (False, True))
    assert split.steady is not None
    assert full.steady is not None
    assert full.steady.num_beats == split.steady.num_beats
    assert full.steady.x_pairs == split.steady.x_pairs
    assert full.steady.cotangent_pairs == split.steady.cotangent_pairs


@pytest.mark.parametrize("timetable", TIMETABLES)
@pytest.mark.parametrize("name", NAMES)
def test_some_stages_have_no_halves(name: str, timetable: str) -> None:
    for size in ((3, 7), (4, 16)):
        program = compiled(name, *size).program
        some = compiled(name, *size, timetable, full_backward=True).tables
        options = {"timetable": timetable, "stash_deferred": False, "full_backward": True}
        last = some.num_stages - 1
        tables = compile_program(program, **options, whole_stages=frozenset({1, last})).tables
        assert_computes_loss_and_grads(tables)
        found, before = (
            set(each.stage[each.opcode == Opcode.BACKWARD_UPPER].tolist())
            for each in (tables, some)
        )
        assert found == before - {1, last}
        every = frozenset(range(some.num_stages))
        none = compile_program(program, **options, whole_stages=every).tables
        assert Opcode.BACKWARD_UPPER not in none.opcodes
        assert Opcode.BACKWARD in none.opcodes
        assert none.num_ticks == compiled(name, *size, timetable).tables.num_ticks


def test_1f1b_with_full_backwards_is_that_of_the_paper() -> None:
    """Narayanan et al. 2021, section 2.2: N + P - 1 forwards and backwards (F = 1, B = 2)."""
    for P in range(2, 9):
        for N in (P, 2 * P, 4 * P):
            tables = compiled("1f1b", P, N, full_backward=True).tables
            assert tables.num_ticks == 3 * (N + P - 1)


@pytest.mark.parametrize("timetable", TIMETABLES)
@pytest.mark.parametrize("name", NAMES)
def test_halves_take_no_residual_longer(name: str, timetable: str) -> None:
    """Between the two nothing runs; received values take a slot or two more at most."""
    for size in SIZES:
        split, full = (
            compiled(name, *size, timetable, full_backward=on).tables.num_slots
            for on in (False, True)
        )
        for buffer in ("residual", "weight_residual", "stash"):
            assert full[buffer] <= split[buffer], (size, buffer)
        assert full["received"] <= split["received"] + 2, size


cases = st.tuples(
    st.sampled_from(NAMES), st.integers(1, 5), st.integers(1, 8), st.sampled_from(TIMETABLES)
)


@given(cases, st.sampled_from(Tables.columns()), st.data())
@settings(max_examples=300, deadline=None)
def test_any_changed_entry_is_caught(case, column, data):
    tables = compiled(*case, full_backward=True).tables
    changed = draw_changed(data, tables, column)
    with pytest.raises(ScheduleError):
        verify_tables(changed)


def test_a_lost_cotangent_is_named() -> None:
    tables = compiled("1f1b", 2, 2, full_backward=True).tables
    is_lower = tables.opcode[:, 0] == Opcode.BACKWARD_LOWER
    (tick,) = np.flatnonzero(is_lower & (tables.microbatch[:, 0] == 0))
    read = tables.read.copy()
    read[tick, 0] = -1
    with pytest.raises(ScheduleError, match=r"0W0 on rank 0 in tick .*: needs a slot in read"):
        verify_tables(dataclasses.replace(tables, read=read))
    keep = tables.keep.copy()
    keep[tick - 1, 0] = -1
    with pytest.raises(ScheduleError, match=r"0I0 on rank 0 in .*: must keep the cotangent that"):
        verify_tables(dataclasses.replace(tables, keep=keep))


def test_the_public_timeline_has_split_backwards() -> None:
    made = schedules.make("1f1b", num_ranks=4, num_microbatches=8)
    ticks = made.timeline().num_ticks
    compile_program(made.program, full_backward=True)
    assert made.timeline().num_ticks == ticks == made.compiled().tables.num_ticks
    assert made.compiled().tables.opcodes == {0, 1, 2, 3}
