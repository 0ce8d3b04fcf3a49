import numpy as np
import pytest

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.interleaved_zb import interleaved_zb
from tests import table_interpreter

# By hand: interleaved 1F1B, where rank 1 defers its first W to the end.
BY_HAND = """
0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
1F0 1F1 3F0 3I0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3 3W0
"""
SPLIT = dpj.Execution(overlap=False, split_backward=True)


def made(sizes, num_stages_per_rank, name="interleaved-zb", **options):
    return schedules.make(
        name,
        num_ranks=sizes[0],
        num_microbatches=sizes[1],
        num_stages_per_rank=num_stages_per_rank,
        **options,
    )


def ideal(schedule, transfer=0.0, **costs):
    simulation = dpj.simulate(
        schedule, costs=dpj.Costs(**costs), transfer=transfer, execution=SPLIT
    )
    return simulation.dependency_makespan


def test_order_of_2_ranks():
    expected = [line.split() for line in BY_HAND.strip().split("\n")]
    rows = interleaved_zb(num_ranks=2, num_microbatches=4).rows
    assert [[str(cell) for cell in row] for row in rows] == expected


@pytest.mark.parametrize("num_stages_per_rank", [2, 4])
@pytest.mark.parametrize("sizes", [(4, 8), (4, 16), (8, 32), (16, 64)])
def test_is_at_the_bound_if_all_actions_take_equally_long(sizes, num_stages_per_rank):
    """No rank can end before its work is done, nor the last one start before x reaches it."""
    num_ranks, num_microbatches = sizes
    bound = 3 * num_microbatches + (num_ranks - 1) / num_stages_per_rank
    assert ideal(made(sizes, num_stages_per_rank)) == pytest.approx(bound, rel=1e-12)


@pytest.mark.parametrize(
    ("costs", "plain", "deferred"),
    [
        ({"input_grad": 1.14, "weight_grad": 0.857}, 105.6, 101.75),
        ({"input_grad": 2.08, "weight_grad": 0.923}, 141.1, 135.1),
    ],
)
def test_twice_as_many_suit_long_input_grads(costs, plain, deferred):
    found = (
        ideal(made((8, 32), 2, name="interleaved-1f1b"), transfer=0.1, **costs),
        ideal(made((8, 32), 2, num_deferred="2r"), transfer=0.1, **costs),
    )
    assert found == pytest.approx((plain, deferred), abs=0.05)  # as rounded here


@pytest.mark.parametrize("num_stages_per_rank", [2, 3, 4])
@pytest.mark.parametrize("sizes", [(2, 8), (3, 12), (4, 16)])
def test_takes_the_memory_of_interleaved_1f1b(sizes, num_stages_per_rank):
    """From F to W: rank r of interleaved 1F1B holds 2r activations fewer than rank 0."""

    def peaks(**options):
        schedule = made(sizes, num_stages_per_rank, **options)
        slots = {}
        for timetable in (False, "two-tick"):
            compiled = schedule.compiled(overlap=timetable)
            live = compiled.allocation.live_ranges["weight_residual"]
            slot_of = compiled.allocation.slot_of["weight_residual"]
            slots[timetable] = [int(slot_of[live.rank == r].max()) + 1 for r in range(sizes[0])]
        return slots

    plain, r, twice = peaks(name="interleaved-1f1b"), peaks(), peaks(num_deferred="2r")
    for timetable, of_plain in plain.items():
        most = (num_stages_per_rank + 1) * sizes[0] - 1
        assert of_plain == [most - 2 * rank for rank in range(sizes[0])]
        assert r[timetable] == [most - rank for rank in range(sizes[0])]
        assert twice[timetable] == [most] * sizes[0]


@pytest.mark.parametrize("num_deferred", ["r", "3r", (0, 5, 1), range(3)])
@pytest.mark.parametrize("num_stages_per_rank", [1, 2, 3])
def test_gradients_are_exact(num_stages_per_rank, num_deferred):
    for N in range(1, 8):
        schedule = made((3, N), num_stages_per_rank, num_deferred=num_deferred)
        model = table_interpreter.random_model(3 * num_stages_per_rank, N)
        loss, grads = table_interpreter.run(compile_program(schedule.program).tables, *model)
        expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
        # Only the order of summation differs.
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
        np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_a_number_for_each_rank():
    rows = made((2, 3), 1, num_deferred=[2, 9]).to_csv().splitlines()
    # Rank 1 has three backwards, and defers all but the last.
    assert rows == ["0F0,0F1,0I0,0F2,0I1,0B2,0W0,0W1", "1F0,1I0,1F1,1I1,1F2,1B2,1W0,1W1"]
    assert made((4, 8), 2, num_deferred=range(0, 8, 2)).program.rows == (
        made((4, 8), 2, num_deferred="2r").program.rows
    )
    assert made((4, 8), 2, num_deferred="0r").program.rows == (
        made((4, 8), 2, name="interleaved-1f1b").program.rows
    )
    assert made((4, 8), 1).program.rows == (
        schedules.zb_h1(num_ranks=4, num_microbatches=8).program.rows
    )


@pytest.mark.parametrize(
    "wrong",
    ["", "r2", "-1r", 2, None, [0], [0, 1, 2], [0, -1], [0, True], [0, 1.0], {0, 1}, np.array(1)],
)
def test_wrong_numbers_are_refused(wrong):
    text = "must be 'r' or '2r', .* or 2 integers of at least 0, one for each of the 2 ranks"
    with pytest.raises(ValueError, match=f"^num_deferred=.*: {text}"):
        made((2, 4), 2, num_deferred=wrong)
