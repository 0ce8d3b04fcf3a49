"""Partitioning metadata of the layers' dim: `nn.Partitioned` and other boxes around parameters.

A stack's boxes have one name more than a layer's, for the leading dim. Inside the blocks there are
no boxes: parameters are sharded already, and a constraint with the stack's names would not fit.
"""

from typing import Any

import jax
from flax import linen as nn
from flax.core import meta

from dualpipe_jax._model.types import PyTree


def unboxed(tree: PyTree) -> PyTree:
    """Takes every leaf out of its box, without a sharding constraint."""

    def open_box(leaf: Any) -> Any:
        while isinstance(leaf, meta.AxisMetadata):
            if isinstance(leaf, nn.Partitioned):
                leaf = leaf.unbox(apply_constraint=False)
            else:
                leaf = leaf.unbox()
        return leaf

    return jax.tree.map(open_box, tree, is_leaf=is_box)


def add_name(tree: PyTree, dim: int, name: str | None) -> PyTree:
    """Adds the name of a new dim to every box."""
    return meta.add_axis(tree, dim, {meta.PARTITION_NAME: name})


def take_name(tree: PyTree, dim: int, name: str | None) -> PyTree:
    """Removes the name of a dim from every box; boxes that list no names are given `name`."""

    def take(leaf: Any) -> Any:
        if not is_box(leaf):
            return leaf
        names = getattr(leaf, "names", None)
        if names is None:
            return leaf.remove_axis(dim, {meta.PARTITION_NAME: name})
        # A box may list names of its first dims only.
        has_name = dim < len(names)
        return leaf.remove_axis(dim, {meta.PARTITION_NAME: names[dim]}) if has_name else leaf

    return jax.tree.map(take, tree, is_leaf=is_box)


def is_box(leaf: Any) -> bool:
    """Whether a leaf is a parameter in a box."""
    return isinstance(leaf, meta.AxisMetadata)
