import pytest

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.dualpipev import dualpipev
from dualpipe_jax._schedule.ir import Pair
from tests.schedules_under_test import WIDE_SIZES, compiled

# Written by hand from DeepSeek's `step()` of dualpipev.py, a `|` between its phases.
PUBLISHED = {
    (2, 4, 0): """0F0 0F1 | 0F2 3F0 | 3I0 3W0 3F1 | 0F3+3B1 3F2+0B0 | 3B2 3F3+0B1 | 3B3 0I2 |
        0W2 0I3 | 0W3""",
    (2, 4, 1): """| 1F0 2F0 1F1 2F1 | | 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 | | 2B2 1B2 2I3 1I3 | |
        2W3 1W3""",
    (4, 10, 0): """0F0 0F1 0F2 0F3 0F4 0F5 | 0F6 7F0 | 7I0 7W0 7F1 7I1 7W1 7F2 7I2 7W2 7F3 |
        0F7+7B3 7F4+0B0 0F8+7B4 7F5+0B1 0F9+7B5 7F6+0B2 |
        7B6 7F7+0B3 7B7 7F8+0B4 7B8 7F9+0B5 | 7B9 0I6 | 0W6 0I7 0W7 0I8 0W8 0I9 | 0W9""",
    (4, 10, 2): """2F0 2F1 | 2F2 5F0 2F3 5F1 2F4 5F2 | 5I0 5W0 5F3 |
        2F5+5B1 5F4+2B0 2F6+5B2 5F5+2B1 2F7+5B3 5F6+2B2 2F8+5B4 5F7+2B3 2F9+5B5 5F8+2B4 |
        5B6 5F9+2B5 | 5B7 2B6 5B8 2I7 5I9 2I8 | 2W7 2I9 | 5W9 2W8 2W9""",
    (4, 10, 3): """| 3F0 4F0 3F1 4F1 3F2 4F2 3F3 4F3 | |
        3F4 4B0 4F4+3B0 3F5+4B1 4F5+3B1 3F6+4B2 4F6+3B2 3F7+4B3 4F7+3B3 3F8+4B4 4F8+3B4
        3F9+4B5 4F9+3B5 | | 4B6 3B6 4B7 3B7 4I8 3I8 4I9 3I9 | | 4W8 3W8 4W9 3W9""",
}


@pytest.mark.parametrize(("num_ranks", "num_microbatches", "rank"), PUBLISHED)
def test_published_order(num_ranks, num_microbatches, rank):
    row = dualpipev(num_ranks=num_ranks, num_microbatches=num_microbatches).rows[rank]
    cells = [f"{c.forward}+{c.backward}" if isinstance(c, Pair) else str(c) for c in row]
    expected = PUBLISHED[num_ranks, num_microbatches, rank].replace("|", " ").split()
    assert cells == expected


def test_a_microbatch_goes_down_the_ranks_and_up_again():
    program = dualpipev(num_ranks=4, num_microbatches=8)
    assert program.routes == ((0, 1, 2, 3, 3, 2, 1, 0),)
    assert program.stage_of.tolist() == [[0, 1, 2, 3], [7, 6, 5, 4]]


@pytest.mark.parametrize("num_ranks", range(1, 10))
def test_takes_the_shortest_timetable_in_bounded_memory(num_ranks):
    for P, N in WIDE_SIZES:
        if num_ranks != P:
            continue
        timeline = compiled("dualpipev", P, N).timeline
        if N >= P:
            # The last rank's first activation takes P - 1 ticks, of half a stage each, to arrive.
            assert timeline.num_ticks == 6 * N + P - 1, N
        assert timeline.num_slots["residual"] <= 2 * P + 1, N
        assert timeline.num_slots["weight_residual"] <= 2 * P + 1, N
        assert timeline.num_slots["stash"] <= P, N


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(16, 32), (16, 45), (32, 64)])
def test_larger_sizes(num_ranks, num_microbatches):
    program = dualpipev(num_ranks=num_ranks, num_microbatches=num_microbatches)
    timeline = compile_program(program).timeline
    assert timeline.num_ticks == 6 * num_microbatches + num_ranks - 1
    assert timeline.num_slots["residual"] == 2 * num_ranks + 1


def test_fewer_microbatches_have_pairs_too():
    program = dualpipev(num_ranks=4, num_microbatches=7)
    pairs = [cell for row in program.rows for cell in row if isinstance(cell, Pair)]
    assert all(forward.stage != backward.stage for forward, backward in pairs)
    # At 8 the published order has 25 of 64 forwards in pairs.
    assert len(pairs) >= 8 * 7 // 4
