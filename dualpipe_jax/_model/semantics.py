"""The meaning of a step, shared by the pipeline and by `sequential`.

This module alone defines microbatch m, the key of a layer, and the terms of the loss.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._model.types import Aux, Batch, Context, Metrics, Model, PyTree


def pytree(name: str, tree: PyTree) -> PyTree:
    """Requires dicts whose keys can be sorted, as JAX does, and returns the tree."""
    try:
        jax.tree.structure(tree)
    except ValueError as error:
        raise ValueError(
            f"{name}: must be a pytree, and the keys of each dict in it all of one type, so that "
            f"they can be sorted; use text for all keys ({error})"
        ) from error
    return tree


def as_arrays(tree: PyTree) -> PyTree:
    """Converts Python scalars to arrays; other leaves stay, and the checks refuse them."""
    return jax.tree.map(_as_array, tree)


def _as_array(leaf: Any) -> Any:
    if not isinstance(leaf, bool | int | float | complex):
        return leaf
    try:
        return jnp.asarray(leaf)
    except OverflowError:  # an integer that fits no dtype
        return leaf


def split(batch: Batch, num_microbatches: int) -> PyTree:
    """Reshapes every leaf `[B, ...]` to `[num_microbatches, B / num_microbatches, ...]`."""
    return jax.tree.map(
        lambda leaf: (
            leaf.reshape(num_microbatches, -1, *leaf.shape[1:])
            if leaf.size
            else leaf.reshape(num_microbatches, leaf.shape[0] // num_microbatches, *leaf.shape[1:])
        ),
        batch,
    )


def take(tree: PyTree, index: jax.Array | int) -> PyTree:
    """Takes entry `index` of the leading dim of every leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree)


def microbatch_key(rng: jax.Array | None, index: jax.Array) -> jax.Array | None:
    """Derives the key of microbatch `index`; None without `rng`."""
    return None if rng is None else jax.random.fold_in(rng, index)


def context(
    microbatch: Batch,
    key: jax.Array | None,
    position: jax.Array | int,
    *,
    is_layer: bool = False,
    shard: jax.Array | None = None,
    shared: PyTree = None,
) -> Context:
    """Builds the context of embed, head or a block.

    Args:
      microbatch: The microbatch, leaves `[rows, ...]`.
      key: The microbatch's key, or None.
      position: The index of a layer; num_layers for embed, num_layers + 1 for head.
      is_layer: Whether position is a layer, and so becomes `ctx.layer`.
      shard: The index of this shard of the batch, folded into the key last; None with one shard.
      shared: `params["shared"]`, if any.
    """
    own_key = microbatch_key = None
    if key is not None:
        keys = [jax.random.fold_in(key, position), key]
        own_key, microbatch_key = (
            k if shard is None else jax.random.fold_in(k, shard) for k in keys
        )
    return Context(
        microbatch=microbatch,
        layer=jnp.asarray(position, jnp.int32) if is_layer else None,
        rng=own_key,
        microbatch_rng=microbatch_key,
        shared=shared,
    )


def accumulator_dtype(dtype: Any) -> Any:
    """Returns the dtype in which values of `dtype` are summed: float32 or wider, ints exactly."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return wider_dtype(dtype, jnp.float32)
    return wider_dtype(dtype, jnp.int32)


def wider_dtype(one: Any, other: Any) -> Any:
    """Returns the dtype that holds both, even where `jax_numpy_dtype_promotion` is `"strict"`."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(one, other)


def zeros_for_sum(tree: PyTree) -> PyTree:
    """Makes zeros in which values of the shapes and dtypes of `tree` can be summed."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, accumulator_dtype(a.dtype)), tree)


def add(total: PyTree, value: PyTree) -> PyTree:
    """Adds `value` to `total` in the dtype of `total`."""
    return jax.tree.map(lambda a, b: a + jnp.asarray(b).astype(a.dtype), total, value)


def strong(tree: PyTree) -> PyTree:
    """Drops the weak types of Python scalars, which a loop's carry would not keep."""
    return jax.tree.map(
        lambda a: lax.convert_element_type(a, a.dtype) if a.weak_type else a,
        jax.tree.map(jnp.asarray, tree),
    )


def head_outputs(model: Model, outputs: PyTree) -> tuple[jax.Array, PyTree]:
    """Splits the outputs of head into its loss and its metrics (None without has_aux)."""
    loss, metrics = outputs if model.has_aux else (outputs, None)
    return jnp.asarray(loss), jax.tree.map(jnp.asarray, metrics)


def has_aux(outputs: Any) -> bool:
    """Whether a block returned `(x, Aux)`."""
    return isinstance(outputs, tuple) and len(outputs) == 2 and isinstance(outputs[1], Aux)


def block_outputs(model: Model, outputs: PyTree) -> tuple[PyTree, Aux]:
    """Splits the outputs of a block into x and its Aux (an empty one if it returned none)."""
    x, aux = outputs if model.block_has_aux or has_aux(outputs) else (outputs, Aux())
    aux = aux if isinstance(aux, Aux) else Aux(loss=aux)
    return jax.tree.map(jnp.asarray, x), jax.tree.map(jnp.asarray, aux)


def total_weight(model: Model, microbatches: PyTree) -> jax.Array | None:
    """Sums `model.weight` over the microbatches `[num_microbatches, ...]`; None without weight."""
    weight = model.weight
    if weight is None:
        return None

    def body(total: jax.Array, microbatch: PyTree) -> tuple[jax.Array, None]:
        return total + jnp.asarray(weight(microbatch)).astype(total.dtype), None

    first = jax.eval_shape(weight, jax.eval_shape(lambda tree: take(tree, 0), microbatches))
    dtype = wider_dtype(first.dtype, jnp.float32)
    return lax.scan(body, jnp.zeros((), dtype), microbatches)[0]


def add_at(total: PyTree, value: PyTree, index: jax.Array | int) -> PyTree:
    """Adds `value` to entry `index` of the leading dim of `total`, in the dtype of `total`."""

    def update(total: jax.Array, entry: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(total, entry, index, 0)

    return jax.tree.map(update, total, add(take(total, index), value))


def loss_of_sums(
    loss_sum: jax.Array, aux_sum: jax.Array | None, weight: jax.Array | None, count: int
) -> jax.Array:
    """Computes the loss from sums over `count` microbatches.

    loss = sum(head) / count or sum(head) / sum(weight), plus sum(aux losses) / count.
    """
    loss = loss_sum / (count if weight is None else weight.astype(loss_sum.dtype))
    if aux_sum is not None:
        dtype = wider_dtype(loss.dtype, aux_sum.dtype)
        loss = loss.astype(dtype) + aux_sum.astype(dtype) / count
    return loss


def loss_cotangent(loss: Any, total: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Makes the cotangent of one microbatch's loss, in the loss's dtype: scale / total.

    Args:
      loss: The loss, or its aval.
      total: The microbatches of all shards, or their weight.
      scale: A factor of all cotangents; None for 1.
    """
    # Scaled before it is rounded to the loss's own dtype, in which it might be lost.
    dtype = accumulator_dtype(loss.dtype)
    value = 1 / total.astype(dtype)
    return (value if scale is None else value * scale.astype(dtype)).astype(loss.dtype)


def result(model: Model, loss: jax.Array, metrics: PyTree, blocks: PyTree) -> Any:
    """Builds the value that a step returns, from its loss and its metrics.

    Args:
      model: The model.
      loss: The loss, a scalar.
      metrics: The metrics of head; None without has_aux.
      blocks: The metrics of blocks, stacked by layer.

    Returns:
      The loss; `(loss, metrics)` with has_aux; `(loss, Metrics)` if blocks have metrics.
    """
    if jax.tree.leaves(blocks):
        return loss, Metrics(head=metrics, blocks=blocks)
    return (loss, metrics) if model.has_aux else loss
