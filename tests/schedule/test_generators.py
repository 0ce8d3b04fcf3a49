import numpy as np
import pytest

from dualpipe_jax._schedule.actions import BUFFERS
from dualpipe_jax._schedule.generators import GENERATORS, forward_only
from dualpipe_jax._schedule.generators.sizes import split_microbatches
from tests.schedules_under_test import WIDE_SIZES, compiled

ALL = [*GENERATORS.values(), forward_only]


@pytest.mark.parametrize("generate", ALL)
@pytest.mark.parametrize("wrong", [0, -1, 1.0, "4", None, True])
def test_sizes_are_positive_integers(generate, wrong):
    with pytest.raises(ValueError, match=rf"^num_ranks={wrong!r}: must be an integer of at least"):
        generate(num_ranks=wrong, num_microbatches=4)
    with pytest.raises(ValueError, match=f"^num_ranks={wrong!r}, num_microbatches=0: must be"):
        generate(num_ranks=wrong, num_microbatches=0)


@pytest.mark.parametrize("generate", ALL)
def test_numpy_integers_are_integers(generate):
    sizes = np.array([3, 5])
    assert generate(num_ranks=sizes[0], num_microbatches=sizes[1]) == generate(
        num_ranks=3, num_microbatches=5
    )


@pytest.mark.parametrize(("num_microbatches", "sizes"), [(1, (1, 0)), (5, (3, 2)), (6, (3, 3))])
def test_direction_0_has_the_odd_microbatch(num_microbatches, sizes):
    assert tuple(map(len, split_microbatches(num_microbatches))) == sizes


def test_1f1b_and_gpipe_idle_for_the_ramps_only():
    for P, N in WIDE_SIZES:
        for name in ("1f1b", "gpipe"):
            assert compiled(name, P, N).timeline.num_ticks <= 3 * N + 3 * (P - 1)


def test_1f1b_holds_an_activation_for_each_rank_below():
    live = compiled("1f1b", 4, 12).allocation.live_ranges["residual"]
    slot_of = compiled("1f1b", 4, 12).allocation.slot_of["residual"]
    assert [int(slot_of[live.rank == rank].max()) + 1 for rank in range(4)] == [4, 3, 2, 1]


def test_gpipe_holds_all_microbatches():
    num_slots = compiled("gpipe", 3, 8).tables.num_slots
    assert [num_slots[buffer] for buffer in BUFFERS] == [8, 8, 8, 1]


def test_forward_only_meets_in_the_middle():
    actions = compiled("forward-only", 4, 6).timeline.actions
    assert actions[0] == ("0F0", None, None, "0F3")
    assert actions[3] == ("3F3", "1F1", "1F4", "3F0")
