"""Orders computations, also where the compiler keeps no `optimization_barrier`.

XLA keeps barriers on TPUs until it has placed all copies; on GPUs and CPUs it drops them earlier,
and the order that they give a beat is lost. On GPUs all weight grads then sink to the end of the
loop, the first forward runs with nothing beside it, and writes to slots, which could run anywhere,
run beside a transfer; on GPUs and CPUs slot buffers are copied, because old and new values live at
once. So the order is written into the data there. On GPUs a value passes through a select whose
predicate is true whatever it is computed from; on CPUs, where only reads and writes of slots have
to wait, a zero is added to the slot.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from dualpipe_jax._model.types import PyTree


def wait_for(values: PyTree, others: PyTree) -> PyTree:
    """Returns the values, bit for bit; on GPUs their readers wait for the others too."""
    return lax.platform_dependent(
        values, others, cuda=select_after, default=lambda values, others: values
    )


def after(arrays: PyTree, others: PyTree) -> PyTree:
    """Returns arrays, not before others are known, where XLA keeps barriers."""
    # One entry of each is enough, and leaves XLA its fusions and layouts.
    entries = [value[(0,) * value.ndim] for value in jax.tree.leaves(others) if value.size]
    arrays, _ = lax.optimization_barrier((arrays, entries))
    return arrays


def copied_out(values: Sequence[Any], *, small: int) -> tuple[Any, ...]:
    """Returns values read from a slot; on GPUs those of at most `small` bytes as copies.

    On GPUs an operand of a library's matmul has to be copied anyway. One copy, for I and W, frees
    the slot for its next write; a slot read in several places makes its readers and that write wait
    for each other. (Eight H100s, a mixture of experts of three layers a stage and width 1024: with
    copies 24 of a trip's 24 all-to-alls have a matmul beside them, without 16.)
    """

    def copy(value: Any) -> Any:
        return lax.platform_dependent(
            value, cuda=lax.optimization_barrier, default=lambda value: value
        )

    return tuple(copy(value) if value.nbytes <= small else value for value in values)


def copied_or_read(copied: Sequence[Any], read: Sequence[Any], *, small: int) -> tuple[Any, ...]:
    """Returns a slot's values as they are read now; on GPUs the copies that `copied_out` made."""

    def either(old: Any, new: Any) -> Any:
        return lax.platform_dependent(old, new, cuda=lambda old, _: old, default=lambda _, new: new)

    both = zip(copied, read, strict=True)
    return tuple(either(old, new) if new.nbytes <= small else new for old, new in both)


def row_major(values: PyTree, dims: Sequence[tuple[int, ...] | None] | None = None) -> PyTree:
    """Returns the values, on TPUs in row-major layout.

    Values that pass through a loop of one trip or none (`buffers.when`) have that layout, and XLA
    does not look behind the loop for a better one: every rank would copy them into it, though only
    the end ranks enter the loop.

    Values that XLA shards by itself keep their layouts: it would gather them first.

    Args:
      values: The values.
      dims: For each leaf the order of its dims in memory, the outermost first, or None to leave the
        leaf as it is; None for all leaves row-major.
    """
    leaves, structure = jax.tree.flatten(values)
    orders = [tuple(range(leaf.ndim)) for leaf in leaves] if dims is None else dims
    both = zip(leaves, orders, strict=True)
    placed = [(leaf, order) for leaf, order in both if order is not None]
    if xla_shards() or not placed:
        return values
    ordered = [order for _, order in placed]
    out = iter(
        lax.platform_dependent(
            [leaf for leaf, _ in placed],
            tpu=lambda leaves: list(map(_in_order, leaves, ordered)),
            default=lambda leaves: leaves,
        )
    )
    both = zip(leaves, orders, strict=True)
    return jax.tree.unflatten(
        structure, [leaf if order is None else next(out) for leaf, order in both]
    )


def _in_order(value: jax.Array, dims: tuple[int, ...]) -> jax.Array:
    # An innermost dim of size one would be padded to the width of a register.
    dims = tuple(sorted(dims, key=lambda dim: dim > 0 and value.shape[dim] != 1))
    return with_layout_constraint(value, Layout(dims))


def xla_shards() -> bool:
    """Whether there are mesh axes over which XLA shards values by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 and axis not in mesh.manual_axes for axis, size in mesh.shape.items())


def zero_after(values: PyTree, *, at: jax.Array | None = None) -> jax.Array:
    """Returns an int32 zero that is not known before an entry of each of `values` is.

    The zero is added to the slot of a write that has to come after all reads from which the values
    were computed, or of a read that must not come before its turn. XLA sees neither that nothing
    is less than -inf, nor that the loop is never run; the loop keeps the computations before it
    from being repeated wherever the zero is added.

    Args:
      values: The values that are to be known.
      at: Another such zero, the index of the entry in every dim; None for an index that XLA knows,
        so that it may compute an entry of a product by itself, and the rest of it later.
    """

    def entry(value: jax.Array) -> jax.Array:
        if at is None:
            return value[(0,) * value.ndim]
        return lax.dynamic_slice(value, (at,) * value.ndim, (1,) * value.ndim).reshape(())

    entries = [entry(value) for value in jax.tree.leaves(values) if value.size]
    below = [e < -jnp.inf for e in entries if jnp.issubdtype(e.dtype, jnp.floating)]
    count = sum((b.astype(jnp.int32) for b in below), jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda count: count > 0, lambda count: count - 1, count)


def select_after(values: PyTree, others: PyTree) -> PyTree:
    """Returns the values, selected by a predicate that is always true and reads the others."""
    bits = jnp.zeros((), jnp.int32)
    for leaf in jax.tree.leaves(others):
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact):
            # One entry is enough.
            entry = jnp.real(leaf[(0,) * leaf.ndim]).astype(jnp.float32)
            bits ^= lax.bitcast_convert_type(entry, jnp.int32)
    # Squares are 0 or 1 modulo 4. XLA does not know it, and so keeps the select.
    is_true = (bits * bits) & 2 == 0
    return jax.tree.map(lambda value: jnp.where(is_true, value, jnp.zeros_like(value)), values)
