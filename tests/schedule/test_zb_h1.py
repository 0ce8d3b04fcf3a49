import pytest

from dualpipe_jax._schedule.actions import Opcode
from dualpipe_jax._schedule.generators.zb_h1 import zb_h1
from tests.schedules_under_test import WIDE_SIZES, compiled

# By hand: 1F1B, where rank r defers the first r W to the end.
BY_HAND = """
0F0 0F1 0F2 | 0F3 0B0 0F4 0B1 0F5 0B2 | 0B3 0B4 0B5 |
1F0 1F1 | 1F2 1I0 1F3 1B1 1F4 1B2 1F5 1B3 | 1B4 1B5 | 1W0
2F0 | 2F1 2I0 2F2 2I1 2F3 2B2 2F4 2B3 2F5 2B4 | 2B5 | 2W0 2W1
| 3F0 3I0 3F1 3I1 3F2 3I2 3F3 3B3 3F4 3B4 3F5 3B5 | | 3W0 3W1 3W2
"""


def test_order_of_4_ranks():
    rows = zb_h1(num_ranks=4, num_microbatches=6).rows
    expected = [line.replace("|", " ").split() for line in BY_HAND.strip().split("\n")]
    assert [[str(cell) for cell in row] for row in rows] == expected


@pytest.mark.parametrize("num_ranks", range(1, 10))
def test_idles_a_third_of_1f1b_in_its_memory(num_ranks):
    for P, N in WIDE_SIZES:
        if num_ranks != P:
            continue
        timeline, plain = (compiled(name, P, N).timeline for name in ("zb-h1", "1f1b"))
        if N >= P:
            # (P - 1)(F + B - 2W), the published bubble; less than 1F1B's from two ranks on.
            assert timeline.num_ticks == 3 * N + P - 1, N
        assert timeline.num_ticks <= plain.num_ticks, N
        for buffer in ("residual", "weight_residual"):
            assert timeline.num_slots[buffer] <= plain.num_slots[buffer] <= P, N
        # The last rank defers P - 1 weight grads, and has one more between its I and its W.
        assert timeline.num_slots["stash"] == min(P, N), N


def test_every_rank_holds_as_many_activations():
    compiled_4 = compiled("zb-h1", 4, 12)
    live = compiled_4.allocation.live_ranges["weight_residual"]
    slot_of = compiled_4.allocation.slot_of["weight_residual"]
    assert [int(slot_of[live.rank == rank].max()) + 1 for rank in range(4)] == [4, 4, 4, 4]


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(2, 8), (4, 16), (8, 32), (5, 3)])
def test_a_rank_defers_as_many_weight_grads_as_its_number(num_ranks, num_microbatches):
    """So that under rematerialisation no more of them recompute, however many microbatches."""
    tables = compiled("zb-h1", num_ranks, num_microbatches, stash_deferred=False).tables
    recomputes = tables.opcode == Opcode.WEIGHT_GRAD_DEFERRED
    expected = [min(rank, num_microbatches - 1) for rank in range(num_ranks)]
    assert recomputes.sum(axis=0).tolist() == expected
