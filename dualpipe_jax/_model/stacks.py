"""Arrays of stacked layers, outside of a step: finding them, taking single layers, constants."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from dualpipe_jax._model.types import PyTree

# The parts of parameters.
PARTS = ("ends", "blocks", "shared")


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


def keys_of(path: Sequence[Any]) -> list[Any]:
    """Lists the keys, attributes and numbers that the entries of a path stand for."""
    names = ("key", "name", "idx")
    return [
        next((getattr(entry, name) for name in names if hasattr(entry, name)), entry)
        for entry in path
    ]


def is_stacked(path: Sequence[Any], blocks: str) -> bool:
    """Whether a leaf holds stacked layers: it stands under `blocks`, and not in a list of layers.

    `path` is that of the leaf in parameters, or in a tree that holds trees like them.
    """
    keys = keys_of(path)
    place = next((i for i, key in enumerate(keys) if key in (*PARTS, blocks)), None)
    if place is None or keys[place] != blocks:
        return False
    # A list of layers is an `nnx.List`, or the same in an `nnx.State`; in a dict a tuple of stacks
    # may stand under `blocks`.
    match path[place : place + 2]:
        case [_, DictKey(key=int())] | [GetAttrKey(), SequenceKey()]:
            return False
    return True
