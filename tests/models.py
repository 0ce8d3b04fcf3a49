"""Models for the tests: small, with every feature of the contract behind a flag."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import dualpipe_jax as dpj

WIDTH, VOCABULARY, LENGTH, ROWS = 4, 7, 3, 2
# The name of the value of a block that a policy may offload.
OFFLOADED = "inner"
FEATURES = ("dropout", "weight", "block_has_aux", "has_aux", "pytree")


def offload_policy() -> Any:
    """Makes a policy of `jax.checkpoint` that offloads one value of each block."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[OFFLOADED],
        offload_src="device",
        offload_dst="pinned_host",
    )


def keep(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """As `jax.random.bernoulli`, of bytes: in float64 most of a step would be random numbers."""
    return jax.random.bits(key, shape, jnp.uint8) < round(256 * rate)


def make_model(features: frozenset[str] = frozenset()) -> dpj.Model:
    """Makes a language model with a tied embedding.

    "pytree": x is a dict with an integer leaf that travels along; "weight": the loss is a sum over
    the tokens that are not padding (0), divided by their number. Beside FEATURES, "metrics": blocks
    have an `Aux` with metrics of every dtype; "shared": all functions use `ctx.shared`.
    """

    def with_gain(hidden: jax.Array, ctx: dpj.Context) -> jax.Array:
        return hidden * ctx.shared["gain"] if "shared" in features else hidden

    def embed(ends: Any, ctx: dpj.Context) -> Any:
        tokens = ctx.microbatch["tokens"]
        hidden = with_gain(jnp.tanh(ends["table"][tokens]) * ends["scale"], ctx)
        if "dropout" in features:
            assert ctx.layer is None
            assert ctx.rng is not None
            hidden *= keep(ctx.rng, 0.8, hidden.shape)
        return {"hidden": hidden, "parity": tokens % 2} if "pytree" in features else hidden

    def block(params: Any, x: Any, ctx: dpj.Context) -> Any:
        hidden = x["hidden"] if "pytree" in features else x
        inner = jnp.tanh(with_gain(hidden, ctx) @ params["up"] + params["bias"])
        if "pytree" in features:
            inner = inner * (1 + 0.1 * x["parity"][..., None])
        if "dropout" in features:
            assert ctx.rng is not None
            inner *= keep(ctx.rng, 0.7, inner.shape)
        # The layer's index and the microbatch's own data both matter.
        assert ctx.layer is not None
        inner = inner * (1 + 0.01 * ctx.layer) + 0.01 * ctx.microbatch["side"].mean()
        inner = checkpoint_name(inner, OFFLOADED)
        # The kind of weight that is used twice.
        out = hidden + inner @ params["down"] + jnp.sin(inner @ params["down"]) * 0.1
        y = {**x, "hidden": out} if "pytree" in features else out
        loss = jnp.square(inner).mean() if "block_has_aux" in features else None
        if "metrics" in features:
            metrics = {
                "dead": (inner < 0).sum((0, 1)),
                "any": (inner > 0.5).any(),
                "norm": (jnp.square(inner).sum() * (ctx.layer + 1), params["up"].sum()),
                "one": 1,
            }
            return y, dpj.Aux(loss=loss, metrics=metrics)
        return y if loss is None else (y, loss)

    def head(ends: Any, x: Any, ctx: dpj.Context) -> Any:
        hidden = x["hidden"] if "pytree" in features else x
        if "dropout" in features:
            assert ctx.rng is not None
            hidden = hidden * keep(ctx.rng, 0.9, hidden.shape)
        tokens = ctx.microbatch["tokens"]
        log_probs = jax.nn.log_softmax(with_gain(hidden, ctx) @ ends["table"].T)
        losses = -jnp.take_along_axis(log_probs, tokens[..., None], -1)[..., 0]
        mask = tokens > 0
        loss = (losses * mask).sum() if "weight" in features else losses.mean()
        hits = (log_probs.argmax(-1) == tokens).sum()
        return (loss, {"hits": hits, "loss": losses.sum()}) if "has_aux" in features else loss

    return dpj.Model(
        embed=embed,
        block=block,
        head=head,
        weight=(lambda microbatch: (microbatch["tokens"] > 0).sum())
        if "weight" in features
        else None,
        has_aux="has_aux" in features,
        block_has_aux="block_has_aux" in features,
    )


def make_params(num_layers: int, *, seed: int = 0, dtype: Any = np.float64) -> Any:
    """Makes parameters with unused, integer and empty leaves among them."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.5, dtype)

    return {
        "ends": {
            "table": normal(VOCABULARY, WIDTH),
            "scale": 1 + normal(WIDTH),
            "unused": normal(2),
            "version": jnp.arange(3),
        },
        "blocks": {
            "up": normal(num_layers, WIDTH, WIDTH + 1),
            "bias": normal(num_layers, WIDTH + 1),
            "down": normal(num_layers, WIDTH + 1, WIDTH),
            "unused": normal(num_layers, 2),
            "empty": normal(num_layers, 0),
            "index": jnp.arange(num_layers),
        },
    }


def make_shared() -> Any:
    """Makes parameters that all functions of a model with "shared" use, and some that none does."""
    gain = 1 + np.random.default_rng(2).normal(size=WIDTH) / 4
    return {"gain": jnp.asarray(gain), "unused": jnp.ones(2), "version": jnp.arange(2)}


def make_batch(num_microbatches: int, *, seed: int = 1) -> Any:
    """Makes a batch whose rows have paddings of different lengths."""
    rng = np.random.default_rng(seed)
    num_rows = ROWS * num_microbatches
    tokens = rng.integers(1, VOCABULARY, size=(num_rows, LENGTH))
    tokens[np.arange(LENGTH) >= rng.integers(1, LENGTH + 1, size=num_rows)[:, None]] = 0
    return {"tokens": jnp.asarray(tokens), "side": jnp.asarray(rng.normal(size=(num_rows, 2)))}


def assert_close(got: Any, want: Any, *, tolerance: float = 1e-12) -> None:
    """Asserts equality to `tolerance`, relative to the largest entry of each leaf."""
    chex.assert_trees_all_equal_structs(got, want)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    paths = jax.tree_util.tree_leaves_with_path(want)
    for (path, w), g in zip(paths, jax.tree.leaves(got), strict=True):
        name = jax.tree_util.keystr(path)
        if w.dtype == jax.dtypes.float0 or not w.size:
            continue
        g, w = 1 * np.asarray(g), 1 * np.asarray(w)  # bools do not subtract
        assert np.isfinite(g).all(), name
        scale = max(np.abs(w).max(), 1e-30)
        assert np.abs(g - w).max() <= tolerance * scale, (name, np.abs(g - w).max() / scale)


def make_mesh(num_ranks: int, **more: int) -> jax.sharding.Mesh:
    shape = (num_ranks, *more.values())
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("pipe", *more), devices=devices)


def sequential_value_and_grad(
    model: dpj.Model, num_microbatches: int, *, has_metrics: bool = False
) -> Any:
    """Differentiates the sequential model; `has_metrics` if the blocks of one without aux do."""
    loss_fn = dpj.sequential(model, num_microbatches=num_microbatches)
    has_aux = model.has_aux or has_metrics
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=has_aux, allow_int=True))
