"""The mixture of experts: exact wherever its experts are, balanced, and nothing lost unseen."""

import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from jax import P, lax

import dualpipe_jax as dpj
from experiments.compiled.compiles import compile_case
from experiments.deepseek_mini import balance, dispatch, model, preflight, routing
from experiments.deepseek_mini.deepseek_mini import main
from experiments.deepseek_mini.layers import LatentAttention, rotate
from experiments.deepseek_mini.model import DeepSeekMini
from experiments.train_lm.trainer.log import read_rows
from tests.models import assert_close

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HIDDEN, EXPERTS, CHOSEN, TOKENS = 4, 5, 8, 3, 6
TINY = DeepSeekMini(
    dense_layers=1,
    expert_layers=2,
    width=8,
    heads=2,
    head_size=4,
    rotary_size=2,
    latent_size=4,
    query_latent_size=6,
    hidden=12,
    experts=EXPERTS,
    chosen=CHOSEN,
    expert_hidden=HIDDEN,
    scale=1.5,
    balance_loss=0.1,
    vocabulary=11,
)


# --- dispatch --------------------------------------------------------------------------------


def tokens_and_kernels(num_tokens: int) -> tuple[jax.Array, jax.Array, dispatch.Kernels]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    kernels = {
        "gate": normal(EXPERTS, WIDTH, HIDDEN),
        "up": normal(EXPERTS, WIDTH, HIDDEN),
        "down": normal(EXPERTS, HIDDEN, WIDTH),
    }
    # Some experts are liked by most tokens, and one by none.
    logits = normal(num_tokens, EXPERTS) + jnp.asarray([2.0, 1, 0, 0, 0, 0, -1, -50])
    return normal(num_tokens, WIDTH), logits, kernels


def routed(logits: jax.Array) -> routing.Routing:
    affinities = jax.nn.sigmoid(logits)
    return routing.route(affinities, jnp.zeros(EXPERTS), num_chosen=CHOSEN, scale=1.5)


def plain_loss(x: jax.Array, logits: jax.Array, kernels: dispatch.Kernels) -> jax.Array:
    return jnp.sin(dispatch.every_expert(x, routed(logits), kernels)).sum()


def output_of(mode: str, axis: str | None = None) -> Callable[..., jax.Array]:
    def output(x: jax.Array, logits: jax.Array, kernels: dispatch.Kernels) -> jax.Array:
        where: Any = {"num_experts": EXPERTS, "axis": axis}
        if mode == "capacity":
            # Room for all: none chooses an expert twice.
            y, dropped = dispatch.with_capacity(
                x, routed(logits), kernels, capacity=len(x), **where
            )
            return y + dropped
        return dispatch.dropless(x, routed(logits), kernels, is_ragged=mode == "ragged", **where)

    return output


def loss_of(output: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args: jnp.sin(output(*args)).sum()


def on_devices(
    loss: Callable[..., jax.Array], num_devices: int, *, num_data: int = 1
) -> Callable[..., jax.Array]:
    """A loss over the axis "expert": tokens over all devices, experts over those of this axis."""
    mesh = jax.make_mesh(
        (num_data, num_devices),
        ("data", "expert"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[: num_data * num_devices],
    )
    axes = ("data", "expert")
    return jax.shard_map(
        lambda *args: lax.psum(loss(*args), axes),
        mesh=mesh,
        in_specs=(P(axes), P(axes), P("expert")),
        out_specs=P(),
    )


def grads_of(loss: Callable[..., jax.Array], *args: Any) -> Any:
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*args)


def test_every_expert_is_the_plain_meaning() -> None:
    """Against a Python loop over tokens and their experts."""
    x, logits, kernels = tokens_and_kernels(TOKENS)
    affinities = 1 / (1 + np.exp(-np.asarray(logits)))
    want = np.zeros((TOKENS, WIDTH))
    for t in range(TOKENS):
        chosen = np.argsort(-affinities[t])[:CHOSEN]
        for e in chosen:
            gate, up = np.asarray(x[t] @ kernels["gate"][e]), np.asarray(x[t] @ kernels["up"][e])
            out = (gate / (1 + np.exp(-gate)) * up) @ np.asarray(kernels["down"][e])
            want[t] += 1.5 * affinities[t, e] / affinities[t, chosen].sum() * out
    got = dispatch.every_expert(x, routed(logits), kernels)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", ["capacity", "dropless"])
def test_modes_equal_every_expert(mode: str) -> None:
    args = tokens_and_kernels(TOKENS)
    assert_close(grads_of(loss_of(output_of(mode)), *args), grads_of(plain_loss, *args))


@pytest.mark.parametrize(("num_devices", "num_data"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("mode", ["capacity", "dropless", "ragged"])
def test_experts_over_devices_equal_every_expert(
    mode: str, num_devices: int, num_data: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged exchanges, which CPUs do not run, with a stand-in that has their meaning."""
    args = tokens_and_kernels(TOKENS * num_devices * num_data)
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    loss = loss_of(output_of(mode, "expert"))
    got = grads_of(on_devices(loss, num_devices, num_data=num_data), *args)
    assert_close(got, grads_of(plain_loss, *args))


@pytest.mark.parametrize("mode", ["capacity", "dropless", "ragged"])
def test_tokens_may_be_the_same_on_all_devices_of_the_experts(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    mesh = jax.make_mesh(
        (2, 2), ("data", "expert"), (jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    loss = loss_of(output_of(mode, "expert"))
    spread = jax.shard_map(
        lambda *args: lax.pmean(lax.psum(loss(*args), "data"), "expert"),
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("expert")),
        out_specs=P(),
    )
    args = tokens_and_kernels(TOKENS * 2)
    assert_close(grads_of(spread, *args), grads_of(plain_loss, *args))


def test_contents_of_rows_that_nobody_sent_do_not_matter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With grouped matmuls that multiply all rows by zero or one, so that NaN times zero shows."""

    def ragged_dot(x: jax.Array, kernels: jax.Array, sizes: jax.Array) -> jax.Array:
        group = (jnp.arange(len(x))[:, None] >= jnp.cumsum(sizes)).sum(-1)
        return jnp.einsum("rd,re,edh->rh", x, jax.nn.one_hot(group, len(sizes)), kernels)

    args = tokens_and_kernels(TOKENS * 2)
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(lax, "ragged_dot", ragged_dot)
    got = grads_of(on_devices(loss_of(output_of("ragged", "expert")), 2), *args)
    assert_close(got, grads_of(plain_loss, *args))


def test_ragged_exchanges_keep_the_axes_over_which_tokens_vary() -> None:
    """Traced with the exchange itself, whose result varies over its operands' axes."""
    loss = on_devices(loss_of(output_of("ragged", "expert")), 2, num_data=2)
    args = tokens_and_kernels(TOKENS * 4)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*args)
    assert traced.out_info[0].shape == args[0].shape


def test_gates_of_16_bits_are_exchanged_in_32() -> None:
    x, logits, kernels = tokens_and_kernels(TOKENS * 2)

    def loss(x: jax.Array, logits: jax.Array, kernels: dispatch.Kernels) -> jax.Array:
        routes = routed(logits)
        narrow = routes._replace(gates=routes.gates.astype(jnp.bfloat16))
        y = dispatch.dropless(x, narrow, kernels, num_experts=EXPERTS, axis="expert")
        return jnp.sin(y).sum()

    routes = routed(logits)
    rounded = routes._replace(gates=routes.gates.astype(jnp.bfloat16).astype(x.dtype))
    got = jax.jit(on_devices(loss, 2))(x, logits, kernels)
    want = jnp.sin(dispatch.every_expert(x, rounded, kernels)).sum()
    np.testing.assert_allclose(got, want, rtol=1e-12)


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis_name: str,
) -> jax.Array:
    """Exchanges as the documentation of `jax.lax.ragged_all_to_all` says, row by row.

    The contents of rows that nobody sent are not to be used.
    """
    output = jnp.full_like(output, jnp.nan)
    me = lax.axis_index(axis_name)
    sent, starts, sizes, targets = (
        lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)
    )
    total = jnp.zeros((), jnp.int32)
    for source in range(lax.axis_size(axis_name)):
        start, size, target = (a[source, me] for a in (starts, sizes, targets))
        row = jnp.arange(len(output)) - target
        is_sent = (row >= 0) & (row < size)
        taken = sent[source].at[jnp.where(is_sent, start + row, 0)].get(mode="clip")
        output = jnp.where(is_sent[:, None], taken, output)
        # Both sides know how much is sent.
        total += jnp.abs(size - recv_sizes[source])
    return jnp.where(total == 0, output, jnp.nan)


@pytest.mark.parametrize("is_remat", [False, True], ids=["stored", "rematerialised"])
@pytest.mark.parametrize(("platform", "kind"), [("tpu", "ragged"), ("cpu", "dense")])
def test_exchanges_are_ragged_where_the_platform_has_it(
    platform: str, kind: str, is_remat: bool
) -> None:
    """Lowered for it: tokens there and back, and their cotangents, four in all.

    One exchange of gates, sizes and offsets, all as bits, serves all four; the gates' cotangents
    have one of their own. A backward that recomputes sends tokens and gates there once more, but
    nothing back.
    """
    mode = "ragged" if dispatch.has_ragged(platform) else "dropless"
    output = output_of(mode, "expert")
    loss = loss_of(jax.checkpoint(output) if is_remat else output)
    step = jax.value_and_grad(on_devices(loss, 2), argnums=(0, 1, 2))
    args = tokens_and_kernels(TOKENS * 2)
    program = jax.jit(step).trace(*args).lower(lowering_platforms=(platform,))
    lines = program.as_text().splitlines()
    exchanges = [line for line in lines if "stablehlo.all_to_all" in line]
    rows = f"x{WIDTH}xf64>"
    found = {
        "ragged": sum("ragged_all_to_all" in line for line in lines),
        "dense": sum(rows in line for line in exchanges),
        "bits": sum("xi32>" in line for line in exchanges),
        "cotangents": sum("xf64>" in line and rows not in line for line in exchanges),
    }
    assert found == {
        "ragged": 4 + is_remat if kind == "ragged" else 0,
        "dense": 4 + is_remat if kind == "dense" else 0,
        "bits": 1 + is_remat,
        "cotangents": 1,
    }


@pytest.mark.parametrize("num_devices", [1, 2])
def test_capacity_drops_the_smallest_gates_and_counts_them(num_devices: int) -> None:
    capacity = 2
    x, logits, kernels = tokens_and_kernels(TOKENS * num_devices)
    routes = routed(logits)
    experts, gates = np.asarray(routes.experts), np.array(routes.gates)
    want_dropped = 0
    for shard in np.split(np.arange(len(x)), num_devices):
        for e in range(EXPERTS):
            tokens, places = np.nonzero(experts[shard] == e)
            rank = np.argsort(-gates[shard][tokens, places])
            late = rank[capacity:]
            gates[shard[tokens[late]], places[late]] = 0
            want_dropped += len(late)
    assert want_dropped > 5

    def plain(x: jax.Array, kernels: dispatch.Kernels) -> tuple[jax.Array]:
        kept = routing.Routing(routes.experts, jnp.asarray(gates))
        return (dispatch.every_expert(x, kept, kernels),)

    axis = "expert" if num_devices > 1 else None

    def run(x: jax.Array, routes: routing.Routing, kernels: dispatch.Kernels) -> Any:
        y, dropped = dispatch.with_capacity(
            x, routes, kernels, num_experts=EXPERTS, capacity=capacity, axis=axis
        )
        return y, dropped if axis is None else lax.psum(dropped, axis)

    if axis is not None:
        mesh = jax.make_mesh(
            (num_devices,), (axis,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
        )
        run = jax.shard_map(run, mesh=mesh, in_specs=P(axis), out_specs=(P(axis), P()))

    def with_grads(function: Callable[..., Any]) -> Any:
        def loss(x: jax.Array, kernels: dispatch.Kernels) -> Any:
            y, *dropped = function(x, kernels)
            return jnp.sin(y).sum(), (y, *dropped)

        (_, outputs), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, kernels)
        return outputs, grads

    (y, dropped), grads = with_grads(lambda x, kernels: run(x, routes, kernels))
    assert dropped == want_dropped
    assert_close(((y,), grads), with_grads(plain))


def test_capacity_is_rounded_up() -> None:
    sizes = {"num_chosen": 2, "num_experts": 8}
    assert dispatch.capacity_of(10, factor=1.0, **sizes) == 3
    assert dispatch.capacity_of(16, factor=1.25, **sizes) == 5


# --- routing ---------------------------------------------------------------------------------


def test_the_bias_chooses_and_does_not_weigh() -> None:
    affinities = jnp.asarray([[0.9, 0.5, 0.4, 0.1]])
    bias = jnp.asarray([0.0, 0.0, 0.2, 0.0])

    def route(bias: jax.Array) -> routing.Routing:
        return routing.route(affinities, bias, num_chosen=2, scale=2.0)

    np.testing.assert_array_equal(route(jnp.zeros(4)).experts, [[0, 1]])
    got = route(bias)
    np.testing.assert_array_equal(got.experts, [[0, 2]])
    np.testing.assert_allclose(got.gates, [[2 * 0.9 / 1.3, 2 * 0.4 / 1.3]], rtol=1e-14)
    np.testing.assert_array_equal(routing.loads(got, 4), [1, 0, 1, 0])
    assert not jax.grad(lambda bias: route(bias).gates[0, 1])(bias).any()


def test_sequence_loss_is_the_reports_formula() -> None:
    rng = np.random.default_rng(0)
    s = rng.uniform(size=(2, 5, 4))
    want = 0.0
    for sequence in s:
        for i in range(4):
            is_top = [i in np.argsort(-token)[:2] for token in sequence]
            f = 4 / (2 * 5) * sum(is_top)
            p = sum(token[i] / token.sum() for token in sequence) / 5
            want += f * p / 2
    got = routing.sequence_loss(jnp.asarray(s), num_chosen=2)
    np.testing.assert_allclose(got, want, rtol=1e-13)


def test_the_bias_moves_against_the_load() -> None:
    load = jnp.asarray([[5, 1, 3, 3], [0, 0, 0, 8]])
    got = routing.balanced(jnp.full((2, 4), 0.5), load, rate=0.1)
    np.testing.assert_allclose(got, [[0.4, 0.6, 0.5, 0.5], [0.6, 0.6, 0.6, 0.4]])
    params = {"router": {"bias": jnp.zeros((2, 4)), "kernel": jnp.ones((2, 4))}}
    assert model.is_trained(params) == {"router": {"bias": False, "kernel": True}}
    moved = model.balance(params, load, rate=0.1)
    np.testing.assert_allclose(moved["router"]["bias"], got - 0.5)
    np.testing.assert_array_equal(moved["router"]["kernel"], 1)


# --- attention and the head ------------------------------------------------------------------


def random_params(init: Callable[..., Any], *args: Any) -> Any:
    """Makes parameters in float64, the gains of norms around 1."""
    rng = np.random.default_rng(0)

    def normal(path: Any, leaf: Any) -> jax.Array:
        middle = 1.0 if path[-1].key in ("scale", "gain") else 0.0
        return jnp.asarray(middle + 0.3 * rng.normal(size=leaf.shape))

    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree_util.tree_map_with_path(normal, shapes)


def test_rotary_products_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 6))) for _ in range(2))
    turned = [rotate(jnp.broadcast_to(a, (1, 7, 1, 6)))[0, :, 0] for a in (query, key)]
    products = np.asarray(turned[0] @ turned[1].T)
    assert products[5, 2] != pytest.approx(products[5, 3])
    np.testing.assert_allclose(products[5, 2], products[4, 1], rtol=1e-12)
    np.testing.assert_allclose(products[3, 3], (query @ key[0, 0, 0]).item(), rtol=1e-12)


def test_latent_attention_head_by_head() -> None:
    """Each head by itself: query and key with position are put behind those without."""
    attention = LatentAttention(
        heads=2, head_size=4, rotary_size=2, latent_size=3, query_latent_size=5
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 4, 8)))
    params = random_params(attention.init, x)["params"]

    given = jax.tree.map(np.asarray, params)
    shared_key, *rotary = _rotary(given, np.asarray(x[0]))
    latent, of_query = (
        _rms_norm(np.asarray(x[0]) @ given[name]["kernel"], given[norm]["scale"])
        for name, norm in (("latent", "latent_norm"), ("query_latent", "query_norm"))
    )
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        query = np.concatenate([of_query @ given["query"]["kernel"][:, part], rotary[head]], -1)
        key = np.concatenate([latent @ given["key"]["kernel"][:, part], shared_key], -1)
        logits = query @ key.T / np.sqrt(6) + np.where(np.tril(np.ones((4, 4))), 0, -np.inf)
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        heads.append(weights @ latent @ given["value"]["kernel"][:, part])
    want = np.concatenate(heads, -1) @ given["out"]["kernel"]
    got = jax.jit(attention.apply)({"params": params}, x)
    np.testing.assert_allclose(np.asarray(got)[0], want, rtol=1e-12, atol=1e-14)


def _rotary(given: Any, x: np.ndarray) -> np.ndarray:
    """The shared key, then each head's query: [3, length, 2]."""
    latent = _rms_norm(x @ given["query_latent"]["kernel"], given["query_norm"]["scale"])
    queries = latent @ given["rotary_query"]["kernel"]
    both = np.concatenate([x @ given["rotary_key"]["kernel"], queries], -1)
    # A pair of dims is one complex number; with two dims there is one speed, 1.
    pairs = both.reshape(len(x), 3, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * np.arange(len(x)))[:, None]
    return np.stack([turned.real, turned.imag], -1).swapaxes(0, 1)


def _rms_norm(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return values / np.sqrt(np.square(values).mean(-1, keepdims=True) + 1e-6) * scale


class LooksBack(nn.Module):
    """Stands for a transformer block: adds up the tokens so far."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.cumsum(x, 1) * self.param("gain", nn.initializers.ones, ())


def test_multi_token_prediction_shares_embedding_and_output() -> None:
    ends = model.Ends(width=8, layer=LooksBack(), vocabulary=11)
    rng = np.random.default_rng(2)
    text, x = jnp.asarray(rng.integers(0, 11, (2, 6))), jnp.asarray(rng.normal(size=(2, 5, 8)))
    params = random_params(ends.init, text)["params"]

    given = jax.tree.map(np.asarray, params)

    def norm(name: str, values: np.ndarray) -> np.ndarray:
        return _rms_norm(values, given[name]["scale"])

    def cross_entropy(hidden: np.ndarray, labels: np.ndarray) -> np.ndarray:
        logits = hidden @ given["output"]["kernel"]
        picked = np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return (np.log(np.exp(logits).sum(-1)) - picked).mean()

    # Position i has h_i and the embedding of t_{i+1}, and predicts t_{i+2}.
    hidden, tokens = np.asarray(x), np.asarray(text)
    following = given["embedding"]["embedding"][tokens[:, 1:]]
    both = np.concatenate([norm("hidden_norm", hidden), norm("next_norm", following)], -1)
    deeper = np.cumsum(both @ given["projection"]["kernel"], 1) * given["layer"]["gain"]
    want = {
        "main": cross_entropy(norm("norm", hidden), tokens[:, 1:]),
        "mtp": cross_entropy(norm("deeper_norm", deeper[:, :4]), tokens[:, 2:]),
    }
    got: Any = jax.jit(functools.partial(ends.apply, method="losses"))({"params": params}, x, text)
    for name, loss in want.items():
        np.testing.assert_allclose(got[name], loss, rtol=1e-12)


# --- the whole model -------------------------------------------------------------------------


NUM_MICROBATCHES = 8  # on all devices of the experts
MODELS = {
    "dropless": TINY,
    "capacity": replace(TINY, dense_layers=0, expert_layers=2, capacity_factor=0.7),
}


@functools.cache
def expected(name: str) -> Any:
    """Makes parameters and a batch, and the sequential model's loss and gradients of them."""
    params = random_params(MODELS[name].init)
    batch = np.random.default_rng(3).integers(0, 11, size=(2 * NUM_MICROBATCHES, 6))
    loss_fn = dpj.sequential(MODELS[name].for_pipeline(), num_microbatches=NUM_MICROBATCHES)
    return params, batch, jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks", "num_devices", "schedule"),
    [
        ("dropless", 1, 2, "gpipe"),
        ("dropless", 2, 4, "dualpipe"),
        ("capacity", 2, 2, "1f1b"),
    ],
)
def test_equals_sequential(name: str, ranks: int, num_devices: int, schedule: str) -> None:
    """Over ranks and experts, dropped choices included: loss, metrics, gradients."""
    sizes = MODELS[name]
    params, batch, want = expected(name)
    mesh = jax.make_mesh(
        (ranks, num_devices), ("pipe", "expert"), devices=jax.devices()[: ranks * num_devices]
    )
    options: Any = {
        "mesh": mesh,
        "num_microbatches": NUM_MICROBATCHES // num_devices,
        "batch_axes": "expert",
        "manual_axes": "expert",
        "param_specs": sizes.param_specs(params, "expert"),
    }
    pipelined = sizes.for_pipeline("expert")
    grad_fn = dpj.value_and_grad(
        pipelined, schedule=schedule, trainable=model.is_trained, **options
    )
    got = jax.jit(grad_fn)(params, batch)
    assert_close(got, want)
    metrics = got[0][1].blocks["experts"]
    num_choices = batch[:, 1:].size * CHOSEN
    np.testing.assert_array_equal(metrics["load"].sum(-1), [num_choices] * sizes.expert_layers)
    is_short = sizes.capacity_factor is not None
    np.testing.assert_array_equal(np.asarray(metrics["dropped"]) > 0, is_short)
    if ranks == 1:
        assert_close(jax.jit(dpj.evaluate(pipelined, **options))(params, batch), want[0])


def test_experts_that_do_not_divide_are_refused() -> None:
    sizes = replace(TINY, experts=6)
    blocks: Any = sizes.for_pipeline("expert").block
    layer = blocks["experts"]
    params = jax.tree.map(lambda a: a[0], random_params(sizes.init)["blocks"]["experts"])
    mesh = jax.make_mesh((4,), ("expert",), devices=jax.devices()[:4])
    run = jax.shard_map(lambda x: layer(params, x, None)[0], mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"experts=6: must be divisible by the 4 devices .*mesh"):
        jax.eval_shape(run, jnp.zeros((1, 3, 8)))


@pytest.mark.slow
def test_preflight_counts_the_exchanges_of_the_steady_loop() -> None:
    """Compiled for CPUs, which hide nothing."""
    case = preflight.Case(
        label="tiny",
        sizes=replace(TINY, dense_layers=0, expert_layers=2, capacity_factor=1.0),
        rows=1,
        context=4,
        num_microbatches=6,
        topology="cpu:4",
        axes={"pipe": 2, "expert": 2},
    )
    figures = compile_case(case)
    assert figures.loop == "steady"
    line = preflight.describe("tiny", figures)
    # Two beats of a layer: tokens go there and back, in the backward there once more, and their
    # cotangents there and back (five); gates there, again, and their cotangents back (three).
    # Over two ranks only one beat sends anything.
    assert "16 all-to-all (0 asynchronous, 0 hidden)" in line
    assert "2 collective-permute (0 asynchronous, 0 hidden)" in line


# --- the script ------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_learns_balances_and_leaves_its_files(tmp_path: Path) -> None:
    flags = (
        "--layers 3 --dense-layers 1 --width 16 --heads 2 --context 16 --batch-size 8 --experts 4 "
        "--microbatches 2 --steps 200 --eval-every 100 --eval-batches 2 --learning-rate 0.01 "
        "--save-every 100 --bias-rate 0.02 --capacity-factor 1 --schedule 1f1b"
    )
    output = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.deepseek_mini.deepseek_mini", *flags.split()]
    done = subprocess.run(
        [*command, "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "x the mean load" in done.stdout
    assert {path.name for path in (output / "checkpoints").iterdir()} == {"100", "200"}
    rows = read_rows(output / "log.csv")
    assert [row["step"] for row in rows] == list(range(201))

    def column(name: str) -> np.ndarray:
        return np.array([row[name] for row in rows if row[name] is not None], float)

    held_out = column("held_out_loss")
    assert len(held_out) == 3  # at steps 0, 100 and 200
    # An untrained model knows nothing: ln 256 = 5.545.
    assert held_out[0] == pytest.approx(np.log(256), abs=0.2)
    assert held_out[-1] < 3.3
    for name in ("main_loss", "mtp_loss"):
        assert column(name)[0] == pytest.approx(np.log(256), abs=0.3)
        assert column(name)[-5:].mean() < 3.3
    # The loss that is trained: both, and the small loss of balance.
    both = column("main_loss") + 0.3 * column("mtp_loss")
    np.testing.assert_allclose(column("train_loss"), both, atol=2e-3)
    loads = np.stack([column(f"load_{index}") for index in range(4)])
    np.testing.assert_allclose(loads.mean(0), 1, rtol=1e-6)
    # Four experts, two a token: the worst that can be is twice the mean. Seen in the last 50 steps:
    # 1.30, and 1.95 with the bias left where it is.
    assert column("worst_load")[-50:].mean() < 1.6
    assert 0 < column("dropped")[-50:].sum() < 0.8 * column("dropped")[50:100].sum()
    balance.main([str(output), "--output", str(tmp_path)])
    for path in (output / "training.png", tmp_path / "training.png"):
        assert matplotlib.image.imread(path)[..., :3].std() > 0.05


BAD = {
    "--schedule 2f2b": ["--schedule", "2f2b", "dualpipe"],
    "--experts 7": ["--experts 7", "--expert-devices 2"],
    "--chosen 9": ["--chosen 9", "--experts 8"],
    "--dense-layers 8": ["--dense-layers 8", "fewer than --layers 8"],
    "--width 60": ["--width 60", "4 x --heads 4"],
    "--batch-size 12": ["--batch-size 12", "8"],
    "--ranks 8 --microbatches 8": ["--ranks x --expert-devices = 16", "8 x cpu"],
    "--bias-rate -1": ["--bias-rate", "-1"],
    "--preflight tpu:v9:2x2": ["tpu:v9:2x2"],
}


@pytest.mark.parametrize("args", BAD, ids=str)
def test_bad_flags_are_refused(args: str, refusal: Callable[..., str]) -> None:
    line = refusal(main, args.split(), name="deepseek_mini")
    for words in BAD[args]:
        assert words in line
