import pytest

from dualpipe_jax import schedules
from dualpipe_jax._schedule.ir import Pair

# By hand from the rule: rank r runs F of chunk (t - r) mod 2 in beat t; a microbatch enters every
# two beats, takes one for each stage, waits one from rank 1 back to rank 0, and turns at 3F.
BY_HAND = """
0F0 0F1 2F0 0F2 2F1 0F3;2B0 2F2 2B1 2F3;0B0 2B2 0B1 2B3 0B2 0B3
1F0 1F1 3F0 1F2;3B0 3F1 1F3;3B1 3F2;1B0 3B2 3F3;1B1 3B3 1B2 1B3
"""


def made(num_ranks, num_microbatches, num_stages_per_rank=2):
    return schedules.interleaved_paired(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_stages_per_rank=num_stages_per_rank,
    )


def test_order_of_2_ranks():
    expected = [
        ",".join(f"({cell})OVERLAP_F_B" if ";" in cell else cell for cell in line.split())
        for line in BY_HAND.strip().split("\n")
    ]
    assert made(2, 4).to_csv().splitlines() == expected


@pytest.mark.parametrize("num_stages_per_rank", [2, 3, 4])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_activations_of_rank_0(num_ranks, num_stages_per_rank):
    """A value that waits holds its microbatch for as long, once a round."""
    P, v = num_ranks, num_stages_per_rank
    timeline = made(P, 6 * P, v).timeline(overlap=True)
    assert timeline.num_slots["residual"] == (v + 1) * P + (v - 1) * ((1 - P) % v)


@pytest.mark.parametrize("num_stages_per_rank", [2, 4])
def test_a_pair_has_two_stages(num_stages_per_rank):
    """So has every pair if a rank's number of stages is even."""
    for P in (1, 2, 3, 4):
        for row in made(P, 4 * P, num_stages_per_rank).program.rows:
            pairs = [cell for cell in row if isinstance(cell, Pair)]
            assert all(pair.forward.stage != pair.backward.stage for pair in pairs)
            assert len(pairs) >= 4 * P - num_stages_per_rank


def test_two_stages_a_rank_at_least():
    with pytest.raises(ValueError, match=r"^num_stages_per_rank=1: must be at least 2, .* 'zb-h1'"):
        made(2, 4, 1)
