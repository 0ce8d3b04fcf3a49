from itertools import pairwise

import pytest

import dualpipe_jax as dpj
from dualpipe_jax._schedule.generators.v_half import v_half
from dualpipe_jax._schedule.ir import Action
from tests.schedules_under_test import WIDE_SIZES, compiled

# By hand on four ranks: microbatch m runs 6 m ticks after the first, whose ticks are those of the
# block; the weight grads of a period take its two other ticks.
# block's second input grad has its own behind it, the first one's waits for two ticks.
STEADY_OF_RANK_0 = "0F5 7I3 0I1 0W1 7W3 7F4"


@pytest.mark.parametrize("num_ranks", range(1, 10))
def test_holds_half_of_the_activations_of_1f1b(num_ranks: int) -> None:
    for P, N in WIDE_SIZES:
        if num_ranks != P:
            continue
        slots = compiled("v-half", P, N).timeline.num_slots
        # Two stages a rank, each half of its layers.
        most = P + 2 if P % 2 == 0 else P + 1
        assert slots["weight_residual"] <= most, N
        assert N < P or slots["weight_residual"] == most, N


def test_steady_phase_repeats_the_block() -> None:
    row = " ".join(
        str(action)
        for cell in v_half(num_ranks=4, num_microbatches=12).rows[0]
        for action in cell.unit_actions()
    )
    for later in range(4):
        period = [f"{cell[:2]}{int(cell[2:]) + later}" for cell in STEADY_OF_RANK_0.split()]
        assert " ".join(period) in row


@pytest.mark.parametrize(
    ("sizes", "expected"),
    # zb-h1 takes 3 N + P - 1, with P activations.
    [((4, 8), 26.5), ((8, 32), 104.5), ((16, 64), 212.5)],
)
def test_time_at_equal_costs(sizes: tuple[int, int], expected: float) -> None:
    P, N = sizes
    made = dpj.simulate(dpj.schedules.v_half(num_ranks=P, num_microbatches=N))
    assert made.dependency_makespan == expected
    assert made.peak_weight_activations * made.stage_share == P / 2 + 1


def test_input_grads_that_take_twice_as_long() -> None:
    """The figure of the docstring, beside its published place of half the activations."""
    costs = dpj.Costs(input_grad=2.08, weight_grad=0.923)
    times = [
        dpj.simulate(
            dpj.schedules.make(name, num_ranks=8, num_microbatches=32), costs=costs, transfer=0.1
        ).dependency_makespan
        for name in ("v-half", "zb-h1")
    ]
    assert times[0] / times[1] == pytest.approx(1.185, abs=0.001)


def test_every_second_rank_defers_half_of_its_weight_grads() -> None:
    deferred = []
    for row in v_half(num_ranks=8, num_microbatches=64).rows:
        actions = [action for cell in row for action in cell.unit_actions()]
        own = [
            before == Action("I", after.stage, after.microbatch)
            for before, after in pairwise(actions)
            if after.kind == "W"
        ]
        deferred.append(1 - sum(own) / len(own))
    assert deferred[::2] == pytest.approx([0.5] * 4, abs=0.1)
    assert deferred[1::2] == pytest.approx([0] * 4, abs=0.1)
