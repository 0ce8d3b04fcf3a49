"""Arrays of stacked layers, outside of a step: taking single layers, and constants for a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._types import PyTree


def gathered(stack: PyTree) -> PyTree:
    """Takes the leading dim off Explicit mesh axes, over which no single layer could be taken."""

    def whole(leaf: Any) -> Any:
        sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else None
        if sharding is None or not sharding.mesh.explicit_axes:
            return leaf
        spec = jax.P(None, *sharding.spec[1:])
        return jax.sharding.reshard(leaf, jax.sharding.NamedSharding(sharding.mesh, spec))

    return jax.tree.map(whole, stack)


def as_constants(tree: PyTree) -> PyTree:
    """Makes what a step may close over: no arrays that lie on a mesh with Explicit axes."""

    def constant(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key or not leaf.is_fully_addressable else np.asarray(leaf)

    return jax.tree.map(constant, tree)
