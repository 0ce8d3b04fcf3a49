"""Blocks of a language model in plain functions, with the shapes of their parameters.

Pre-norm; compute in bfloat16. A microbatch is token ids, `[tokens]` or `[windows, tokens]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.sharding import PartitionSpec

import dualpipe_jax as dpj

DTYPE, VOCABULARY, HEAD_SIZE, CONTEXT, EXPERTS = jnp.bfloat16, 1024, 128, 1024, 2
OFFLOADED = "offloaded"
Shapes = dict[str, tuple[int, ...]]


def embed(ends: Any, ctx: Any) -> jax.Array:
    return ends["table"].astype(DTYPE)[ctx.microbatch]


def head(ends: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """Cross-entropy of each token's own id: the prediction itself does not matter here."""
    logits = (norm(x, ends["gain"]) @ ends["table"].astype(DTYPE).T).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[:, None], 1)
    return -picked.mean()


def head_without_gain(ends: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """The same loss over windows, by a log-sum-exp."""
    logits = (norm(x) @ ends["table"].T.astype(DTYPE)).astype(jnp.float32)
    of_token = jnp.take_along_axis(logits, ctx.microbatch[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - of_token).mean()


def norm(x: jax.Array, gain: jax.Array | None = None) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return wide.astype(DTYPE) if gain is None else wide.astype(DTYPE) * gain.astype(DTYPE)


def mlp(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
    hidden = jax.nn.gelu(norm(x, params.get("gain")) @ params["up"].astype(DTYPE))
    return x + hidden @ params["down"].astype(DTYPE)


def transformer(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """Causal attention over windows of `CONTEXT` tokens in heads of `HEAD_SIZE`, then the MLP."""
    windows = norm(x, params["gain_1"]).reshape(-1, min(CONTEXT, len(x)), x.shape[-1])
    query, key, value = jnp.einsum("btd,dchk->cbhtk", windows, params["qkv"].astype(DTYPE))
    logits = jnp.einsum("bhtk,bhsk->bhts", query, key) / np.sqrt(HEAD_SIZE)
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    masked = jnp.where(causal, logits.astype(jnp.float32), -1e30)
    attention = jax.nn.softmax(masked).astype(DTYPE)
    attended = jnp.einsum("bhts,bhsk->bthk", attention, value)
    out = jnp.einsum("bthk,hkd->btd", attended, params["out"].astype(DTYPE))
    return mlp(params, x + out.reshape(x.shape), ctx)


def flash(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """The transformer with an attention kernel, which keeps no scores.

    Names the values that a policy offloads.
    """
    windows = norm(x, params["gain_1"]).reshape(-1, min(CONTEXT, len(x)), x.shape[-1])
    query, key, value = jnp.einsum("btd,dchk->cbhtk", windows, params["qkv"].astype(DTYPE))
    attended = flash_attention(
        query, key, value, causal=True, sm_scale=float(1 / np.sqrt(HEAD_SIZE))
    )
    attended = checkpoint_name(attended, OFFLOADED)
    out = jnp.einsum("bhtk,hkd->btd", attended, params["out"].astype(DTYPE))
    x = x + out.reshape(x.shape)
    hidden = norm(x, params["gain"]) @ params["up"].astype(DTYPE)
    hidden = jax.nn.gelu(checkpoint_name(hidden, OFFLOADED))
    return x + hidden @ params["down"].astype(DTYPE)


def experts(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """An equal share of the tokens to each expert's device and back, weighted by a router's gate.

    Two all-to-alls; a device holds one expert, and its own tokens.
    """
    normed = norm(x, params["gain"])
    gates = jax.nn.softmax((normed @ params["router"].astype(DTYPE)).astype(jnp.float32))
    gate = gates.reshape(EXPERTS, -1, EXPERTS)  # [share, token, expert]; share e goes to expert e
    gate = jnp.diagonal(gate, axis1=0, axis2=2).T.reshape(-1, 1)

    def exchange(values: jax.Array) -> jax.Array:
        shares = values.reshape(EXPERTS, -1, values.shape[-1])
        return lax.all_to_all(shares, "expert", 0, 0, tiled=True).reshape(values.shape)

    hidden = jax.nn.gelu(exchange(normed) @ params["up"][0].astype(DTYPE))
    return x + exchange(hidden @ params["down"][0].astype(DTYPE)) * gate.astype(DTYPE)


def mlp_and_experts(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """An MLP, then one of two experts for each token by its position; two all-to-alls."""
    x = x + jax.nn.gelu(norm(x) @ params["dense_up"]) @ params["dense_down"]
    tokens = norm(x).reshape(EXPERTS, -1, x.shape[-1])
    tokens = lax.all_to_all(tokens, "expert", 0, 0, tiled=True)
    up, down = params["up"][0], params["down"][0]
    tokens = jax.nn.gelu(tokens @ up) @ down
    return x + lax.all_to_all(tokens, "expert", 0, 0, tiled=True).reshape(x.shape)


def _kernels(width: int, *lead: int, prefix: str = "") -> Shapes:
    up, down = (*lead, width, 4 * width), (*lead, 4 * width, width)
    return {f"{prefix}up": up, f"{prefix}down": down}


def _transformer_shapes(width: int) -> Shapes:
    heads = max(1, width // HEAD_SIZE)
    qkv, out = (width, 3, heads, HEAD_SIZE), (heads, HEAD_SIZE, width)
    return {"gain": (width,), **_kernels(width), "gain_1": (width,), "qkv": qkv, "out": out}


@dataclass(frozen=True)
class Family:
    """Describes a kind of block.

    Attributes:
      block: `(params, x, ctx) -> x`, x `[..., width]`.
      shapes: `width -> ` the shapes of a layer's parameters.
      spread: The parameters that are sharded over a manual axis `"expert"`, over which the block
        has all-to-alls; none without.
      is_half: Whether parameters are bfloat16 and norms have no gain; else float32, with gains.
      window: Tokens of a window; None if a microbatch is one row of tokens.
    """

    block: Callable[[Any, jax.Array, Any], jax.Array]
    shapes: Callable[[int], Shapes]
    spread: tuple[str, ...] = ()
    is_half: bool = False
    window: int | None = None

    @property
    def model(self) -> dpj.Model:
        """The model."""
        last = head_without_gain if self.is_half else head
        return dpj.Model(embed=embed, block=self.block, head=last)

    def avals(self, width: int, num_layers: int) -> Any:
        """Makes the shapes and dtypes of the parameters of so many layers."""
        ends = {"table": (VOCABULARY, width)} | ({} if self.is_half else {"gain": (width,)})
        dtype = DTYPE if self.is_half else jnp.float32
        layers = self.shapes(width).items()
        return {
            "ends": {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in ends.items()},
            "blocks": {n: jax.ShapeDtypeStruct((num_layers, *s), dtype) for n, s in layers},
        }

    def specs(self, *axes: str | None) -> Any:
        """Gives the specs of parameters: layers over the axes and experts over theirs."""
        whole, spread = PartitionSpec(*axes), PartitionSpec(*(axes or (None,)), "expert")
        blocks = {name: spread if name in self.spread else whole for name in self.shapes(1)}
        return {"ends": PartitionSpec(), "blocks": blocks}


_SPREAD = ("up", "down")
FAMILIES = {
    "mlp": Family(mlp, lambda width: {"gain": (width,), **_kernels(width)}),
    "transformer": Family(transformer, _transformer_shapes),
    "flash": Family(flash, _transformer_shapes),
    "experts": Family(
        experts,
        lambda w: {"gain": (w,), "router": (w, EXPERTS), **_kernels(w, EXPERTS)},
        spread=_SPREAD,
    ),
    # Those of the steps for GPUs.
    "dense": Family(mlp, _kernels, is_half=True, window=512),
    "mixture": Family(
        mlp_and_experts,
        lambda width: _kernels(width, prefix="dense_") | _kernels(width, EXPERTS),
        spread=_SPREAD,
        is_half=True,
        window=512,
    ),
}
