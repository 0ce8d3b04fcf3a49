"""Blocks that several tests split: Flax modules, conditionals, loops, a kernel for both grads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from tests.split_vjp.checks import D, V, W, array


class Attention(nn.Module):
    """Pre-norm self-attention: 4 weight matrices, 2 contractions of activations."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.LayerNorm(param_dtype=float)(x)
        h = nn.MultiHeadDotProductAttention(num_heads=2, param_dtype=float)(h)
        return x + nn.Dropout(self.dropout, deterministic=self.dropout == 0)(h)


class Mlp(nn.Module):
    """Pre-norm MLP: 2 weight matrices."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.LayerNorm(param_dtype=float)(x)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], param_dtype=float)(h))
        return x + nn.Dense(x.shape[-1], param_dtype=float)(h)


class Transformer(nn.Module):
    """A transformer block: 6 weight matrices, 2 contractions of activations."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return Mlp()(Attention(self.dropout)(x))


SEQUENCE = array(2, 5, 8)


def flax_block(module: nn.Module) -> tuple[Any, Any]:
    """Returns the block `(params, x, ctx) -> y` of a module, and params; ctx is a dropout key."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), SEQUENCE)
    params = jax.tree.map(lambda a: 0.3 * array(*a.shape), shapes)

    def block(params: Any, x: Any, ctx: Any) -> Any:
        return module.apply(params, x, rngs=None if ctx is None else {"dropout": ctx})

    return block, params


# Weight matrices and contractions of two activations; a contraction has two dots for dx.
FLAX = [(Attention(), 4, 2), (Mlp(), 2, 0), (Transformer(), 6, 2)]
FLAX_IDS = [type(module).__name__ for module, _, _ in FLAX]

POLICIES = {
    "everything": None,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}


PARAMS = {"w": W, "v": V, "b": W[0]}


def two_branches(params: Any, x: Any, ctx: Any) -> Any:
    """Two weights in one branch, one in the other."""
    return lax.cond(
        x[0, 0] > 0,
        lambda: jnp.tanh(x @ params["w"]) @ params["v"],
        lambda: jnp.sin(x @ params["v"]) + params["b"],
    )


def nested_branches(params: Any, x: Any, ctx: Any) -> Any:
    """A conditional in a branch, on another predicate."""
    return lax.cond(
        x[0, 0] > 0,
        lambda: jnp.sin(two_branches(params, x @ params["w"], ctx)),
        lambda: two_branches(params, -x, ctx) * params["b"],
    )


STACK = {"w": array(5, D, D), "b": array(5, D)}
RNN = {"w": W, "u": V, "b": W[0]}


def rnn(params, x, ctx, *, wrap=lambda body: body, **kwargs):
    """Scans over time; the weights are constants of the loop."""

    def body(h, x_t):
        h = jnp.tanh(x_t @ params["w"] + h @ params["u"] + params["b"])
        return h, h

    return lax.scan(wrap(body), jnp.zeros(D), x, **kwargs)[1]


def stack(params, x, ctx, *, wrap=lambda body: body, **kwargs):
    """Scans over layers; the weights are the scanned operands."""

    def body(h, layer):
        return h + jnp.tanh(h @ layer["w"] + layer["b"]), None

    return lax.scan(wrap(body), x, params, **kwargs)[0]


def _kernel(x_ref: Any, w_ref: Any, g_ref: Any, dx_ref: Any, dw_ref: Any) -> None:
    x, w, g = x_ref[:], w_ref[:], g_ref[:]
    dx_ref[:] = jnp.dot(g, w.T)
    dw_ref[:] = jnp.dot(x.T, g)


@jax.custom_vjp
def fused(x: Any, w: Any) -> Any:
    """`x @ w`, whose backward is one kernel."""
    return x @ w


def _fused_backward(kept: Any, g: Any) -> Any:
    x, w = kept
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, w)]
    return pl.pallas_call(_kernel, out_shape=shapes, interpret=True)(x, w, g)


fused.defvjp(lambda x, w: (x @ w, (x, w)), _fused_backward)
