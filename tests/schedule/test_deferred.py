"""Tables in which deferred weight grads recompute: two kinds of slot where there was the stash."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import INPUT_GRAD, WEIGHT_GRAD, Opcode
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import Action, Program
from dualpipe_jax._schedule.verify import verify_tables
from tests import table_interpreter
from tests.schedule.mutations import draw_changed
from tests.schedules_under_test import NAMES, compiled

SIZES = [(1, 3), (2, 4), (3, 2), (3, 7), (4, 8), (5, 11), (8, 16)]


@pytest.mark.parametrize("name", NAMES)
def test_tables_compute_loss_and_grads(name):
    for num_ranks, num_microbatches in SIZES:
        tables = compiled(name, num_ranks, num_microbatches, stash_deferred=False).tables
        table_interpreter.assert_computes_loss_and_grads(tables)


@pytest.mark.parametrize("name", NAMES)
def test_only_weight_grads_that_follow_their_input_grad_stash(name):
    for num_ranks, num_microbatches in SIZES:
        plain = compiled(name, num_ranks, num_microbatches)
        tables = compiled(name, num_ranks, num_microbatches, stash_deferred=False).tables
        assert tables.num_slots["stash"] <= 1
        num_slots = tables.num_slots.get("deferred", 0)
        assert num_slots <= plain.tables.num_slots["stash"]
        assert (tables.deferred >= 0).any() == (num_slots > 0)
        for rank in range(num_ranks):
            acts = [t for t in range(tables.num_ticks) if tables.opcode[t, rank]]
            for before, tick in itertools.pairwise(acts):
                if tables.opcode[tick, rank] in (WEIGHT_GRAD, Opcode.WEIGHT_GRAD_DEFERRED):
                    same = all(
                        getattr(tables, c)[tick, rank] == getattr(tables, c)[before, rank]
                        for c in ("stage", "microbatch")
                    )
                    follows = same and tables.opcode[before, rank] == INPUT_GRAD
                    assert (tables.stash[tick, rank] >= 0) == follows
        # The public timeline is unchanged.
        assert plain.timeline.num_slots == plain.tables.num_slots


def test_schedules_differ_in_the_weight_grads_that_they_defer():
    some = {name: compiled(name, 4, 8, stash_deferred=False).tables.num_slots for name in NAMES}
    assert {name for name in NAMES if "deferred" in some[name]} == {
        "dualpipe",
        "dualpipev",
        "v-half",
        "zb-h1",
        "interleaved-zb",
    }


cases = st.tuples(st.sampled_from(["dualpipe", "dualpipev", "zb-h1"]), st.integers(3, 5))


@given(cases, st.sampled_from(["stash", "deferred"]), st.data())
@settings(max_examples=150, deadline=None)
def test_any_changed_slot_is_caught(case, column, data):
    tables = compiled(*case, 8, stash_deferred=False).tables
    changed = draw_changed(data, tables, column)
    with pytest.raises(ScheduleError):
        verify_tables(changed)


def test_a_stash_in_use_where_another_weight_grad_recomputes_is_caught():
    """An executor ends stashes there, and makes them again empty."""
    order = ("F0", "F1", "I0", "I1", "W1", "W0")
    row = tuple(Action(kind, 0, int(microbatch)) for kind, microbatch in order)
    program = Program("own", num_ranks=1, num_stages=1, num_microbatches=2, rows=(row,))
    tables = compile_program(program, stash_deferred=False).tables
    swapped = np.array([0, 1, 4, 5, 2, 3], np.int32)[tables.opcode]
    wrong = dataclasses.replace(
        tables, opcode=swapped, stash=tables.deferred, deferred=tables.stash
    )
    message = "names a slot in deferred while stash slot 0 holds the value that chunk 0 saved"
    with pytest.raises(ScheduleError, match=message):
        verify_tables(wrong)
