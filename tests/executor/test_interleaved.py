"""Beats as they are traced for devices that overlap transfers and compute, run on CPUs."""

from dataclasses import replace
from typing import Any

import jax
import pytest

import dualpipe_jax as dpj
from dualpipe_jax._api import build
from dualpipe_jax._executor import barriers, beats, rank
from dualpipe_jax._executor.layer import LayerWork
from dualpipe_jax._executor.stages import Stages
from dualpipe_jax._schedule import layer_order
from tests.cheap_keys import make_key
from tests.kinds import make_kinds
from tests.kinds import make_params as make_kinds_params
from tests.models import FEATURES, assert_close, make_batch, make_mesh, make_model, make_params


def assert_equals_sequential(grad_fn: Any, model: dpj.Model, params: Any, batch: Any) -> None:
    """Runs both in one program, on the same key."""
    num_microbatches = grad_fn.schedule.num_microbatches
    sequential = dpj.sequential(model, num_microbatches=num_microbatches)
    reference = jax.value_and_grad(sequential, has_aux=True, allow_int=True)
    rng = make_key(5)

    def both(params: Any, batch: Any) -> Any:
        return grad_fn(params, batch, rng=rng), reference(params, batch, rng=rng)

    got, want = jax.jit(both)(params, batch)
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "schedule", "num_ranks", "num_microbatches", "num_layers", "remat", "options"),
    [
        ("cuda", "dualpipe", 2, 8, 4, "none", {}),
        ("cuda", "dualpipev", 2, 8, 8, "block", {"unroll": False}),
        ("tpu", "dualpipe", 2, 8, 6, "block", {"unroll": False}),
        ("tpu", "dualpipe", 3, 9, 5, "none", {}),  # unlike stages
        ("tpu", "dualpipe", 3, 9, 5, "block", {"split_backward": False}),
        ("tpu", "dualpipe", 2, 8, 4, "none", {"split_backward": False}),
        ("tpu", "dualpipev", 2, 8, 12, "none", {"split_backward": False, "unroll": 2}),
        ("tpu", "interleaved-paired", 2, 8, 4, "none", {}),
        ("tpu", "interleaved-paired", 2, 8, 8, "block", {"unroll": False}),
        # Values wait for three beats; F and B of one chunk, and no wait.
        ("tpu", "interleaved-paired(num_stages_per_rank=4)", 2, 10, 8, "none", {}),
        ("tpu", "interleaved-paired(num_stages_per_rank=3)", 1, 5, 3, "none", {}),
    ],
)
def test_interleaved_beats_equal_the_sequential_model(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    schedule: str,
    num_ranks: int,
    num_microbatches: int,
    num_layers: int,
    remat: str,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(rank, "platform_of", lambda mesh: platform)
    if platform == "cuda":
        # The barrier that lowering for a GPU would choose.
        monkeypatch.setattr(barriers, "wait_for", barriers.select_after)
    made = dpj.schedules.make(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches)
    assert made.compiled(overlap=True).tables.steady is not None
    model = make_model(frozenset([*FEATURES, "metrics"]))
    params, batch = make_params(num_layers), make_batch(num_microbatches)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(num_ranks),
        num_microbatches=num_microbatches,
        schedule=schedule,
        remat=remat,
        execution=replace(dpj.Execution(overlap=True, split_backward=True), **options),
    )
    assert_equals_sequential(grad_fn, model, params, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "num_layers", "options"),
    [
        ("1f1b", 5, {"remat": "block"}),
        ("zb-h1", 6, {"remat": "block", "execution": dpj.Execution(unroll=False)}),
        ("interleaved-1f1b", 8, {}),
    ],
)
def test_full_backwards_as_accelerators_run_them_by_default(
    monkeypatch: pytest.MonkeyPatch, schedule: str, num_layers: int, options: dict[str, Any]
) -> None:
    """In ticks, where layers take no turns as on CPUs."""
    for module in (rank, build):
        monkeypatch.setattr(module, "platform_of", lambda mesh: "tpu")
    model, params, batch = make_model(frozenset(FEATURES)), make_params(num_layers), make_batch(8)
    grad_fn = dpj.value_and_grad(
        model, mesh=make_mesh(2), num_microbatches=8, schedule=schedule, **options
    )
    report = grad_fn.memory(params, batch, rng=make_key(5))
    assert "stash of a full backward, without a slot" in {term.name for term in report.terms}
    assert_equals_sequential(grad_fn, model, params, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("most_times", "remat"), [(2, "block"), (2.5, "none")])
def test_transfers_hidden_by_weight_grads_change_no_value(
    monkeypatch: pytest.MonkeyPatch, most_times: float, remat: str
) -> None:
    """The W of one layer hides the transfers, or that of the last layer but one."""
    monkeypatch.setattr(rank, "platform_of", lambda mesh: "tpu")
    hides = []

    def can_hide(*_: Any, times: float) -> bool:
        hides.append(times <= most_times)
        return hides[-1]

    monkeypatch.setattr(beats, "_can_hide", can_hide)
    model, params, batch = make_model(frozenset(FEATURES)), make_params(6), make_batch(8)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(2),
        num_microbatches=8,
        execution=dpj.Execution(overlap=True, split_backward=True),
        remat=remat,
    )
    assert_equals_sequential(grad_fn, model, params, batch)
    assert set(hides) == ({True, False} if most_times == 2 else {True})


@pytest.mark.parametrize(
    ("platform", "most_times", "layers", "orders"),
    [
        ("cpu", 0, (4, 4), {"F0 F1 F2 F3 I3 W3 I2 W2 I1 W1 I0 W0 send receive"}),
        (
            "tpu",
            0,
            (4, 4),
            {"I3 F0 I2 F1 I1 F2 I0 F3 send W3@send W2@send W1@send W0@send receive"},
        ),
        ("tpu", 2, (4, 4), {"I3 F0 W3 I2 F1 W2 I1 F2 I0 F3 send W1 W0@receive"}),
        ("tpu", 2.5, (4, 4), {"I3 F0 W3 I2 F1 W2 I1 F2 W1 I0 F3 send W0@receive"}),
        # Ranks of one direction have both stages, so that some have fewer layers than others.
        (
            "cpu",
            0,
            (1, 1, 2, 0),
            {"F0 F1 IW1 I0 W0 send receive", "F0 F1 IW1 IW0 send receive"},
        ),
        (
            "tpu",
            0,
            (2, 2, 1, 2),
            {"IW1 F0 I0 F1@I send W0@send receive", "I1 F0 I0 F1@I send W1@send W0@send receive"},
        ),
        (
            "tpu",
            2.5,
            (2, 2, 1, 2),
            {"IW1 F0 I0 F1 send W0@receive", "I1 F0 W1 I0 F1 send W0@receive"},
        ),
    ],
)
def test_weight_grads_follow_their_layer(
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    most_times: float,
    layers: tuple[int, ...],
    orders: set[str],
) -> None:
    """But for those of the last layers, which hide the transfers, if all ranks have them.

    The last F waits for I where a layer of either stage is run or skipped, unless one W hides them.
    """
    monkeypatch.setattr(rank, "platform_of", lambda mesh: platform)
    monkeypatch.setattr(beats, "_can_hide", lambda *_, times: times <= most_times)
    found = set()
    run_order = beats.Beat._run_order

    def spy(self: beats.Beat, order: layer_order.Order, *args: Any) -> Any:
        found.add(layer_order.write(order))
        return run_order(self, order, *args)

    monkeypatch.setattr(beats.Beat, "_run_order", spy)
    num_microbatches = 4 * len(layers)
    grad_fn = dpj.value_and_grad(
        make_model(frozenset()),
        mesh=make_mesh(len(layers)),
        num_microbatches=num_microbatches,
        layers_per_stage=layers,
        execution=dpj.Execution(overlap=True),
    )
    jax.jit(grad_fn).trace(make_params(sum(layers)), make_batch(num_microbatches))
    assert found == orders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("letters", "num_ranks", "num_microbatches", "options", "num_pairs"),
    [
        ("DDMMDMSM", 4, 10, {}, 3),  # stages of one kind, and of two
        # One stage has two layers more than the others: some meet nothing.
        ("DMMMMM", 2, 8, {"layers_per_stage": (4, 2), "remat": "block"}, 3),
        ("MMMMMMMM", 2, 8, {"layers_per_stage": (5, 3)}, 2),
    ],
)
def test_layers_of_unlike_stages_stand_beside_each_other(
    monkeypatch: pytest.MonkeyPatch,
    letters: str,
    num_ranks: int,
    num_microbatches: int,
    options: dict[str, Any],
    num_pairs: int,
) -> None:
    """F of each kind beside I of each kind that it meets on some rank."""
    monkeypatch.setattr(rank, "platform_of", lambda mesh: "tpu")
    met = []
    loop_pairs = Stages.loop_pairs

    def spy(self: Stages, chunks: Any, *args: Any) -> Any:
        met.append(self.pairs(*chunks))
        return loop_pairs(self, chunks, *args)

    monkeypatch.setattr(Stages, "loop_pairs", spy)
    model = make_kinds(letters, frozenset(["block_has_aux"]))
    params, batch = make_kinds_params(letters), make_batch(num_microbatches)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(num_ranks),
        num_microbatches=num_microbatches,
        execution=dpj.Execution(overlap=True, split_backward=True),
        **options,
    )
    rng = make_key(5)
    sequential = dpj.sequential(model, num_microbatches=num_microbatches)

    def both(params: Any, batch: Any) -> Any:
        reference = jax.value_and_grad(sequential, allow_int=True)
        return grad_fn(params, batch, rng=rng), reference(params, batch, rng=rng)

    got, want = jax.jit(both)(params, batch)
    assert_close(got, want)
    # In both beats of a trip, as the mirror holds the same stages.
    assert {len(pairs) for pairs in met} == {num_pairs}


@pytest.mark.parametrize(("unroll", "num_pairs"), [(True, 3), (False, 1)])
def test_residuals_of_f_wait_until_its_pair_is_done(
    monkeypatch: pytest.MonkeyPatch, unroll: bool, num_pairs: int
) -> None:
    """Else a GPU's compiler writes it where a matmul should hide an exchange."""
    monkeypatch.setattr(rank, "platform_of", lambda mesh: "cuda")
    made, waiting = [], []
    run_forward = LayerWork._forward

    def make(self: LayerWork, *args: Any) -> Any:
        out = run_forward(self, *args)
        made.append(jax.tree.leaves(out[2:]))
        return out

    def wait(values: Any, others: Any) -> Any:
        # Before it the layer's y and the other one's dx are known.
        if len(jax.tree.leaves(others)) >= 2:
            waiting.extend(jax.tree.leaves(values))
        return values

    monkeypatch.setattr(LayerWork, "_forward", make)
    monkeypatch.setattr(barriers, "wait_for", wait)
    grad_fn = dpj.value_and_grad(
        make_model(frozenset()),
        mesh=make_mesh(2),
        num_microbatches=8,
        execution=dpj.Execution(overlap=True, unroll=unroll),
    )
    jax.jit(grad_fn).trace(make_params(6), make_batch(8))
    ids = set(map(id, waiting))
    waited = [kept for kept in made if kept and ids.issuperset(map(id, kept))]
    # In both beats of a trip; in the ticks around them nothing waits.
    assert len(waited) == 2 * num_pairs < len(made)
