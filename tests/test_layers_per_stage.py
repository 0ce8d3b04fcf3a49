"""Stages of the sizes that the user names: the same gradients, and the time that they take."""

from typing import Any

import jax
import numpy as np
import pytest

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from tests.cheap_keys import make_key
from tests.kinds import make_kinds
from tests.kinds import make_params as make_kinds_params
from tests.models import (
    assert_close,
    make_batch,
    make_mesh,
    make_model,
    make_params,
)

FEATURES = frozenset(["dropout", "weight", "block_has_aux", "has_aux"])


def test_evaluate_and_apply() -> None:
    model, rng = make_model(FEATURES), make_key(2)
    params, batch = make_params(6), make_batch(4)
    options: dict[str, Any] = {"mesh": make_mesh(3), "num_microbatches": 4}
    evaluate = dpj.evaluate(model, **options, layers_per_stage=np.array([0, 4, 2]).tolist())
    want = jax.jit(dpj.sequential(model, num_microbatches=4))(params, batch, rng=rng)
    assert_close(jax.jit(evaluate)(params, batch, rng=rng), want)
    evenly = dpj.apply(model, **options)
    apply = dpj.apply(model, **options, layers_per_stage=[5, 1, 0])
    got, want = (jax.jit(each)(params, batch, rng=rng) for each in (apply, evenly))
    assert_close(got, want)


def test_every_rank_has_room_for_the_fullest_stage_only() -> None:
    """A rank holds buffers for as many layers as its fullest stage has."""

    def slots_of(layers_per_stage: tuple[int, ...]) -> int:
        grad_fn = dpj.value_and_grad(
            make_model(),
            mesh=make_mesh(2),
            num_microbatches=4,
            schedule="1f1b",
            layers_per_stage=layers_per_stage,
            execution=dpj.Execution(unroll=False if len(set(layers_per_stage)) == 1 else None),
        )
        params = make_params(sum(layers_per_stage))
        terms = {term.name: term for term in grad_fn.memory(params, make_batch(4)).terms}
        return terms["residuals for I and W"].num_bytes

    assert slots_of((5, 2)) == slots_of((5, 5))
    assert slots_of((4, 3)) * 5 == slots_of((5, 2)) * 4


BAD = {
    "too few": ((2, 2), ValueError, ["4 stages of schedule 'dualpipev' over 2 ranks", "2 numbers"]),
    "negative": (
        (3, 0, 4, -1),
        ValueError,
        ["at least 0 layers", "stage 3 has -1"],
    ),
    "all empty": ((0, 0, 0, 0), ValueError, ["at least one stage must have a layer"]),
    "no integers": (
        (2, 1.0, 2, "1"),
        TypeError,
        ["all integers", "stage 1 has float 1.0", "stage 3 has str '1'"],
    ),
    "bools": ((True, 1, 1, 1), TypeError, ["stage 0 has bool True"]),
    "a number": (3, TypeError, ["layers_per_stage=3", "for each of the 4 stages", "int 3"]),
    "another sum": ((2, 1, 1, 1), ValueError, ["number of layers, 6", "its sum is 5"]),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refusals(bad: str) -> None:
    value, error, words = BAD[bad]

    def run() -> None:
        grad_fn = dpj.value_and_grad(
            make_model(),
            mesh=make_mesh(2),
            num_microbatches=4,
            schedule="dualpipev",
            layers_per_stage=value,  # pyrefly: ignore
        )
        jax.eval_shape(grad_fn, make_params(6), make_batch(4))

    with pytest.raises(error) as caught:
        run()
    for word in ["layers_per_stage=", *words]:
        assert word in str(caught.value)


def test_forwards_alone_have_a_stage_a_rank() -> None:
    for make in (dpj.evaluate, dpj.apply):
        with pytest.raises(ValueError, match=r"each of the 2 stages, one a rank.*4 numbers"):
            make(make_model(), mesh=make_mesh(2), num_microbatches=4, layers_per_stage=(1,) * 4)


def test_layers_spread_evenly_are_no_fewer_than_stages() -> None:
    grad_fn = dpj.value_and_grad(make_model(), mesh=make_mesh(3), num_microbatches=4)
    with pytest.raises(ValueError, match=r"2 layers, fewer than the 3 stages.*layers_per_stage"):
        jax.eval_shape(grad_fn, make_params(2), make_batch(4))


def test_unrolling_needs_like_stages() -> None:
    """A stage may have fewer layers than the largest, but not of other kinds."""

    def trace(letters: str) -> None:
        grad_fn = dpj.value_and_grad(
            make_kinds(letters),
            mesh=make_mesh(2),
            num_microbatches=4,
            layers_per_stage=(3, 1),
            execution=dpj.Execution(unroll=True),
        )
        jax.eval_shape(grad_fn, make_kinds_params(letters), make_batch(4))

    trace("DMMD")
    with pytest.raises(ValueError, match=r"unroll=True.*2 unlike stages"):
        trace("DDMM")


# --- the time that they take ------------------------------------------------------------------


def test_simulated_work_is_that_of_the_stages() -> None:
    schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=3)
    costs = dpj.Costs(forward=1, input_grad=2, weight_grad=3)
    # The costs of two layers are 6 a microbatch; the ranks have 3 / 2 and 1 / 2 of them.
    made = dpj.simulate(schedule, costs=costs, layers_per_stage=(3, 1))
    assert made.work == (3 * 6 * 1.5, 3 * 6 * 0.5)
    # Two layers and the head, whose gradient costs 5 times as much, and that of the embedding 3.
    costs = dpj.Costs(forward=1, input_grad=2, weight_grad=3, embed=5, head=7)
    full = dpj.Execution(split_backward=False)
    for execution in (dpj.Execution(split_backward=True), full):
        made = dpj.simulate(schedule, costs=costs, layers_per_stage=(2, 0), execution=execution)
        assert made.work == (3 * (2 * 6 + 5 * 4), 3 * 7 * 6)
        made = dpj.simulate(schedule, costs=costs, layers_per_stage=(0, 2), execution=execution)
        assert made.work == (3 * 5 * 4, 3 * (2 * 6 + 7 * 6))
    assert made.published_bubble is None
    evenly = dpj.simulate(schedule, costs=costs, layers_per_stage=(2, 2))
    assert evenly == dpj.simulate(schedule, costs=costs)
    assert dpj.simulate(schedule, costs=costs, num_layers=5) == dpj.simulate(
        schedule, costs=costs, layers_per_stage=(3, 2)
    )


@pytest.mark.parametrize("name", ["1f1b", "dualpipe", "dualpipev"])
def test_a_shorter_last_stage_makes_up_for_the_head(name: str) -> None:
    """A head that costs two layers: the ranks idle less if its stage has a layer less."""
    schedule = schedules.make(name, num_ranks=4, num_microbatches=16)
    num_stages = schedule.num_stages
    evenly, shorter = [4] * num_stages, [4, 5, *[4] * (num_stages - 3), 3]
    costs = dpj.Costs(head=2 * 4 / sum(evenly))
    idle = [
        dpj.simulate(schedule, costs=costs, layers_per_stage=sizes).idle_share
        for sizes in (shorter, evenly)
    ]
    assert idle[0] < idle[1]


def test_simulate_refuses() -> None:
    schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=3)
    with pytest.raises(ValueError, match=r"layers_per_stage=\(1, 2, 3\): .*2 stages.*3 numbers"):
        dpj.simulate(schedule, layers_per_stage=(1, 2, 3))
    with pytest.raises(ValueError, match=r"number of layers, 4, but its sum is 3"):
        dpj.simulate(schedule, layers_per_stage=(1, 2), num_layers=4)
