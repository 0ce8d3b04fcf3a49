"""Slot buffers: what lives between ticks, read and written in place, one entry at a time.

A buffer of per-layer values is `[slot, layer, ...]`, or `Layers` of `[slot, ...]` where layers are
unrolled; one of whole activations is `[slot, ...]`. A value of a stage's size is never gathered
from a slot: the layer loop reads and writes a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._leaves.rules import Rule

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layers:
    """A value for each layer, in arrays of their own, so that no layer waits for another's."""

    each: tuple[PyTree, ...]

    def replace(self, layer: int, value: PyTree) -> "Layers":
        """Returns the same with another value for one layer."""
        return Layers((*self.each[:layer], value, *self.each[layer + 1 :]))


def allocate(avals: PyTree, *lead: int, poison: bool = False) -> PyTree:
    """Makes an array `[*lead, *shape]` for every aval: zeros, or in tests values that spread."""
    return jax.tree.map(
        lambda a: jnp.full((*lead, *a.shape), _poison(a.dtype) if poison else 0, a.dtype), avals
    )


def allocate_layers(
    avals: PyTree, num_slots: int, num_layers: int, *, is_apart: bool, poison: bool = False
) -> PyTree | Layers:
    """Makes a slot buffer of per-layer values: `[slot, layer, ...]`, or `Layers` if `is_apart`."""
    if not is_apart:
        return allocate(avals, num_slots, num_layers, poison=poison)
    return Layers(tuple(allocate(avals, num_slots, poison=poison) for _ in range(num_layers)))


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


def read_layer(
    buffers: PyTree | Layers, layer: Any, slot: Any, *, parts: Sequence[int] | None = None
) -> PyTree:
    """Reads what a slot holds for a layer.

    Args:
      buffers: The buffers.
      layer: The layer.
      slot: The slot.
      parts: For each of a tuple of buffers in how many parts along a value's first dim it is read,
        and put together again; XLA does neither where the readers want the parts.
    """
    if isinstance(buffers, Layers):
        buffers, index = buffers.each[layer], (slot,)
    else:
        index = (slot, layer)
    if parts is None:
        return read(buffers, *index)
    return tuple(_read_parts(b, index, n) for b, n in zip(buffers, parts, strict=True))


def _read_parts(buffer: jax.Array, index: tuple[Any, ...], parts: int) -> jax.Array:
    if parts == 1:
        return read(buffer, *index)
    rest = buffer.shape[len(index) + 1 :]
    size = (*(1,) * len(index), buffer.shape[len(index)] // parts, *rest)

    def part(number: int) -> jax.Array:
        start = _starts((*index, number * size[len(index)], *(0,) * len(rest)))
        return lax.dynamic_slice(buffer, start, size).reshape(size[len(index) :])

    return jnp.concatenate([part(number) for number in range(parts)])


def write_layer(buffers: PyTree | Layers, values: PyTree, layer: Any, slot: Any) -> PyTree:
    """Returns the buffers with `values` for a layer in a slot; in place inside a loop."""
    if isinstance(buffers, Layers):
        return buffers.replace(layer, write(buffers.each[layer], values, slot))
    return write(buffers, values, slot, layer)


def accumulate(
    sums: Sequence[Any], values: Sequence[jax.Array], index: Any, rules: Sequence[Rule]
) -> list[Any]:
    """Returns the sums with `values` added to entry `[index]`, each by its rule.

    A sum is an array `[layer, ...]`, or a list of as many arrays: with the layers unrolled XLA
    would look through one layer's update of an array to the array before it, keep both alive, and
    so copy it.
    """
    out = []
    for total, value, rule in zip(sums, values, rules, strict=True):
        if isinstance(total, list):
            mine = rule.add(total[index], value)
            out.append([*total[:index], mine, *total[index + 1 :]])
        else:
            out.append(write(total, rule.add(read(total, index), value), index))
    return out


def when(predicate: Any, body: Callable[[Any], Any], carry: Any) -> Any:
    """Returns `body(carry)` if `predicate` holds, else `carry`; what does not change stays put.

    A loop of one trip or none: what passes through a `lax.cond` is copied.
    """
    return lax.while_loop(
        lambda loop: loop[0], lambda loop: (jnp.zeros((), bool), body(loop[1])), (predicate, carry)
    )[1]


def pass_on(buffers: PyTree, layer: Any = None, *, after: PyTree = ()) -> PyTree:
    """Hands buffers that were only read on to who writes them next, as if they had been written.

    If the next loop took them from before this one, both would be alive, and XLA would copy them.
    In straight-line code the next write has to come `after` what was made of what was read, for
    the same reason.

    Args:
      buffers: The buffers.
      layer: The layer that was read; of `Layers` only its own buffers are handed on.
      after: What was made of them.
    """
    if isinstance(buffers, Layers):
        return buffers.replace(layer, pass_on(buffers.each[layer], after=after))
    leaves, structure = jax.tree.flatten(buffers)
    if not leaves:
        return buffers
    # One entry of each is enough, and leaves XLA its fusions and layouts.
    entries = [value[(0,) * value.ndim] for value in jax.tree.leaves(after) if value.size]
    handed_on, _ = lax.optimization_barrier((leaves, entries))
    return jax.tree.unflatten(structure, handed_on)


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
