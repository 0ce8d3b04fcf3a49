"""Models as users write them, through `from_loss` alone: gradients equal `jax.value_and_grad`.

Every model runs in `sequential`, some in the pipeline, in float64; the reference is the mean over
microbatches m of `loss_fn(params, microbatch_m, fold_in(rng, m))`.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dualpipe_jax as dpj

WIDTH, VOCABULARY, LENGTH, LAYERS, ROWS = 8, 7, 6, 4, 2
MICROBATCHES = 2
KEY = jax.random.key(3)
LossFn = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A loss, its parameters, and the arguments of `from_loss`."""

    loss_fn: LossFn
    params: Any
    layers: Any = "layers_{}"
    has_rng: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    num_kinds: int = 1


def normal(name: str, *shape: int) -> jax.Array:
    seed = sum(map(ord, name)) + 31 * len(name)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape)) / 3


def layer_params(i: int) -> dict[str, jax.Array]:
    return {
        "norm": 1 + normal(f"norm{i}", WIDTH),
        **{name: normal(f"{name}{i}", WIDTH, WIDTH) for name in ("q", "k", "v")},
        "up": normal(f"up{i}", WIDTH, 2 * WIDTH),
        "down": normal(f"down{i}", 2 * WIDTH, WIDTH),
    }


def norm(x: jax.Array, scale: Any = 1.0) -> jax.Array:
    return x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def attend(p: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
    q, k, v = (norm(x, p["norm"]) @ p[name] for name in ("q", "k", "v"))
    scores = jnp.where(mask, jnp.einsum("btd,bsd->bts", q, k), -1e9)
    return jax.nn.softmax(scores) @ v


def transform(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]


def layer(p: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
    x = x + attend(p, x, mask)
    return x + transform(p, x)


def causal() -> jax.Array:
    return jnp.tril(jnp.ones((LENGTH, LENGTH), bool))


def ends_params() -> dict[str, jax.Array]:
    return {"embed": normal("embed", VOCABULARY, WIDTH), "final": 1 + normal("final", WIDTH)}


def cross_entropy(params: Any, x: jax.Array, batch: Any) -> jax.Array:
    logits = norm(x, params["final"]) @ params["embed"].T
    scores = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(scores, batch["targets"][..., None], -1).mean()


def named_params() -> dict[str, Any]:
    return {**ends_params(), **{f"layers_{i}": layer_params(i) for i in range(LAYERS)}}


def stacked_params() -> dict[str, Any]:
    layers = [layer_params(i) for i in range(LAYERS)]
    return {**ends_params(), "blocks": jax.tree.map(lambda *a: jnp.stack(a), *layers)}


def scaled_stack() -> dict[str, Any]:
    return {**stacked_params(), "scales": 1 + normal("scales", LAYERS)}


def over_names(run: Callable[..., jax.Array], *, wrap: Any = lambda f: f) -> LossFn:
    """Makes a loss whose layers are `run(p, x, mask, i, rng)`."""

    def loss_fn(params: Any, batch: Any, rng: Any = None) -> jax.Array:
        def all_layers(layers: Any, x: jax.Array) -> jax.Array:
            for i in range(LAYERS):
                x = wrap(run)(layers[f"layers_{i}"], x, causal(), i, rng)
            return x

        x = params["embed"][batch["tokens"]]
        return cross_entropy(params, all_layers(params, x), batch)

    return loss_fn


def checkpoint(run: Callable[..., jax.Array]) -> Any:
    """As users write it in the loop over layers, with a policy made anew for each."""
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names("attention")
    both = policies.save_from_both_policies(policies.dots_saveable, named)
    return jax.checkpoint(run, static_argnums=3, policy=both)


def plain(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    return layer(p, x, mask)


def post_norm(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    return norm(x + transform(p, norm(x + attend(p, x, mask))), p["norm"])


def linear_by_turns(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    """The last layer begins as the linear ones do."""
    y = x @ p["q"] + p["norm"]
    return x + jnp.tanh(y) if i % 2 else y


def longer_by_turns(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    """The last layer begins as a whole other one, and goes on with a parameter of its own."""
    x = x + p["norm"]
    return x @ p["q"] if i % 2 else x


def drop(x: jax.Array, key: jax.Array, rate: Any = 0.3) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)


def with_folded_key(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    return x + drop(layer(p, x, mask), jax.random.fold_in(rng, i))


def with_split_key(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    return x + drop(layer(p, x, mask), jax.random.split(rng, LAYERS)[i])


def stochastic_depth(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    rate = 0.05 * i
    keep = jax.random.bernoulli(jax.random.fold_in(rng, i), 1 - rate, (x.shape[0], 1, 1))
    return x + keep * layer(p, x, mask) / (1 - rate)


def windows_by_turns(p: Any, x: Any, mask: Any, i: int, rng: Any) -> jax.Array:
    """A window of a size of its own, in every second layer of earlier positions alone."""
    distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)[None]
    return layer(p, x, (mask if i % 2 else jnp.ones_like(mask)) & (distance < 1 + i))


def key_chain(params: Any, batch: Any, rng: Any) -> jax.Array:
    x = params["embed"][batch["tokens"]]
    for i in range(LAYERS):
        rng, key = jax.random.split(rng)
        x = x + drop(layer(params[f"layers_{i}"], x, causal()), key)
    return cross_entropy(params, x, batch)


def scan_with_keys(params: Any, batch: Any, rng: Any) -> jax.Array:
    def step(x: Any, at: Any) -> Any:
        p, key = at
        return x + drop(layer(p, x, causal()), key), None

    keys = jax.random.split(rng, LAYERS)
    x = lax.scan(step, params["embed"][batch["tokens"]], (params["blocks"], keys))[0]
    return cross_entropy(params, x, batch)


def scan(params: Any, batch: Any) -> jax.Array:
    """A parameter outside of the layers has a row for each of them."""

    def step(x: Any, at: Any) -> Any:
        p, scale = at
        return layer(p, x * scale, causal()), None

    x = lax.scan(step, params["embed"][batch["tokens"]], (params["blocks"], params["scales"]))[0]
    return cross_entropy(params, x, batch)


def scan_of_scans(params: Any, batch: Any) -> jax.Array:
    """Two layers in each step, of a stack that is scaled by a row of constants; a penalty."""
    rates = jnp.linspace(0.5, 1, LAYERS)
    blocks = jax.tree.map(
        lambda a: (a * rates.reshape(-1, *(1,) * (a.ndim - 1))).reshape(2, -1, *a.shape[1:]),
        params["blocks"],
    )
    inner = lambda x, p: (layer(p, x, causal()), None)  # noqa: E731
    step = lambda x, pair: (lax.scan(inner, x, pair)[0], None)  # noqa: E731
    x = lax.scan(step, params["embed"][batch["tokens"]], blocks)[0]
    return cross_entropy(params, x, batch) + penalty(params)


def scan_of_checkpoint(params: Any, batch: Any) -> jax.Array:
    halved = jax.tree.map(lambda a: a * 0.5, params["blocks"])
    step = jax.checkpoint(lambda x, p: (layer(p, x, causal()), None))
    x = lax.scan(step, params["embed"][batch["tokens"]], halved)[0]
    return cross_entropy(params, x, batch)


def indexed_stack(params: Any, batch: Any) -> jax.Array:
    x = params["embed"][batch["tokens"]]
    for i in range(LAYERS):
        x = layer(jax.tree.map(lambda a, i=i: a[i], params["blocks"]), x, causal())
    return cross_entropy(params, x, batch)


def checkpoint_over_all(params: Any, batch: Any) -> jax.Array:
    @jax.checkpoint
    def run(params: Any, x: jax.Array) -> jax.Array:
        for i in range(LAYERS):
            x = layer(params[f"layers_{i}"], x, causal())
        return x

    return cross_entropy(params, run(params, params["embed"][batch["tokens"]]), batch)


@jax.jit
def cast(params: Any, batch: Any) -> jax.Array:
    params = jax.tree.map(lambda a: (a * 2).astype(jnp.float64) / 2, params)
    return over_names(post_norm)(params, batch)


def shared_bias(params: Any, batch: Any) -> jax.Array:
    x = params["embed"][batch["tokens"]]
    time = jnp.tanh(batch["tokens"].mean(-1, keepdims=True) * params["time"])[:, None]
    for i in range(LAYERS):
        x = x * params["scales"][i]
        x = layer(params[f"layers_{i}"], x + params["bias"] ** 2 + time, causal())
    return cross_entropy(params, x, batch)


def padded(params: Any, batch: Any) -> jax.Array:
    """Masks that the batch decides, made once before all layers."""
    x = params["embed"][batch["tokens"]]
    mask = causal() & (batch["tokens"] > 0)[:, None, :] | jnp.eye(LENGTH, dtype=bool)
    for i in range(LAYERS):
        x = layer(params[f"layers_{i}"], x, mask)
    return cross_entropy(params, x, batch)


def contracted_features(params: Any, batch: Any) -> jax.Array:
    """Features of the batch that a contraction makes travel in x."""
    x = params["embed"][batch["tokens"]]
    one_hot = jax.nn.one_hot(batch["tokens"], VOCABULARY, dtype=x.dtype)
    features = one_hot @ jnp.cos(jnp.arange(VOCABULARY * WIDTH).reshape(VOCABULARY, WIDTH) * 1.0)
    for i in range(LAYERS):
        x = layer(params[f"layers_{i}"], x + features, causal())
    return cross_entropy(params, x, batch)


def encoder_decoder_params() -> dict[str, Any]:
    half = LAYERS // 2
    decoder = [{**layer_params(half + i), "c": normal(f"c{i}", WIDTH, WIDTH)} for i in range(half)]
    encoder = [layer_params(i) for i in range(half)]
    return {**ends_params(), "encoder": encoder, "decoder": decoder, "enc_norm": jnp.ones(WIDTH)}


def encoder_decoder(params: Any, batch: Any) -> jax.Array:
    memory = params["embed"][batch["tokens"]]
    for p in params["encoder"]:
        memory = layer(p, memory, jnp.ones((LENGTH, LENGTH), bool))
    memory = norm(memory, params["enc_norm"])
    x = params["embed"][batch["targets"]]
    for p in params["decoder"]:
        x = layer(p, x, causal()) + memory @ p["c"]
    return cross_entropy(params, x, batch)


def experts_params() -> dict[str, Any]:
    routers = {f"router{i}": normal(f"router{i}", WIDTH, 2) for i in range(LAYERS)}
    params = named_params()
    for i in range(LAYERS):
        params[f"layers_{i}"] |= {"router": routers[f"router{i}"]}
    return params


def expert_layer(p: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    probabilities = jax.nn.softmax(norm(x) @ p["router"])
    load = probabilities.mean((0, 1))
    x = layer(p, x, causal()) * probabilities[..., :1]
    return x, load


def experts(params: Any, batch: Any) -> Any:
    """Losses of layers and metrics, added up in the ways in which users do it."""
    x = params["embed"][batch["tokens"]]
    total, average = 0.0, 0.0
    losses, loads = [], []
    for i in range(LAYERS):
        x, load = expert_layer(params[f"layers_{i}"], x)
        loads.append(load)
        losses.append(jnp.square(load).sum())
        total = total + losses[-1]
        average = average + 0.1 * (losses[-1] - average)
    weights = np.linspace(1, 2, LAYERS)
    counts = [(load > 0.4).sum() for load in loads]
    loss = cross_entropy(params, x, batch) + 0.01 * (total + average + jnp.stack(losses).mean())
    loss += 0.02 * (weights * jnp.array(losses)).sum() + 0.03 * jnp.dot(weights, jnp.stack(losses))
    loss += 0.01 * jnp.var(jnp.stack(loads), -1).mean() - 0.01 * jnp.concatenate(loads).sum()
    metrics = {
        "total": lax.stop_gradient(total / LAYERS),
        "mean": jnp.stack(losses).mean(),
        "loads": jnp.stack(loads),
        "load": sum(loads) / LAYERS,
        "mean load": jnp.stack(loads).mean(0),
        "by layer": [{"load": load, "first": load[0]} for load in loads],
        "count": sum(counts),
        "counts so far": list(itertools.accumulate(counts)),
        "hundreds": jnp.stack([100 + count for count in counts]).astype(jnp.int8),
        "scaled": 1e-9 * sum(count.astype(jnp.float16).astype(float) for count in counts),
        "highest": jnp.stack(loads).argmax(-1) == 0,
        "norms": [jnp.abs(params[f"layers_{i}"]["router"]).sum() for i in range(LAYERS)],
        "loss": loss,
        "norm": jnp.square(x).sum(),
        "rows": jnp.int32(x.shape[0]),
    }
    return loss, metrics


def experts_in_scan(params: Any, batch: Any) -> Any:
    def step(carry: Any, p: Any) -> Any:
        x, total = carry
        x, load = expert_layer(p, x)
        total = {"loss": total["loss"] + jnp.square(load).sum(), "load": total["load"] + load}
        return (x, total), {"top": jnp.max(load), "load": load}

    total = {"loss": jnp.zeros(()), "load": jnp.zeros(2)}
    x = params["embed"][batch["tokens"]]
    (x, total), rows = lax.scan(step, (x, total), params["blocks"])
    loss = cross_entropy(params, x, batch) + 0.01 * total["loss"] + 0.1 * rows["top"].mean()
    loss += 0.01 * (jnp.arange(LAYERS) * rows["top"]).sum()
    return loss, {**total, "top": rows["top"].mean(), "loads": rows["load"]}


def stacked_experts() -> dict[str, Any]:
    params = experts_params()
    layers = [params[f"layers_{i}"] for i in range(LAYERS)]
    return {**ends_params(), "blocks": jax.tree.map(lambda *a: jnp.stack(a), *layers)}


def penalty(params: Any) -> Any:
    return 0.01 * sum(jnp.square(a).sum() for a in jax.tree.leaves(params))


def with_penalty(params: Any, batch: Any) -> jax.Array:
    return over_names(plain)(params, batch) + penalty(params)


def dense_then_experts_params() -> dict[str, Any]:
    params = experts_params()
    for i in range(2):
        params[f"layers_{i}"].pop("router")
    return params


def dense_then_experts(params: Any, batch: Any) -> jax.Array:
    x = params["embed"][batch["tokens"]]
    for i in range(LAYERS):
        p = params[f"layers_{i}"]
        x = expert_layer(p, x)[0] if "router" in p else layer(p, x, causal())
    return cross_entropy(params, x, batch)


def weighted(params: Any, batch: Any) -> Any:
    """With a weight the loss stays whole, also where a metric is the same sum."""
    x, total = params["embed"][batch["tokens"]], 0.0
    for i in range(LAYERS):
        x = layer(params[f"layers_{i}"], x, causal())
        total = total + jnp.square(x @ params[f"layers_{i}"]["q"]).mean()
    loss = (jnp.square(x).sum(-1) * (batch["targets"] > 1)).sum() + total
    return loss, {"loss": loss, "total": total}


def stopped(params: Any, batch: Any) -> Any:
    """A sum without a gradient, which is a metric as well; unsigned numbers below zero."""
    x, total, rest = params["embed"][batch["tokens"]], 0.0, np.uint8(9)
    for i in range(LAYERS):
        x = layer(params[f"layers_{i}"], x, causal())
        total = total + jnp.square(x @ params[f"layers_{i}"]["q"]).mean()
        rest = rest - (x > 0.5).sum().astype(jnp.uint8)
    total = lax.stop_gradient(total)
    return cross_entropy(params, x, batch) + total, {"total": total, "rest": rest}


def count_targets(batch: Any) -> jax.Array:
    return (batch["targets"] > 1).sum()


CASES: dict[str, Case] = {
    "named, a penalty on all parameters": Case(with_penalty, named_params()),
    "named, checkpoint a layer": Case(over_names(plain, wrap=checkpoint), named_params()),
    "checkpoint over all": Case(checkpoint_over_all, named_params()),
    "post-norm, cast first, one jit": Case(cast, named_params()),
    "scan": Case(scan, scaled_stack(), "blocks"),
    "scan of scans, scaled stack": Case(scan_of_scans, stacked_params(), "blocks"),
    "scan of checkpoint, changed stack": Case(scan_of_checkpoint, stacked_params(), "blocks"),
    "indexed stack": Case(indexed_stack, stacked_params(), "blocks"),
    "dropout, fold_in in a checkpoint": Case(
        over_names(with_folded_key, wrap=checkpoint),
        named_params(),
        has_rng=True,
    ),
    "dropout, split": Case(over_names(with_split_key), named_params(), has_rng=True),
    "dropout, chain": Case(key_chain, named_params(), has_rng=True),
    "dropout, scan over keys": Case(scan_with_keys, stacked_params(), "blocks", has_rng=True),
    "stochastic depth": Case(over_names(stochastic_depth), named_params(), has_rng=True),
    "windows, two masks by turns": Case(over_names(windows_by_turns), named_params()),
    "shared bias, time and scales of layers": Case(
        shared_bias,
        {
            **named_params(),
            "bias": normal("bias", WIDTH),
            "time": normal("time", WIDTH),
            "scales": 1 + normal("scales", LAYERS),
        },
    ),
    "linear layers by turns": Case(over_names(linear_by_turns), named_params(), num_kinds=2),
    "longer layers by turns": Case(over_names(longer_by_turns), named_params(), num_kinds=2),
    "mask of the batch": Case(padded, named_params()),
    "contracted features": Case(contracted_features, named_params()),
    "encoder and decoder": Case(
        encoder_decoder,
        encoder_decoder_params(),
        ["encoder/{}", "decoder/{}"],
        num_kinds=2,
    ),
    "experts": Case(experts, experts_params(), options={"has_aux": True}),
    "experts in a scan": Case(
        experts_in_scan, stacked_experts(), "blocks", options={"has_aux": True}
    ),
    "dense, then experts": Case(dense_then_experts, dense_then_experts_params(), num_kinds=2),
    "weight": Case(
        weighted,
        named_params(),
        options={"weight": count_targets, "has_aux": True},
    ),
    "a sum without a gradient": Case(
        stopped, named_params(), options={"has_aux": True, "max_kinds": 3}, num_kinds=3
    ),
}


def make_batch() -> dict[str, jax.Array]:
    generator = np.random.default_rng(0)
    shape = (ROWS * MICROBATCHES, LENGTH)
    return {
        name: jnp.asarray(generator.integers(0, VOCABULARY, shape))
        for name in ("tokens", "targets")
    }


def reference(case: Case, batch: Any) -> Any:
    """The meaning: microbatches one after the other."""

    def one(params: Any, microbatch: Any, m: Any) -> Any:
        key = (jax.random.fold_in(KEY, m),) if case.has_rng else ()
        out = case.loss_fn(params, microbatch, *key)
        return out if case.options.get("has_aux") else (out, ())

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        split = jax.tree.map(lambda a: a.reshape(MICROBATCHES, ROWS, *a.shape[1:]), batch)
        grad_fn = jax.value_and_grad(one, has_aux=True)
        (losses, metrics), grads = lax.map(
            lambda at: grad_fn(params, at[0], at[1]), (split, jnp.arange(MICROBATCHES))
        )
        weight = case.options.get("weight")
        total = MICROBATCHES if weight is None else weight(batch)
        loss, grads = jax.tree.map(lambda a: a.sum(0) / total, (losses, grads))
        metrics = jax.tree.map(lambda a: a.sum(0), metrics)
        return ((loss, metrics) if case.options.get("has_aux") else loss), grads

    return run(case.params, batch)


def make_model(case: Case, batch: Any) -> Any:
    microbatch = jax.tree.map(lambda a: jax.ShapeDtypeStruct((ROWS, *a.shape[1:]), a.dtype), batch)
    key = KEY if case.has_rng else None
    return dpj.from_loss(
        case.loss_fn, case.params, microbatch, layers=case.layers, rng=key, **case.options
    )


def assert_equal(found: Any, wanted: Any) -> None:
    """Float64 to its last digits: sums are in another order."""
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-13 * max(1, float(jnp.abs(b).max())))


# Those whose x, kinds or outputs are not the usual ones run under the pipeline as well.
PIPELINED = ("dropout, chain", "encoder and decoder", "experts", "experts in a scan")


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_loss(name: str) -> None:
    case, batch = CASES[name], make_batch()
    model = make_model(case, batch)
    assert len(model.cut.kinds) == case.num_kinds
    rng = KEY if case.has_rng else None
    wanted = reference(case, batch)
    run = dpj.sequential(model, num_microbatches=MICROBATCHES)
    has_aux = bool(case.options.get("has_aux"))
    grad_fn = jax.jit(jax.value_and_grad(run, has_aux=has_aux))
    assert_equal(grad_fn(case.params, batch, rng=rng), wanted)
    if name in PIPELINED:
        mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
        grad_fn = jax.jit(dpj.value_and_grad(model, mesh=mesh, num_microbatches=MICROBATCHES))
        assert_equal(grad_fn(case.params, batch, rng=rng), wanted)
