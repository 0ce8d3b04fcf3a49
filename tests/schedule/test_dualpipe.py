import pytest

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.dualpipe import dualpipe
from dualpipe_jax._schedule.ir import Pair
from tests.schedules_under_test import WIDE_SIZES, compiled

# Written by hand from DeepSeek's `step()`: P = 4, N = 8, so direction 1 has microbatches 4 to 7.
PUBLISHED_4_8 = """
0F0 0F1 | 0F2 3F4 | 3I4 3W4 3F5 | 0F3+3B5 3F6+0B0 | 3B6 3F7+0B1 | 3B7 0I2 | 0W2 0I3 | 0W3
| 1F0 2F4 1F1 2F5 | | 1F2 2B4 2F6+1B0 1F3+2B5 2F7+1B1 | | 2B6 1B2 2I7 1I3 | | 2W7 1W3
| 1F4 2F0 1F5 2F1 | | 1F6 2B0 2F2+1B4 1F7+2B1 2F3+1B5 | | 2B2 1B6 2I3 1I7 | | 2W3 1W7
0F4 0F5 | 0F6 3F0 | 3I0 3W0 3F1 | 0F7+3B1 3F2+0B4 | 3B2 3F3+0B5 | 3B3 0I6 | 0W6 0I7 | 0W7
"""
# The same for the first and a middle rank of P = 8, N = 20, the sizes of the published figure.
PUBLISHED_8_20 = {
    0: """0F0 0F1 0F2 0F3 0F4 0F5 | 0F6 7F10 | 7I10 7W10 7F11 7I11 7W11 7F12 7I12 7W12 7F13 |
        0F7+7B13 7F14+0B0 0F8+7B14 7F15+0B1 0F9+7B15 7F16+0B2 |
        7B16 7F17+0B3 7B17 7F18+0B4 7B18 7F19+0B5 | 7B19 0I6 | 0W6 0I7 0W7 0I8 0W8 0I9 | 0W9""",
    3: """| 3F0 4F10 3F1 4F11 3F2 4F12 3F3 4F13 | |
        3F4 4B10 4F14+3B0 3F5+4B11 4F15+3B1 3F6+4B12 4F16+3B2 3F7+4B13 4F17+3B3 3F8+4B14 4F18+3B4
        3F9+4B15 4F19+3B5 | | 4B16 3B6 4B17 3B7 4I18 3I8 4I19 3I9 | | 4W18 3W8 4W19 3W9""",
}


def _short(row):
    return [str(c) if not isinstance(c, Pair) else f"{c.forward}+{c.backward}" for c in row]


def _cells(text):
    return text.replace("|", " ").split()


def test_published_order_of_4_ranks():
    rows = dualpipe(num_ranks=4, num_microbatches=8).rows
    assert [_short(row) for row in rows] == [_cells(x) for x in PUBLISHED_4_8.strip().split("\n")]


@pytest.mark.parametrize("rank", PUBLISHED_8_20)
def test_published_order_of_8_ranks(rank):
    program = dualpipe(num_ranks=8, num_microbatches=20)
    assert _short(program.rows[rank]) == _cells(PUBLISHED_8_20[rank])
    # Direction 1 runs the mirrored rank's row, with its own microbatches.
    swap = {m: (m + 10) % 20 for m in range(20)}
    mirrored = [
        [(a.kind, a.stage, swap[a.microbatch]) for a in cell.unit_actions()]
        for cell in program.rows[7 - rank]
    ]
    assert mirrored == [[tuple(a) for a in cell.unit_actions()] for cell in program.rows[rank]]


def test_direction_1_enters_at_the_last_rank():
    program = dualpipe(num_ranks=8, num_microbatches=20)
    assert program.to_csv().split("\n")[7].startswith("0F10,")
    assert program.routes == (tuple(range(8)), tuple(range(8))[::-1])
    assert program.direction_of.tolist() == [0] * 10 + [1] * 10


@pytest.mark.parametrize("num_ranks", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("microbatches_per_rank", [2, 2.5, 4, 8])
def test_published_sizes_take_the_shortest_timetable(num_ranks, microbatches_per_rank):
    num_microbatches = int(num_ranks * microbatches_per_rank) // 2 * 2
    timeline = compile_program(
        dualpipe(num_ranks=num_ranks, num_microbatches=num_microbatches)
    ).timeline
    # The middle ranks' first activation takes P / 2 - 1 ticks to arrive.
    assert timeline.num_ticks == 3 * num_microbatches + num_ranks // 2 - 1
    assert timeline.num_slots["residual"] <= num_ranks + 1
    assert timeline.num_slots["weight_residual"] <= num_ranks + 1


@pytest.mark.parametrize("num_ranks", range(1, 10))
def test_other_sizes_are_as_short(num_ranks):
    for P, N in WIDE_SIZES:
        if num_ranks != P:
            continue
        timeline = compiled("dualpipe", P, N).timeline
        if N >= P:
            assert timeline.num_ticks == 3 * N + (P - 1) // 2, N
        assert timeline.num_ticks <= compiled("1f1b", P, N).timeline.num_ticks, N
        assert timeline.num_slots["residual"] <= P + 1, N
        assert timeline.num_slots["weight_residual"] <= P + 1, N
        assert timeline.num_slots["stash"] <= (P + 1) // 2, N


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(7, 28), (8, 33), (5, 40)])
def test_other_sizes_have_pairs(num_ranks, num_microbatches):
    program = dualpipe(num_ranks=num_ranks, num_microbatches=num_microbatches)
    pairs = [cell for row in program.rows for cell in row if isinstance(cell, Pair)]
    directions = program.direction_of
    for forward, backward in pairs:
        assert directions[forward.microbatch] != directions[backward.microbatch]
    # As many as the published order has at such sizes: two thirds.
    assert len(pairs) >= 0.6 * num_ranks * num_microbatches


def test_one_rank_has_one_direction():
    program = dualpipe(num_ranks=1, num_microbatches=3)
    assert program.to_csv() == "0F0,0B0,0F1,0B1,0F2,0B2\n"
    assert program.stage_of.tolist() == [[0]]


def test_middle_rank_of_an_odd_number_holds_its_stage_twice():
    program = dualpipe(num_ranks=3, num_microbatches=6)
    assert program.stage_of.tolist() == [[0, 1, 2], [2, 1, 0]]
