import pytest

from dualpipe_jax._schedule.generators.chimera import chimera
from dualpipe_jax._schedule.ir import Action, Program
from tests.schedules_under_test import WIDE_SIZES, compiled

# By hand from the paper's figure of the basic unit, P = N = 4: 2 and 3 go up.
PUBLISHED_4_4 = """
0F0 0F1 3F2 3B2 3F3 3B3 0B0 0B1
1F0 2F2 1F1 2F3 2B2 1B0 2B3 1B1
1F2 2F0 1F3 2F1 2B0 1B2 2B1 1B3
0F2 0F3 3F0 3B0 3F1 3B1 0B2 0B3
"""
# Two units: the second's first forward fills the bubble before the first's last backward.
PUBLISHED_4_8_RANK_0 = "0F0 0F1 3F4 3B4 3F5 3B5 0B0 0F2 0B1 0F3 3F6 3B6 3F7 3B7 0B2 0B3"


def count_ticks_of_whole_backwards(program: Program) -> int:
    """Counts ticks as the paper does: F and B one each, a B whole before its cotangent leaves."""
    position = dict.fromkeys(range(program.num_ranks), 0)
    done: dict[tuple[str, int, int], int] = {}
    tick = 0
    while any(position[rank] < len(row) for rank, row in enumerate(program.rows)):
        for rank, row in enumerate(program.rows):
            if position[rank] == len(row):
                continue
            cell = row[position[rank]]
            assert isinstance(cell, Action)
            kind, stage, m = cell
            assert kind in "FB"
            if kind == "F":
                ready = stage == 0 or done.get(("F", stage - 1, m), tick) < tick
            else:
                last = stage == program.num_stages - 1
                before = ("F", stage, m) if last else ("B", stage + 1, m)
                ready = done.get(before, tick) < tick
            if ready:
                done[kind, stage, m] = tick
                position[rank] += 1
        tick += 1
        assert tick < 10_000
    return tick


def test_published_order_of_the_basic_unit():
    rows = chimera(num_ranks=4, num_microbatches=4).rows
    expected = [line.split() for line in PUBLISHED_4_4.strip().split("\n")]
    assert [[str(cell) for cell in row] for row in rows] == expected


def test_published_order_of_two_units():
    row = chimera(num_ranks=4, num_microbatches=8).rows[0]
    assert [str(cell) for cell in row] == PUBLISHED_4_8_RANK_0.split()


@pytest.mark.parametrize("num_ranks", range(2, 10))
def test_idle_share_is_the_published_one(num_ranks):
    for P, N in WIDE_SIZES:
        if num_ranks != P or N % P:
            continue
        # (P - 2) / (2N + P - 2) of the ticks. For an odd P, which the paper leaves out, the middle
        # rank alone waits (P - 1) / 2 ticks at both ends: P - 1 is the least there can be.
        idle = P - 2 + P % 2
        ticks = count_ticks_of_whole_backwards(compiled("chimera", P, N).program)
        assert ticks == 2 * N + idle, N
        # In ticks of F, I and W, where a W does not hold the I up, no more of longer steps.
        assert compiled("chimera", P, N).timeline.num_ticks == 3 * N + idle, N


@pytest.mark.parametrize("num_ranks", range(2, 10))
def test_other_sizes_are_as_short(num_ranks):
    for P, N in WIDE_SIZES:
        if num_ranks != P:
            continue
        timeline = compiled("chimera", P, N).timeline
        if N >= P:
            assert timeline.num_ticks <= 3 * N + P - 2 + P % 2, N
        assert timeline.num_ticks <= compiled("1f1b", P, N).timeline.num_ticks, N
        published = P % 2 == 0 and N % P == 0
        assert timeline.num_slots["residual"] <= P + (not published), N
        assert timeline.num_slots["stash"] == 1, N


def test_one_rank_has_one_direction():
    program = chimera(num_ranks=1, num_microbatches=2)
    assert program.to_csv() == "0F0,0B0,0F1,0B1\n"


def test_direction_1_enters_at_the_last_rank():
    program = chimera(num_ranks=4, num_microbatches=8)
    assert program.routes == ((0, 1, 2, 3), (3, 2, 1, 0))
    assert program.direction_of.tolist() == [0] * 4 + [1] * 4
