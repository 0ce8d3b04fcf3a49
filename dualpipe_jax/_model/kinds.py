"""Kinds of layers: the block that a layer runs, and the stack that holds its parameters.

A kind is known by its name. A model with one block for all its layers has a single kind, whose name
is None: the rest of the library sees models with kinds only. A *stack* is a pytree whose leaves
have the layers of one kind as their leading dim, in model order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from dualpipe_jax._errors import brief
from dualpipe_jax._model.types import Block, Model, PyTree

Kind = str | None
T = TypeVar("T")

# The parts of parameters.
PARTS = ("ends", "blocks", "shared")


def unwrap_kinds(by_kind: dict[Kind, T]) -> T | dict[Kind, T]:
    """Gives the entry of the only kind of a model without a layout, else the dict of all kinds."""
    return by_kind.get(None, by_kind)


def blocks_of(model: Model) -> dict[Kind, Block]:
    """Gives the block of every kind."""
    if isinstance(model.block, Mapping):
        return {**model.block}
    return {None: model.block}


def block_name(kind: Kind) -> str:
    """Names the block of a kind, in messages."""
    return "model.block" if kind is None else f"model.block[{kind!r}]"


def kinds_of(model: Model, num_layers: int) -> tuple[Kind, ...]:
    """Gives the kind of every layer, in model order."""
    return (None,) * num_layers if model.layout is None else tuple(model.layout)


def layout_of(layout: Any) -> tuple[str, ...] | None:
    """Requires the name of the kind of every layer, in a sequence, or None.

    Raises:
      TypeError: If it is neither.
    """
    if layout is None:
        return None
    is_sequence = isinstance(layout, Sequence) and not isinstance(layout, str)
    if not is_sequence or not all(isinstance(kind, str) for kind in layout):
        raise TypeError(
            f"layout={brief(layout)}: must be a sequence of strings, the name of the kind of "
            "every layer in model order, or None"
        )
    return tuple(layout)


def require_layout_length(layout: Sequence[str], num_layers: int, *, where: str = "") -> None:
    """Requires a layout to name the kind of every layer; `where` has words about the layers.

    Raises:
      ValueError: If it does not.
    """
    if len(layout) != num_layers:
        raise ValueError(
            f"layout={brief(layout)}: must name the kind of every layer, but has {len(layout)} "
            f"names for the {num_layers} layers{where}"
        )


def runs_of(kinds: tuple[Kind, ...]) -> list[tuple[Kind, int]]:
    """Lists the runs of successive layers of one kind, with their lengths.

    >>> runs_of(("dense", "moe", "moe", "moe"))
    [('dense', 1), ('moe', 3)]
    """
    return [(kind, len(list(run))) for kind, run in groupby(kinds)]


def indices_in_stack(kinds: tuple[Kind, ...]) -> list[int]:
    """Gives the index of every layer in the stack of its kind.

    >>> indices_in_stack(("dense", "moe", "dense", "moe", "moe"))
    [0, 0, 1, 1, 2]
    """
    counted: Counter[Kind] = Counter()
    indices = []
    for kind in kinds:
        indices.append(counted[kind])
        counted[kind] += 1
    return indices


def index_in_stack(kinds: tuple[Kind, ...], layer: jax.Array) -> jax.Array:
    """Gives the index of one layer, an int32 scalar, in the stack of its kind."""
    return jnp.asarray(np.asarray(indices_in_stack(kinds), np.int32))[layer]


def group_by_kind(kinds: Sequence[Kind], layers: Sequence[T]) -> dict[Kind, list[T]]:
    """Groups one value for each layer by the kinds of the layers.

    >>> group_by_kind(("dense", "moe", "moe"), ["a", "b", "c"])
    {'dense': ['a'], 'moe': ['b', 'c']}
    """
    return {
        kind: [layer for layer, k in zip(layers, kinds, strict=True) if k == kind]
        for kind in dict.fromkeys(kinds)
    }


def stack_layers(layers: Sequence[PyTree]) -> PyTree:
    """Stacks the leaves `[...]` of layers of one kind to `[num_layers, ...]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def take_layer(stack: PyTree, index: jax.Array | int) -> PyTree:
    """Takes one layer, leaves `[...]`, from a stack `[num_layers, ...]`."""
    return jax.tree.map(lambda leaf: leaf[index], stack)


def stacks_of(model: Model, blocks: PyTree) -> dict[Kind, PyTree]:
    """Gives the stack of every kind in `blocks`."""
    if model.layout is None:
        return {None: blocks}
    stacks = parts_of(blocks)
    return {kind: stacks[kind] for kind in blocks_of(model)}


def unwrap_stacks(model: Model, stacks: dict[Kind, PyTree]) -> PyTree:
    """Gives stacks of every kind the form of `blocks`, without the kinds that have no leaves."""
    if model.layout is None:
        return stacks[None]
    return {kind: stack for kind, stack in stacks.items() if jax.tree.leaves(stack)}


def put_stacks(model: Model, blocks: PyTree, stacks: dict[Kind, PyTree]) -> PyTree:
    """Returns a tree like `blocks` that holds a given tree for the stack of every kind."""
    return stacks[None] if model.layout is None else with_values(blocks, stacks)


def parts_of(mapping: Mapping) -> dict[Any, PyTree]:
    """Lists the children of a mapping as a pytree, which indexing a FrozenDict does not give."""
    children, numbers, _ = _children(mapping)
    return {key: children[number] for key, number in numbers.items()}


def with_values(mapping: Mapping, values: Mapping[Any, PyTree]) -> Any:
    """Returns a mapping of the same type, a pytree, with other values for its keys."""
    children, numbers, structure = _children(mapping)
    new = list(children)
    for key, number in numbers.items():
        new[number] = values[key]
    return structure.unflatten(new)


def _children(mapping: Mapping) -> tuple[list[PyTree], dict[Any, int], Any]:
    """Lists a mapping's children, the number of each key's among them, and the structure."""
    children, structure = jax.tree.flatten(mapping, is_leaf=lambda node: node is not mapping)
    # As the mapping indexes them: its type may be registered without keys.
    numbered = structure.unflatten(range(len(children)))
    return children, {key: numbered[key] for key in mapping}, structure


def replicate_layers_dim(stack: PyTree) -> PyTree:
    """Takes the leading dim off Explicit mesh axes, so that single layers can be taken."""

    def replicate(leaf: Any) -> Any:
        sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.Array) else None
        if sharding is None or not sharding.mesh.explicit_axes:
            return leaf
        spec = jax.P(None, *sharding.spec[1:])
        return jax.sharding.reshard(leaf, jax.sharding.NamedSharding(sharding.mesh, spec))

    return jax.tree.map(replicate, stack)


def as_constants(tree: PyTree) -> PyTree:
    """Moves arrays to the host, so that a step can close over them on any mesh.

    A step cannot close over an array that is sharded over a mesh with Explicit axes. Keys, tracers
    and arrays of several processes stay as they are.
    """

    def constant(leaf: Any) -> Any:
        if isinstance(leaf, jax.core.Tracer) or not isinstance(leaf, jax.Array):
            return leaf
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return leaf if is_key or not leaf.is_fully_addressable else np.asarray(leaf)

    return jax.tree.map(constant, tree)


def keys_of(path: Sequence[Any]) -> list[Any]:
    """Lists the keys, attribute names and indices of the entries of a path."""
    names = ("key", "name", "idx")
    return [
        next((getattr(entry, name) for name in names if hasattr(entry, name)), entry)
        for entry in path
    ]


def is_stacked(path: Sequence[Any], blocks: str) -> bool:
    """Whether a leaf holds stacked layers: it is under `blocks`, and not in a list of layers.

    Args:
      path: The path of the leaf in parameters, or in a tree that holds trees like them.
      blocks: The key or attribute under which layers are stacked.
    """
    keys = keys_of(path)
    depth = next((i for i, key in enumerate(keys) if key in (*PARTS, blocks)), None)
    if depth is None or keys[depth] != blocks:
        return False
    # A list of layers is an `nnx.List`, or the same in an `nnx.State`; in a dict `blocks` may be a
    # tuple of stacks.
    match path[depth : depth + 2]:
        case [_, DictKey(key=int())] | [GetAttrKey(), SequenceKey()]:
            return False
    return True
