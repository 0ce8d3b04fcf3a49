"""Layers of different kinds: which block a layer runs, and in which stack its parameters lie.

A kind is known by its name. A model with one block for all its layers is one with a single kind,
whose name is None: everything further down knows kinds only.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax

from dualpipe_jax._model.types import Model, PyTree

Kind = str | None


def blocks_of(model: Model) -> dict[Kind, Callable[..., PyTree]]:
    """Gives the block of every kind."""
    if isinstance(model.block, Mapping):
        return {**model.block}
    return {None: model.block}


def kinds_of(model: Model, num_layers: int) -> tuple[Kind, ...]:
    """Gives the kind of every layer, in model order."""
    return (None,) * num_layers if model.layout is None else tuple(model.layout)


def layout_of(layout: Any) -> tuple[str, ...] | None:
    """Requires the name of the kind of every layer, in a sequence, or None."""
    if layout is None:
        return None
    is_sequence = isinstance(layout, Sequence) and not isinstance(layout, str)
    if not is_sequence or not all(isinstance(kind, str) for kind in layout):
        raise TypeError(
            f"layout={repr(layout)[:80]}: must be a sequence of strings, the name of the kind of "
            "every layer in model order, or None"
        )
    return tuple(layout)


def stacks_of(model: Model, blocks: PyTree) -> dict[Kind, PyTree]:
    """Gives the stack of every kind, as `blocks` holds them."""
    return {None: blocks} if model.layout is None else {k: blocks[k] for k in blocks_of(model)}


def by_layout(model: Model, stacks: dict[Kind, PyTree]) -> PyTree:
    """Gives stacks of every kind the form of `blocks`, without the kinds that have no leaves."""
    if model.layout is None:
        return stacks[None]
    return {kind: stack for kind, stack in stacks.items() if jax.tree.leaves(stack)}


def in_form_of(model: Model, blocks: PyTree, stacks: dict[Kind, PyTree]) -> PyTree:
    """Puts a tree for the stack of every kind where `blocks` holds the stack."""
    return stacks[None] if model.layout is None else with_values(blocks, stacks)


def with_values(mapping: Mapping, values: Mapping[Any, PyTree]) -> Any:
    """Returns a mapping of the same type, a pytree, with other values for its keys."""
    entries, structure = jax.tree_util.tree_flatten_with_path(
        mapping, is_leaf=lambda node: node is not mapping
    )
    return structure.unflatten([values[path[0].key] for path, _ in entries])


def runs_of(kinds: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
    """Lists the runs of layers of one kind, and how long each is.

    >>> runs_of(("dense", "moe", "moe", "moe"))
    [('dense', 1), ('moe', 3)]
    """
    return [(kind, len(list(run))) for kind, run in groupby(kinds)]


def places_of(kinds: tuple[Kind, ...]) -> list[int]:
    """Gives the place of every layer among those of its kind.

    >>> places_of(("dense", "moe", "dense", "moe", "moe"))
    [0, 0, 1, 1, 2]
    """
    return [kinds[:layer].count(kind) for layer, kind in enumerate(kinds)]


def block_name(kind: Kind) -> str:
    """Names the block of a kind, in messages."""
    return "model.block" if kind is None else f"model.block[{kind!r}]"
