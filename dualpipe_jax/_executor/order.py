"""What runs before what, where the compiler keeps no `optimization_barrier`.

XLA's GPU compiler drops barriers before it schedules and before it decides what to copy. So what
barriers are to order in a beat comes apart: all weight grads sink to the end of the loop, the first
forward runs with nothing beside it, and slot buffers are copied because old and new values live at
once. There the order is written into the data: a value passes through a select whose predicate is
true whatever it is computed from. Elsewhere nothing is added to the program.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PyTree = Any


def wait_for(values: PyTree, others: PyTree) -> PyTree:
    """Returns the values, bit for bit; on GPUs whoever reads them waits for the others too."""
    return lax.platform_dependent(
        values, others, cuda=select_after, default=lambda values, others: values
    )


def together(*values: PyTree) -> tuple[PyTree, ...]:
    """Returns the values; on GPUs whoever reads one of them waits for all."""
    return tuple(wait_for(value, [*values[:i], *values[i + 1 :]]) for i, value in enumerate(values))


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
