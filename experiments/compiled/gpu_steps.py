"""The training steps whose communication is looked at, as shapes: no parameter is ever made.

A dense block of one MLP; and a mixture of experts, a dense MLP and then one of two experts, to
which tokens go and come back by all-to-alls over a mesh axis. Tokens go by their place, half to
each expert: what is asked is when they travel, not where to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import P, lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding

import dualpipe_jax as dpj

VOCABULARY, CONTEXT, WINDOWS = 1024, 512, 2  # a microbatch is [WINDOWS, CONTEXT] tokens
EXPERTS = 2
DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: `fn(*args)`, over a mesh of no devices in particular."""

    fn: Callable[..., Any]
    args: tuple[Any, Any]
    mesh: AbstractMesh


def dense(
    *, layers_per_stage: int, width: int, num_ranks: int = 8, num_microbatches: int = 32
) -> Step:
    """Makes a step of dense blocks."""
    mesh = AbstractMesh((num_ranks,), ("pipe",), axis_types=(AxisType.Auto,))

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return x + _mlp(_norm(x), params["up"], params["down"])

    num_layers = layers_per_stage * num_ranks
    blocks = {
        "up": _aval(mesh, (num_layers, width, 4 * width), DTYPE, "pipe"),
        "down": _aval(mesh, (num_layers, 4 * width, width), DTYPE, "pipe"),
    }
    return _step(block, blocks, mesh, width, num_microbatches)


def experts(
    *, layers_per_stage: int, width: int, num_ranks: int = 4, num_microbatches: int = 16
) -> Step:
    """Makes a step of blocks with an MLP, and a mixture of experts over an axis of their own."""
    mesh = AbstractMesh((num_ranks, EXPERTS), ("pipe", "expert"), axis_types=(AxisType.Auto,) * 2)

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        x = x + _mlp(_norm(x), params["dense_up"], params["dense_down"])
        tokens = _norm(x).reshape(EXPERTS, -1, width)
        tokens = lax.all_to_all(tokens, "expert", 0, 0, tiled=True)
        tokens = _mlp(tokens, params["up"][0], params["down"][0])
        return x + lax.all_to_all(tokens, "expert", 0, 0, tiled=True).reshape(x.shape)

    num_layers = layers_per_stage * num_ranks
    up, down = (width, 4 * width), (4 * width, width)
    blocks = {
        "dense_up": _aval(mesh, (num_layers, *up), DTYPE, "pipe"),
        "dense_down": _aval(mesh, (num_layers, *down), DTYPE, "pipe"),
        "up": _aval(mesh, (num_layers, EXPERTS, *up), DTYPE, "pipe", "expert"),
        "down": _aval(mesh, (num_layers, EXPERTS, *down), DTYPE, "pipe", "expert"),
    }
    of_experts = {"dense_up": P(), "dense_down": P()}
    of_experts |= {"up": P(None, "expert"), "down": P(None, "expert")}
    return _step(
        block,
        blocks,
        mesh,
        width,
        num_microbatches,
        batch_axes="expert",
        manual_axes="expert",
        param_specs={"ends": P(), "blocks": of_experts},
    )


def _step(
    block: Callable[..., jax.Array],
    blocks: Any,
    mesh: AbstractMesh,
    width: int,
    num_microbatches: int,
    **axes: Any,
) -> Step:
    fn = dpj.value_and_grad(
        dpj.Model(embed=_embed, block=block, head=_head),
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule="dualpipe",
        execution=dpj.Execution(overlap=True),
        **axes,
    )
    params = {"ends": {"table": _aval(mesh, (VOCABULARY, width), jnp.float32)}, "blocks": blocks}
    shards = mesh.shape.get("expert", 1)
    rows = num_microbatches * WINDOWS * shards
    batch = _aval(mesh, (rows, CONTEXT), jnp.int32, *(("expert",) if shards > 1 else ()))
    return Step(fn=fn, args=(params, batch), mesh=mesh)


def _embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ends["table"].astype(DTYPE)[ctx.microbatch]


def _head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    logits = (_norm(x) @ ends["table"].T.astype(DTYPE)).astype(jnp.float32)
    of_token = jnp.take_along_axis(logits, ctx.microbatch[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - of_token).mean()


def _norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def _mlp(x: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ up) @ down


def _aval(
    mesh: AbstractMesh, shape: tuple[int, ...], dtype: Any, *spec: str
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
