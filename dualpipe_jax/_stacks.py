"""Arrays of stacked layers, outside of a step: one layer out of a stack, and constants for a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._types import PyTree


def layer_of(leaf: Any, place: int) -> Any:
    """Takes the entry `place` of the leading dim, also where that is spread over Explicit axes."""
    if isinstance(leaf, jax.Array):
        sharding = jax.typeof(leaf).sharding
        if sharding.mesh.explicit_axes:
            spec = jax.sharding.NamedSharding(sharding.mesh, jax.P(*sharding.spec[1:]))
            return leaf.at[place].get(out_sharding=spec)
    return leaf[place]


def as_constants(tree: PyTree) -> PyTree:
    """Makes what a step may close over: no arrays that lie on a mesh with Explicit axes."""

    def constant(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key or not leaf.is_fully_addressable else np.asarray(leaf)

    return jax.tree.map(constant, tree)
