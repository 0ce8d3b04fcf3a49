"""The contracts of every schedule of every size, through all passes."""

import time

import numpy as np
import pytest

from dualpipe_jax._schedule.actions import BUFFERS
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.dependencies import count_live, find_dependencies
from dualpipe_jax._schedule.generators import GENERATORS
from tests import table_interpreter
from tests.schedules_under_test import FORWARD_ONLY_GRID, NAMES, WIDE_GRID, compiled

RANKS = sorted({P for _, P, _ in WIDE_GRID})


# A case for each name and number of ranks; a thousand by themselves would be mostly overhead.
@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("name", [*NAMES, "forward-only"])
def test_tables_compute_loss_and_grads(name, num_ranks):
    for case in WIDE_GRID + FORWARD_ONLY_GRID:
        if case[:2] != (name, num_ranks):
            continue
        tables = compiled(*case).tables  # passes all verifiers, or raises
        model = table_interpreter.random_model(tables.num_stages, tables.num_microbatches)
        loss, grads = table_interpreter.run(tables, *model)
        expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
        # The order of summation differs; float64 keeps 1e-12 with room to spare.
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12, err_msg=str(case))
        if name == "forward-only":
            expected_grads = np.zeros_like(grads)
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12, err_msg=str(case))


@pytest.mark.parametrize("name", [*NAMES, "forward-only"])
def test_two_tick_tables_compute_loss_and_grads(name):
    for num_ranks, num_microbatches in ((1, 3), (2, 5), (3, 2), (4, 9), (5, 11), (8, 20)):
        tables = compiled(name, num_ranks, num_microbatches, "two-tick").tables
        assert tables.is_lazy
        assert tables.steady is None
        model = table_interpreter.random_model(tables.num_stages, tables.num_microbatches)
        loss, grads = table_interpreter.run(tables, *model)
        expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
        # As above.
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
        if name != "forward-only":
            np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_two_ticks_lie_between_ranks_and_no_more_than_need_be(name):
    """An action that is not in its first tick waits for its rank, or for a value that it reads."""
    for num_ranks, num_microbatches in ((2, 5), (4, 9), (5, 11)):
        timeline = compiled(name, num_ranks, num_microbatches, "two-tick").timeline
        units, tick_of = timeline.program.units, timeline.tick_of
        needs = find_dependencies(timeline.program)
        for action, tick in enumerate(tick_of.tolist()):
            before, payload = action - 1, needs.payload[action]
            soonest = [0]
            if before >= 0 and units.rank[before] == units.rank[action]:
                soonest.append(tick_of[before] + 1)
            if payload >= 0:
                lag = 1 if units.rank[payload] == units.rank[action] else 2
                soonest.append(tick_of[payload] + lag)
            assert tick == max(soonest), units.name(action)


@pytest.mark.parametrize("name", NAMES)
def test_slots_are_the_peak_of_live_values(name):
    for case in WIDE_GRID:
        if case[0] != name:
            continue
        result = compiled(*case)
        for buffer in BUFFERS:
            live = result.allocation.live_ranges[buffer]
            sizes = {"num_ticks": result.timeline.num_ticks, "num_ranks": result.program.num_ranks}
            peak = int(count_live(live, **sizes).max())
            assert result.tables.num_slots[buffer] == peak == result.timeline.num_slots[buffer]


def test_forward_only_keeps_nothing():
    for case in FORWARD_ONLY_GRID:
        tables = compiled(*case).tables
        assert tables.num_slots["residual"] == tables.num_slots["stash"] == 0
        # Both ends fill, both ends drain: never worse than one direction alone.
        assert tables.num_ticks <= tables.num_microbatches + tables.num_ranks - 1


def test_a_program_is_compiled_once():
    make = GENERATORS["dualpipe"]
    first = compile_program(make(num_ranks=4, num_microbatches=8))
    assert compile_program(make(num_ranks=4, num_microbatches=8)) is first


def test_large_schedule_compiles_in_seconds():
    start = time.process_time()
    program = GENERATORS["dualpipe"](num_ranks=64, num_microbatches=1024)
    timeline = compile_program(program).timeline
    assert timeline.num_ticks == 3 * 1024 + 64 // 2 - 1
    assert time.process_time() - start < 5  # of this process: other load does not count
