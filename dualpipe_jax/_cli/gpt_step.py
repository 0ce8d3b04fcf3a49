"""A GPT-style language model, and its training step: the step that `preflight` compiles.

Decoder-only, pre-norm, a gelu MLP of four times the width, positions by ALiBi (arXiv:2108.12409),
the embedding tied to the output. Parameters are float32; layers compute in a dtype of choice. The
step is made of shapes alone.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dualpipe_jax._api.value_and_grad import value_and_grad
from dualpipe_jax._model.types import Context, Model
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import LayersPerStage
from dualpipe_jax.schedules import Schedule

_AXIS = "pipe"


@dataclass(frozen=True, kw_only=True)
class GPT:
    """Holds the sizes of a model, and makes its functions and parameters.

    Attributes:
      layers: Layers.
      width: The width of the residual stream.
      heads: Attention heads, into which the width divides.
      context: Tokens of a window.
      vocabulary: The number of different tokens.
      dtype: The dtype in which layers compute.

    Raises:
      ValueError: If the width does not divide into the heads.
    """

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int
    dtype: Any = jnp.bfloat16

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(
                f"width={self.width}: must be a multiple of heads={self.heads}, the attention heads"
            )

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes parameters, those of the blocks stacked over the layers."""
        width, layers = self.width, self.layers
        shapes = {
            "query_key_value": (layers, width, 3 * width),
            "out": (layers, width, width),
            "up": (layers, width, 4 * width),
            "down": (layers, 4 * width, width),
        }
        keys = jax.random.split(key, len(shapes) + 1)
        blocks = {
            name: 0.02 * jax.random.normal(of_leaf, shape, jnp.float32)
            for of_leaf, (name, shape) in zip(keys[1:], shapes.items(), strict=True)
        }
        norms = {name: jnp.ones((layers, width), jnp.float32) for name in ("norm_1", "norm_2")}
        table = 0.02 * jax.random.normal(keys[0], (self.vocabulary, width), jnp.float32)
        return {
            "ends": {"table": table, "norm": jnp.ones(width, jnp.float32)},
            "blocks": blocks | norms,
        }

    def model(self) -> Model:
        """Gives the model as functions of windows, int32[rows, context + 1]; loss in nats."""
        return Model(embed=self._embed, block=self._block, head=self._head)

    def _embed(self, ends: Any, ctx: Context) -> jax.Array:
        return ends["table"].astype(self.dtype)[ctx.microbatch[:, :-1]]

    def _head(self, ends: Any, x: jax.Array, ctx: Context) -> jax.Array:
        logits = _norm(x, ends["norm"]) @ ends["table"].astype(self.dtype).T
        labels = ctx.microbatch[:, 1:]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), labels
        ).mean()

    def _block(self, params: Any, x: jax.Array, ctx: Context) -> jax.Array:
        weight = {name: leaf.astype(self.dtype) for name, leaf in params.items()}
        rows, length, width = x.shape
        of_heads = (_norm(x, weight["norm_1"]) @ weight["query_key_value"]).reshape(
            rows, length, 3, self.heads, width // self.heads
        )
        query, key, value = jnp.moveaxis(of_heads, 2, 0)
        logits = jnp.einsum("rqhd,rkhd->rhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits * (width // self.heads) ** -0.5 + _causal_bias(self.heads, length)
        attention = jax.nn.softmax(logits).astype(self.dtype)
        attended = jnp.einsum("rhqk,rkhd->rqhd", attention, value)
        x = x + attended.reshape(x.shape) @ weight["out"]
        return x + jax.nn.gelu(_norm(x, weight["norm_2"]) @ weight["up"]) @ weight["down"]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def _causal_bias(heads: int, length: int) -> jax.Array:
    """Makes the bias of attention's logits, float32[heads, length, length].

    For query i and key j in head h it is -(i - j) 2^(-8 (h + 1) / heads) if j <= i, else -inf.
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)
    return jnp.where(distance >= 0, -slopes[:, None, None] * distance, -jnp.inf)


def make_step(
    gpt: GPT,
    *,
    schedule: Schedule,
    overlap: bool | Literal["two-tick"] | None,
    layers_per_stage: LayersPerStage = None,
    microbatch: int,
    remat: str,
    slots_on_device: int | str | None = None,
) -> tuple[jax.stages.Wrapped, tuple[Any, ...]]:
    """Makes loss, gradients and AdamW's update of a GPT: a jitted step, and avals of its arguments.

    Args:
      gpt: The model.
      schedule: The schedule, for as many devices as it has ranks.
      overlap: As for `Execution`.
      layers_per_stage: As for `value_and_grad`.
      microbatch: Windows of text in a microbatch.
      remat: `"none"` or `"block"`.
      slots_on_device: As for `Execution`.

    Raises:
      ValueError: If sizes do not fit each other.
    """
    ranks, microbatches = schedule.num_ranks, schedule.num_microbatches
    mesh = AbstractMesh((ranks,), (_AXIS,))
    grad_fn = value_and_grad(
        gpt.model(),
        mesh=mesh,
        num_microbatches=microbatches,
        schedule=schedule,
        execution=Execution(overlap=overlap, slots_on_device=slots_on_device),
        layers_per_stage=layers_per_stage,
        axis=_AXIS,
        remat=remat,
    )
    optimizer = optax.adamw(1e-3)

    def step(params: Any, state: Any, batch: jax.Array) -> Any:
        loss, grads = grad_fn(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def shard(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        is_block = any(getattr(key, "key", None) == "blocks" for key in path)
        spec = PartitionSpec(_AXIS) if is_block and gpt.layers % ranks == 0 else PartitionSpec()
        return leaf.update(sharding=NamedSharding(mesh, spec))

    params = jax.eval_shape(gpt.init, jax.eval_shape(lambda: jax.random.key(0)))
    batch = jax.ShapeDtypeStruct((microbatch * microbatches, gpt.context + 1), jnp.int32)
    args = params, jax.eval_shape(optimizer.init, params), batch
    args = jax.tree_util.tree_map_with_path(shard, args)
    return jax.jit(step, donate_argnums=(0, 1)), args
