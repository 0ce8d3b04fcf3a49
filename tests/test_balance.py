"""Layers cut into stages by their costs: never slower than evenly, nearly as fast as can be."""

import itertools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from dualpipe_jax._costs import cumulated
from dualpipe_jax._predict import StageLayers, balance, replay_decided
from dualpipe_jax._predict.balance import Splits
from dualpipe_jax._schedule.stage_sizes import spread_evenly
from tests.kinds import make_kinds
from tests.kinds import make_params as make_kinds_params
from tests.models import assert_close, make_batch, make_mesh

# DeepSeek-V3's layers, a head as expensive as three of those with experts, F : I : W and a transfer
# of attention without rematerialisation.
LAYOUT = ("dense",) * 3 + ("moe",) * 58
COSTS = dpj.Costs(
    forward=1,
    input_grad=1.14,
    weight_grad=0.857,
    head=3 * 8 / 59.5,
    layer={"dense": 0.5, "moe": 1.0},
)
NAMES = schedules.names()


@pytest.mark.parametrize(
    ("name", "gain"), [("zb-h1", 0.17), ("interleaved-1f1b", 0.18), ("dualpipev", 0.06)]
)
def test_gains_where_stages_cost_unequally(name: str, gain: float) -> None:
    schedule = schedules.make(name, num_ranks=8, num_microbatches=32)
    even, balanced = (
        dpj.simulate(schedule, costs=COSTS, transfer=0.1, layout=LAYOUT, layers_per_stage=each)
        for each in (None, "balanced")
    )
    assert balanced.dependency_makespan <= (1 - gain) * even.dependency_makespan
    assert balanced.makespan < even.makespan


@given(
    name=st.sampled_from(NAMES),
    num_layers=st.integers(8, 20),
    embed=st.floats(0, 3),
    head=st.floats(0, 3),
    weights=st.lists(st.floats(0.1, 4), min_size=20, max_size=20),
    transfer=st.floats(0, 0.3),
)
@settings(max_examples=25, deadline=None)
def test_never_slower_than_an_even_split(
    name: str,
    num_layers: int,
    embed: float,
    head: float,
    weights: list[float],
    transfer: float,
) -> None:
    schedule = schedules.make(name, num_ranks=4, num_microbatches=6)
    costs = dpj.Costs(input_grad=1.2, weight_grad=0.8, embed=embed, head=head)
    layer_weights = tuple(weights[:num_layers])
    options: dict[str, Any] = {"costs": costs, "transfer": transfer}
    found = balance(schedule, num_layers=num_layers, layer_weights=layer_weights, **options)
    even, balanced = (
        replay_decided(
            schedule, dpj.Execution(), layers=StageLayers.cut(sizes, layer_weights), **options
        ).makespan
        for sizes in (spread_evenly(num_layers, schedule.num_stages), found)
    )
    assert sum(found) == num_layers
    assert balanced <= even * (1 + 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_within_two_percent_of_the_best_of_all_splits(name: str) -> None:
    schedule = schedules.make(name, num_ranks=4, num_microbatches=16)
    num_layers = 10 if schedule.num_stages == 4 else 9
    execution = dpj.Execution(overlap=False, split_backward=True)
    for embed, head in ((0.0, 1.2), (0.6, 0.4)):
        costs = dpj.Costs(input_grad=1.14, weight_grad=0.857, embed=embed, head=head)
        splits = Splits(
            schedule, costs=costs, transfer=0.1, weights=cumulated(None, num_layers=num_layers)
        )
        near = [range(max(0, n - 3), n + 3) for n in spread_evenly(num_layers, schedule.num_stages)]
        near = near if len(near) == 4 else [range(3)] * 8
        all_splits = [sizes for sizes in itertools.product(*near) if sum(sizes) == num_layers]
        times = splits.makespans(*all_splits)
        best = all_splits[int(np.argmin(times))]
        found = balance(schedule, execution, costs=costs, transfer=0.1, num_layers=num_layers)
        made, of_best = (
            dpj.simulate(
                schedule, costs=costs, transfer=0.1, layers_per_stage=each, execution=execution
            )
            for each in (found, best)
        )
        assert of_best.dependency_makespan == pytest.approx(min(times))
        # The program's own waits may decide otherwise.
        is_near = made.dependency_makespan <= 1.02 * min(times)
        assert is_near or made.makespan < of_best.makespan


def test_stages_are_no_larger_than_memory_allows() -> None:
    schedule = schedules.make("zb-h1", num_ranks=4, num_microbatches=8)
    options: dict[str, Any] = {"costs": dpj.Costs(head=2), "transfer": 0.1, "num_layers": 16}
    largest = max(balance(schedule, **options))
    assert largest > 5
    assert max(balance(schedule, most=5, **options)) == 5
    assert balance(schedule, most=4, **options) == (4, 4, 4, 4)


def test_choose_takes_the_largest_stage_that_fits() -> None:
    model, params, batch = make_kinds("DMMMMM"), make_kinds_params("DMMMMM"), make_batch(4)
    where: dict[str, Any] = {
        "mesh": make_mesh(2),
        "num_microbatches": 4,
        "schedules": "zb-h1",
        "remat": "none",
        "costs": dpj.Costs(head=1, layer={"dense": 0.1, "moe": 1.0}),
        "headroom": 0,
    }
    at_once = dpj.choose(model, params, batch, **where)
    free = at_once[0]
    assert free.layers_per_stage is not None
    assert free.arguments["layers_per_stage"] == free.layers_per_stage
    least = min(choice.num_bytes for choice in at_once)
    (tight, *_) = dpj.choose(model, params, batch, memory=least - 1, **where)
    assert tight.fits
    split = tight.layers_per_stage or (3, 3)
    assert max(split) < max(free.layers_per_stage)


@pytest.mark.slow
def test_a_balanced_step_is_exact_and_says_its_stages() -> None:
    """At costs that are counted: the last stage has fewer layers, the gradients are the same."""
    letters = "DMMMM"
    model, params, batch = make_kinds(letters), make_kinds_params(letters), make_batch(4)
    options: dict[str, Any] = {"mesh": make_mesh(2), "num_microbatches": 4}
    grad_fn = dpj.value_and_grad(model, **options, schedule="1f1b", layers_per_stage="balanced")
    split = grad_fn.memory(params, batch).layers_per_stage
    assert sum(split) == 5
    sequential = dpj.sequential(model, num_microbatches=4)
    want = jax.jit(jax.value_and_grad(sequential, allow_int=True))(params, batch)
    assert_close(grad_fn(params, batch), want)
    # Costs that are given decide instead, those of kinds too; and forwards alone are balanced.
    for dense, expected in ((8.0, (1, 4)), (0.1, (3, 2))):
        given_costs = dpj.Costs(layer={"dense": dense, "moe": 1.0})
        again = dpj.value_and_grad(
            model, **options, schedule="1f1b", layers_per_stage="balanced", costs=given_costs
        )
        assert again.memory(params, batch).layers_per_stage == expected
    evaluate = dpj.evaluate(model, **options, layers_per_stage="balanced")
    assert_close(evaluate(params, batch), want[0])


def test_layers_of_kinds_share_a_ranks_costs() -> None:
    schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=3)
    costs = dpj.Costs(forward=1, input_grad=2, weight_grad=3, layer={"a": 1, "b": 3})
    made = dpj.simulate(schedule, costs=costs, layout=["a", "a", "b", "a"])
    # All layers take 12 a microbatch, and the first two are a third of them.
    assert made.work == pytest.approx((3 * 4, 3 * 8))
    alike = dpj.simulate(schedule, costs=dpj.Costs(layer={"a": 7}), layout=("a",) * 4)
    assert alike.makespan == dpj.simulate(schedule, num_layers=4).makespan


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"layers_per_stage": "balanced"}, ValueError, "must come with num_layers, or"),
        ({"layers_per_stage": "even", "num_layers": 8}, TypeError, '"balanced", or None'),
        ({"costs": COSTS, "num_layers": 8}, ValueError, "must come with the kind of every layer"),
        ({"costs": COSTS, "layout": ("moe", "dense", "x", "y")}, ValueError, "none for 'x', 'y'"),
        ({"layout": ("moe",) * 4, "num_layers": 5}, ValueError, "the 4 layers whose kinds"),
        ({"layout": "moe"}, TypeError, "the name of the kind of every layer, in a list"),
    ],
)
def test_wrong_arguments_are_refused(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=3)
    with pytest.raises(error, match=words):
        dpj.simulate(schedule, **change)


@pytest.mark.parametrize(
    ("layer", "error", "words"),
    [
        (3, TypeError, "must map the kinds"),
        ({}, ValueError, "must map the kinds"),
        ({"a": -1}, ValueError, r"layer\['a'\]=-1.0: a cost must be"),
        ({"a": "1"}, TypeError, "must be a number"),
    ],
)
def test_wrong_costs_of_kinds_are_refused(layer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        dpj.Costs(layer=layer)


def test_costs_of_kinds_are_hashed_and_written() -> None:
    measured: Any = np.float32(1)
    costs = dpj.Costs(layer={"a": measured})
    assert hash(costs) == hash(dpj.Costs(layer={"a": 1.0}))
    assert eval(repr(costs), {"Costs": dpj.Costs}) == costs
