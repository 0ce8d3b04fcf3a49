"""Layers of DeepSeek-V3's shape, as Flax modules: latent attention, SwiGLU, a mixture of experts.

DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437), section 2.1. Pre-norm, no biases.
Parameters have the dtype of `init`; compute has that of `dtype`, or of x and parameters if None.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

import dualpipe_jax as dpj
from experiments.deepseek_mini import dispatch, routing

ROTARY_BASE = 10_000.0
_INIT = nn.initializers.normal(0.02)


def dense(features: int, *, name: str, dtype: Any) -> nn.Dense:
    """Makes a matmul."""
    return nn.Dense(features, use_bias=False, dtype=dtype, name=name, kernel_init=_INIT)


def rotate(x: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + size / 2) of each token's dims by angles in its position.

    Su et al., "RoFormer" (arXiv:2104.09864), section 3.2. x is [rows, length, heads, size].
    """
    length, size = x.shape[1], x.shape[-1]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    speeds = ROTARY_BASE ** (-jnp.arange(0, size, 2, dtype=dtype) / size)
    angles = jnp.arange(length, dtype=dtype)[:, None, None] * speeds
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class LatentAttention(nn.Module):
    """Causal multi-head latent attention, section 2.1.1 (equations 1 to 11).

    Keys and values of all heads are made of one small latent, and queries of another. Positions
    are apart from both: a rotary query for each head, and one rotary key for all, so that
    at inference the latent and this key are all that has to be cached.

    Attributes:
      heads: Their number.
      head_size: The size of a head's query and key without position, and of its value.
      rotary_size: The size of its rotary query, and of the rotary key.
      latent_size: The size of the latent behind keys and values.
      query_latent_size: The size of the latent behind queries.
      dtype: The dtype of the compute.
    """

    heads: int
    head_size: int
    rotary_size: int
    latent_size: int
    query_latent_size: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [rows, length, width] to the same."""
        rows, length, width = x.shape
        project = functools.partial(dense, dtype=self.dtype)
        # RMSNorms behind the compressed latents: section 4.2.
        norm = functools.partial(nn.RMSNorm, dtype=self.dtype)

        def of_heads(values: jax.Array) -> jax.Array:
            return values.reshape(rows, length, self.heads, -1)

        latent = norm(name="latent_norm")(project(self.latent_size, name="latent")(x))
        key = of_heads(project(self.heads * self.head_size, name="key")(latent))
        value = of_heads(project(self.heads * self.head_size, name="value")(latent))
        rotary_key = rotate(project(self.rotary_size, name="rotary_key")(x)[:, :, None])

        latent = norm(name="query_norm")(project(self.query_latent_size, name="query_latent")(x))
        query = of_heads(project(self.heads * self.head_size, name="query")(latent))
        rotary = of_heads(project(self.heads * self.rotary_size, name="rotary_query")(latent))

        # q . k = of the parts without position + of the rotary ones, the key of which is shared
        logits = jnp.einsum("rthd,rshd->rhts", query, key)
        logits += jnp.einsum("rthd,rsd->rhts", rotate(rotary), rotary_key[:, :, 0])
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        causal = jnp.tril(jnp.ones((length, length), bool))
        scaled = logits / (self.head_size + self.rotary_size) ** 0.5
        weights = jax.nn.softmax(jnp.where(causal, scaled, -jnp.inf)).astype(x.dtype)
        attended = jnp.einsum("rhts,rshd->rthd", weights, value)
        return project(width, name="out")(attended.reshape(rows, length, -1))


class SwiGlu(nn.Module):
    """The feed-forward network of dense layers and shared experts (arXiv:2002.05202)."""

    hidden: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., width] to the same."""
        project = functools.partial(dense, dtype=self.dtype)
        gate = nn.silu(project(self.hidden, name="gate")(x))
        return project(x.shape[-1], name="down")(gate * project(self.hidden, name="up")(x))


class _Kernel(nn.Module):
    """A matrix for each expert, named as that of `nn.Dense`."""

    shape: tuple[int, int, int]

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", _INIT, self.shape)


class MixtureOfExperts(nn.Module):
    """One shared expert, which all tokens pass, and routed ones, section 2.1.2 (equation 12).

    Attributes:
      experts: Routed ones, on all devices.
      chosen: Routed experts a token.
      hidden: The hidden size of each; of the shared one `shared` times as much.
      shared: Shared experts. (Several are one of that many times the size.)
      scale: The factor of the gates.
      balance_loss: The factor of the sequence-wise balance loss, the report's alpha.
      capacity_factor: How many times the mean load an expert has room for; None for all there is.
      axis: The mesh axis over which the experts are spread; None if all are here.
      is_ragged: Whether dropless exchanges are ragged.
      dtype: The dtype of the compute.
    """

    experts: int
    chosen: int
    hidden: int
    shared: int = 1
    scale: float = 1.0
    balance_loss: float = 1e-4
    capacity_factor: float | None = None
    axis: str | None = None
    is_ragged: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, dpj.Aux]:
        """Maps [rows, length, width] to the same, and figures of the balance.

        Metrics: `load`, int32[experts], the tokens of each expert; `dropped`, how many choices
        found no room.
        """
        width, num_local = x.shape[-1], self._num_local()
        tokens = x.reshape(-1, width)
        bias = self.param("bias", nn.initializers.zeros, (self.experts,))
        # Affinities are compared: in float32 at least.
        router_dtype = jnp.promote_types(x.dtype, jnp.float32)
        logits = dense(self.experts, name="router", dtype=router_dtype)(tokens)
        affinities = jax.nn.sigmoid(logits)
        chosen = routing.route(affinities, bias, num_chosen=self.chosen, scale=self.scale)
        shapes = {
            "gate": (num_local, width, self.hidden),
            "up": (num_local, width, self.hidden),
            "down": (num_local, self.hidden, width),
        }
        kernels = {name: _Kernel(shape, name=name)() for name, shape in shapes.items()}
        where: Any = {"num_experts": self.experts, "axis": self.axis}
        if self.capacity_factor is None:
            routed = dispatch.dropless(tokens, chosen, kernels, is_ragged=self.is_ragged, **where)
            dropped = jnp.zeros((), jnp.int32)
        else:
            capacity = dispatch.capacity_of(
                len(tokens),
                num_chosen=self.chosen,
                num_experts=self.experts,
                factor=self.capacity_factor,
            )
            routed, dropped = dispatch.with_capacity(
                tokens, chosen, kernels, capacity=capacity, **where
            )
        y = routed.reshape(x.shape)
        y = y + SwiGlu(self.shared * self.hidden, self.dtype, name="shared")(x)
        by_sequence = affinities.reshape(*x.shape[:-1], self.experts)
        balance = routing.sequence_loss(by_sequence, num_chosen=self.chosen)
        metrics = {"load": routing.loads(chosen, self.experts), "dropped": dropped}
        return y, dpj.Aux(loss=self.balance_loss * balance, metrics=metrics)

    def _num_local(self) -> int:
        num_devices = 1 if self.axis is None else lax.axis_size(self.axis)
        if self.experts % num_devices:
            raise ValueError(
                f"experts={self.experts}: must be divisible by the {num_devices} devices of the "
                f"mesh axis {self.axis!r}; change their number, or the mesh"
            )
        return self.experts // num_devices


class Layer(nn.Module):
    """Attention, then a feed-forward network, each behind a norm and beside a residual.

    Attributes:
      attention: `x -> x`.
      feed_forward: `x -> x`, or `x -> (x, Aux)`.
      dtype: The dtype of the compute.
    """

    attention: nn.Module
    feed_forward: nn.Module
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        """Maps [rows, length, width] to the same, with feed_forward's Aux if it gives one."""
        x = x + self.attention(nn.RMSNorm(dtype=self.dtype, name="attention_norm")(x))
        out = self.feed_forward(nn.RMSNorm(dtype=self.dtype, name="feed_forward_norm")(x))
        if isinstance(out, tuple):
            y, aux = out
            return x + y, aux
        return x + out
