"""The leaves of a tree that have a cotangent, taken out and put back."""

from collections.abc import Sequence
from typing import Any

import jax

from dualpipe_jax._split_vjp import is_differentiable

PyTree = Any


def select(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """Lists the wanted values, whatever they are."""
    return [value for value, is_wanted in zip(values, wanted, strict=True) if is_wanted]


def pick(tree: PyTree, wanted: Sequence[bool] | None = None) -> list[Any]:
    """Lists the wanted leaves: if not said, those that have a cotangent."""
    leaves = jax.tree.leaves(tree)
    wanted = [is_differentiable(leaf) for leaf in leaves] if wanted is None else wanted
    return select(leaves, wanted)


def put_leaves(tree: PyTree, picked: Sequence[Any], wanted: Sequence[bool] | None = None) -> PyTree:
    """Puts `picked` in the places of the wanted leaves of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    wanted = [is_differentiable(leaf) for leaf in leaves] if wanted is None else wanted
    rest = iter(picked)
    return jax.tree.unflatten(
        structure,
        [next(rest) if here else leaf for leaf, here in zip(leaves, wanted, strict=True)],
    )
