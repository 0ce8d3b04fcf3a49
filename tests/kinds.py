"""A model for the tests whose layers are of three kinds.

They differ in the shapes, the structure and the number of their parameters.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

import dualpipe_jax as dpj
from tests.models import OFFLOADED, WIDTH, keep, make_model
from tests.models import make_params as make_params_of_one_kind

NUM_EXPERTS, HIDDEN = 3, 6


def dense(params: Any, x: Any, ctx: dpj.Context) -> Any:
    assert ctx.layer is not None
    inner = jnp.tanh(x @ params["up"]) * (1 + 0.01 * ctx.layer)
    if ctx.rng is not None:
        inner *= keep(ctx.rng, 0.7, inner.shape)
    inner = checkpoint_name(inner, OFFLOADED)
    # Another dtype than the other kind's.
    return x + inner @ params["down"], jnp.square(inner).mean().astype(jnp.float32)


def moe(params: Any, x: Any, ctx: dpj.Context) -> Any:
    assert ctx.layer is not None
    router, (experts, _) = params["router"], params["experts"]
    gates = jax.nn.softmax(x @ router)
    if ctx.rng is not None:
        gates *= keep(ctx.rng, 0.8, gates.shape)
    out = jnp.einsum("blg,blw,gwv->blv", gates, jnp.sin(x), experts)
    out += 0.01 * ctx.microbatch["side"].mean() * ctx.layer
    return x + 0.3 * out, jnp.square(gates).mean()


def scale(params: Any, x: Any, ctx: dpj.Context) -> Any:
    """A kind without any parameters."""
    return 0.9 * x + 0.02 * jnp.cos(x), jnp.sin(x).mean()


BLOCKS = {"dense": dense, "moe": moe, "scale": scale}
NAMES = {"D": "dense", "M": "moe", "S": "scale"}


def layout_of(letters: str) -> tuple[str, ...]:
    """Spells `"DMM"` out."""
    return tuple(NAMES[letter] for letter in letters)


def without_aux(block: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: block(*args)[0]


def make_kinds(letters: str, features: frozenset[str] = frozenset()) -> dpj.Model:
    layout = layout_of(letters)
    has_aux = "block_has_aux" in features
    return replace(
        make_model(features),
        block={
            kind: block if has_aux else without_aux(block)
            for kind, block in BLOCKS.items()
            if kind in layout
        },
        layout=layout,
    )


def make_params(letters: str, *, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.5)

    D, M = letters.count("D"), letters.count("M")
    stacks = {
        "dense": {
            "up": normal(D, WIDTH, HIDDEN),
            "down": normal(D, HIDDEN, WIDTH),
            "unused": normal(D, 2),
        },
        "moe": {
            "router": normal(M, WIDTH, NUM_EXPERTS),
            "experts": (normal(M, NUM_EXPERTS, WIDTH, WIDTH), jnp.arange(M)),
        },
        "scale": {},
    }
    kinds = layout_of(letters)
    ends = make_params_of_one_kind(1)["ends"]
    return {"ends": ends, "blocks": {kind: stacks[kind] for kind in stacks if kind in kinds}}
