"""Takes some leaves, such as those that have a cotangent, out of a tree, and puts them back."""

from collections.abc import Sequence
from typing import Any

import jax

from dualpipe_jax._model.types import PyTree
from dualpipe_jax._split_vjp import is_differentiable


def pick(tree: PyTree, wanted: PyTree = None) -> list[Any]:
    """Lists the wanted leaves of a tree.

    Args:
      tree: The tree.
      wanted: A bool for every leaf; None for the leaves that have a cotangent.
    """
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf, flag in zip(leaves, _flags(leaves, wanted), strict=True) if flag]


def put_leaves(tree: PyTree, picked: Sequence[Any], wanted: PyTree = None) -> PyTree:
    """Returns the tree with the `picked` leaves in the places of the wanted ones.

    Args:
      tree: The tree.
      picked: A leaf for each wanted one, in the order in which `pick` lists them.
      wanted: As for `pick`.
    """
    leaves, structure = jax.tree.flatten(tree)
    entries = [i for i, flag in enumerate(_flags(leaves, wanted)) if flag]
    for entry, leaf in zip(entries, picked, strict=True):
        leaves[entry] = leaf
    return jax.tree.unflatten(structure, leaves)


def _flags(leaves: list[Any], wanted: PyTree) -> list[bool]:
    """Lists a bool for every leaf."""
    return list(map(is_differentiable, leaves)) if wanted is None else jax.tree.leaves(wanted)
