"""Slot buffers: what lives between ticks, read and written in place, one entry at a time.

A buffer of per-layer values is `[slot, layer, ...]`, one of whole activations `[slot, ...]`. A
value of a stage's size is never gathered from a slot: the layer loop reads and writes a layer.
"""

from collections.abc import Callable, Sequence
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


def accumulate(sums: Sequence[Any], values: Sequence[jax.Array], index: Any) -> list[Any]:
    """Returns the sums with `values` added to entry `[index]`, in the dtype of the sums.

    A sum is an array `[layer, ...]`, or a list of as many arrays: with the layers unrolled XLA
    would look through one layer's update of an array to the array before it, keep both alive, and
    so copy it.
    """
    out = []
    for total, value in zip(sums, values, strict=True):
        if isinstance(total, list):
            mine = total[index] + value.astype(total[index].dtype)
            out.append([*total[:index], mine, *total[index + 1 :]])
        else:
            out.append(write(total, read(total, index) + value.astype(total.dtype), index))
    return out


def when(predicate: Any, body: Callable[[Any], Any], carry: Any) -> Any:
    """Returns `body(carry)` if `predicate` holds, else `carry`; what does not change stays put.

    A loop of one trip or none: what passes through a `lax.cond` is copied.
    """
    return lax.while_loop(
        lambda loop: loop[0], lambda loop: (jnp.zeros((), bool), body(loop[1])), (predicate, carry)
    )[1]


def pass_on(buffers: PyTree) -> PyTree:
    """Hands buffers that a loop only reads on to the next, as if they were written.

    If the next loop took them from before this one, both would be alive, and XLA would copy them.
    """
    return jax.tree.map(lax.optimization_barrier, buffers)


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
