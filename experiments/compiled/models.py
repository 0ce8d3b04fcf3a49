"""Three blocks of a language model in plain functions, with the shapes of their parameters.

Pre-norm; compute in bfloat16, parameters in float32. A microbatch is `[tokens]` of token ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

import dualpipe_jax as dpj

DTYPE, VOCABULARY, HEAD_SIZE, CONTEXT, EXPERTS = jnp.bfloat16, 1024, 128, 1024, 2
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """Tells of a kind of block.

    Attributes:
      block: `(params, x, ctx) -> x`, x `[tokens, width]`.
      shapes: `width -> ` the shapes of a layer's parameters.
      has_experts: Whether it has all-to-alls over a manual axis `"expert"`.
    """

    block: Callable[[Any, jax.Array, Any], jax.Array]
    shapes: Callable[[int], Shapes]
    has_experts: bool = False

    @property
    def model(self) -> dpj.Model:
        """The model."""
        return dpj.Model(embed=embed, block=self.block, head=head)

    @property
    def param_specs(self) -> Any:
        """How parameters lie over the manual axes."""
        of_experts = PartitionSpec(None, "expert")
        blocks = {
            name: of_experts if name in ("up", "down") else PartitionSpec()
            for name in self.shapes(1)
        }
        return {"ends": PartitionSpec(), "blocks": blocks}


def embed(ends: Any, ctx: Any) -> jax.Array:
    return ends["table"].astype(DTYPE)[ctx.microbatch]


def head(ends: Any, x: jax.Array, ctx: Any) -> jax.Array:
    """Cross-entropy of each token's own id: what is predicted does not matter here."""
    logits = (norm(x, ends["gain"]) @ ends["table"].astype(DTYPE).T).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[:, None], 1)
    return -picked.mean()


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide * lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return wide.astype(DTYPE) * gain.astype(DTYPE)


def mlp(params: Any, x: jax.Array, ctx: Any) -> jax.Array:
    hidden = jax.nn.gelu(norm(x, params["gain"]) @ params["up"].astype(DTYPE))
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


def _mlp_shapes(width: int) -> Shapes:
    return {"gain": (width,), "up": (width, 4 * width), "down": (4 * width, width)}


def _transformer_shapes(width: int) -> Shapes:
    heads = max(1, width // HEAD_SIZE)
    attention = {
        "gain_1": (width,),
        "qkv": (width, 3, heads, HEAD_SIZE),
        "out": (heads, HEAD_SIZE, width),
    }
    return _mlp_shapes(width) | attention


def _experts_shapes(width: int) -> Shapes:
    return {
        "gain": (width,),
        "router": (width, EXPERTS),
        "up": (EXPERTS, width, 4 * width),
        "down": (EXPERTS, 4 * width, width),
    }


FAMILIES = {
    "mlp": Family(mlp, _mlp_shapes),
    "transformer": Family(transformer, _transformer_shapes),
    "experts": Family(experts, _experts_shapes, has_experts=True),
}
