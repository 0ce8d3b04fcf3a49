"""Slot buffers: what lives between ticks, read and written in place, one entry at a time.

A buffer of per-layer values is `[slot, layer, ...]`, one of whole activations `[slot, ...]`. A
value of a stage's size is never gathered from a slot: the layer loop reads and writes a layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PyTree = Any


def allocate(avals: PyTree, *lead: int, poison: bool = False) -> PyTree:
    """Makes an array `[*lead, *shape]` for every aval: zeros, or in tests values that spread."""
    return jax.tree.map(
        lambda a: jnp.full((*lead, *a.shape), _poison(a.dtype) if poison else 0, a.dtype), avals
    )


def read(buffers: PyTree, *index: Any) -> PyTree:
    """Reads entry `[*index]` of every buffer."""

    def one(buffer: jax.Array) -> jax.Array:
        start = (*index, *(0,) * (buffer.ndim - len(index)))
        shape = (*(1,) * len(index), *buffer.shape[len(index) :])
        return lax.dynamic_slice(buffer, _starts(start), shape).reshape(buffer.shape[len(index) :])

    return jax.tree.map(one, buffers)


def write(buffers: PyTree, values: PyTree, *index: Any) -> PyTree:
    """Returns the buffers with `values` at entry `[*index]`; in place inside a loop."""

    def one(buffer: jax.Array, value: jax.Array) -> jax.Array:
        start = (*index, *(0,) * (buffer.ndim - len(index)))
        update = value.astype(buffer.dtype).reshape((*(1,) * len(index), *value.shape))
        return lax.dynamic_update_slice(buffer, update, _starts(start))

    return jax.tree.map(one, buffers, values)


def accumulate(buffers: Sequence[jax.Array], values: Sequence[jax.Array], index: Any) -> list:
    """Returns the buffers with `values` added to entry `[index]`, in the dtype of the buffers."""
    sums = [b + v.astype(b.dtype) for b, v in zip(read(list(buffers), index), values, strict=True)]
    return write(list(buffers), sums, index)


def poison(buffers: PyTree, *index: Any) -> PyTree:
    """Overwrites entry `[*index]`, so that whoever still reads it is found out."""
    old = read(buffers, *index)
    return write(buffers, jax.tree.map(lambda a: jnp.full_like(a, _poison(a.dtype)), old), *index)


def _poison(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    return True if dtype == np.bool_ else jnp.iinfo(dtype).max


def _starts(start: Sequence[Any]) -> list[Any]:
    return [jnp.asarray(i, jnp.int32) for i in start]
