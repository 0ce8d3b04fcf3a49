"""Converts a Flax model's parameters to `{"ends": ..., "blocks": ...}`, and back.

Trees of the same form in gradients, optimizer and train states are converted too: the dicts that
hold the layers are found by the layers' names, and all other nodes stay as they are.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax._errors import brief, raise_all, require_name, show
from dualpipe_jax._model import call_checks, semantics
from dualpipe_jax._model.kinds import (
    Kind,
    group_by_kind,
    indices_in_stack,
    layout_of,
    replicate_layers_dim,
    require_layout_length,
    stack_layers,
    take_layer,
    unwrap_kinds,
)
from dualpipe_jax._model.types import PyTree
from dualpipe_jax.linen._metadata import add_name, take_name

HOLE = "{}"


def to_canonical(
    tree: PyTree,
    layers: str,
    *,
    dim: int = 0,
    axis: str = "pipe",
    layout: Sequence[str] | None = None,
) -> PyTree:
    """Converts the parameters of a Flax model, wherever in `tree`, to `{"ends": .., "blocks": ..}`.

    Args:
      tree: The parameters, or a tree that holds trees like them: gradients, an optimizer's state, a
        TrainState, all variables. Arrays, or boxes around them.
      layers: The path of the layers, names joined by "/". With "{}" for the number in the last name
        (`"layers_{}"`, `"transformer/h/{}"`): one entry for each layer, counted from 0. Without
        "{}": the layers are stacked already, as by `nn.scan` (`"decoder/layers"`).
      dim: The layers' dim of a stack, `variable_axes={"params": dim}` of `nn.scan`.
      axis: The name of the layers' dim in boxes, in place of the name that the scan gave it.
      layout: The kind of every layer, for layers of different kinds (see `Model`).

    Returns:
      The tree with `{"ends": the parameters outside the layers, "blocks": the layers, stacked}` in
      place of parameters; leaves of blocks are `[num_layers, ...]`. Without layout the blocks have
      the structure of one layer's parameters; with one they are a dict with a stack for each kind.

    Raises:
      ValueError: If no layers are found, if one is missing, if layers of one kind have different
        parameters, or if a stack has no such dim.
      TypeError: If an argument has a wrong type.

    >>> import jax.numpy as jnp, dualpipe_jax as dpj
    >>> params = {
    ...     "embed": jnp.ones(5),
    ...     "layers_0": {"w": jnp.ones(2)},
    ...     "layers_1": {"w": jnp.ones(2)},
    ... }
    >>> canonical = dpj.linen.to_canonical(params, "layers_{}")
    >>> jax.tree.map(jnp.shape, canonical)
    {'blocks': {'w': (2, 2)}, 'ends': {'embed': (5,)}}
    >>> back = dpj.linen.to_flax(canonical, "layers_{}")
    >>> jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)
    True
    """
    *parent, last = _path(layers)
    is_named = HOLE in last
    layout = _checked(layers, dim=dim, axis=axis, layout=layout)

    def convert(params: Mapping[str, PyTree]) -> PyTree:
        holder = _get(params, parent)
        call_checks.arrays(holder, "tree: params")
        if not is_named:
            _require_dim(holder[last], dim, layers)
            blocks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, dim, 0), holder[last])
            blocks = add_name(take_name(blocks, dim, axis), 0, axis)
            return {"ends": _without(params, parent, [last]), "blocks": blocks}
        names = _numbered(holder, last, layers)
        if layout is not None:
            require_layout_length(layout, len(names), where=f" {brief(layers)}")
        kinds: tuple[Kind, ...] = (None,) * len(names) if layout is None else layout
        stacks = {
            kind: _stack(names_of_kind, holder, axis)
            for kind, names_of_kind in group_by_kind(kinds, names).items()
        }
        return {"ends": _without(params, parent, names), "blocks": unwrap_kinds(stacks)}

    def holds_layers(node: Any) -> bool:
        holder = _get(node, parent)
        if not isinstance(holder, Mapping):
            return False
        return last.format(0) in holder if is_named else isinstance(holder.get(last), Mapping)

    return _map(convert, tree, holds_layers, f"the layers {brief(layers)}, as keys of a dict")


def to_flax(
    tree: PyTree,
    layers: str,
    *,
    dim: int = 0,
    axis: str = "pipe",
    partition_name: str = "layers",
    layout: Sequence[str] | None = None,
) -> PyTree:
    """Converts `{"ends": ..., "blocks": ...}`, wherever in `tree`, to a Flax model's parameters.

    The inverse of `to_canonical`, with the same arguments.

    Args:
      tree: A result of `to_canonical`: parameters, or a tree that holds trees like them.
      layers: The path of the layers in the result.
      dim: The layers' dim of a stack in the result.
      axis: The name of the layers' dim of blocks in boxes.
      partition_name: The name of the layers' dim of a stack in boxes of the result: that in
        `metadata_params` of the `nn.scan`.
      layout: The kind of every layer, for layers of different kinds.

    Returns:
      The tree with the Flax model's parameters in place of `{"ends": ..., "blocks": ...}`.

    Raises:
      ValueError: If no `{"ends": ..., "blocks": ...}` is found, or one that does not fit.
      TypeError: If an argument has a wrong type.
    """
    *parent, last = _path(layers)
    layout = _checked(layers, dim=dim, axis=axis, layout=layout)
    require_name("partition_name", partition_name)

    def convert(params: Mapping[str, PyTree]) -> PyTree:
        blocks = params["blocks"]
        call_checks.arrays(blocks, "tree: blocks")
        if HOLE not in last:
            _require_dim(blocks, dim, layers)
            blocks = add_name(take_name(blocks, 0, axis), dim, partition_name)
            blocks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, dim), blocks)
            return _with(params["ends"], parent, {last: blocks})
        blocks = replicate_layers_dim(blocks)
        stacks: Any = {None: blocks} if layout is None else blocks
        kinds: tuple[Kind, ...] = (None,) * num_layers() if layout is None else layout
        if layout is not None:
            _require_kinds(stacks, layout)
        entries = {
            last.format(layer): take_name(take_layer(stacks[kind], index), 0, axis)
            for layer, (kind, index) in enumerate(zip(kinds, indices_in_stack(kinds), strict=True))
        }
        return _with(params["ends"], parent, entries)

    def is_canonical(node: Any) -> bool:
        return isinstance(node, Mapping) and set(node) == {"ends", "blocks"}

    @functools.cache
    def num_layers() -> int:
        """Counts layers in the whole tree: a part in which an optimizer masks blocks has none."""
        nodes = filter(is_canonical, jax.tree.leaves(tree, is_leaf=is_canonical))
        leaves = [leaf for node in nodes for leaf in jax.tree.leaves(node["blocks"])]
        scalars = any(not np.ndim(leaf) for leaf in leaves)
        sizes = {np.shape(leaf)[0] for leaf in leaves if np.ndim(leaf)}
        if len(sizes) != 1 or scalars:
            raise ValueError(
                "tree: must have one leading dim, the number of layers, in all leaves of blocks; "
                f"got {brief(sorted(sizes))}{' and scalars' * scalars}; convert parameters and "
                "optimizer state together, as a pair, if all blocks are masked"
            )
        return sizes.pop()

    return _map(convert, tree, is_canonical, 'a result of to_canonical, {"ends": .., "blocks": ..}')


def _checked(
    layers: str, *, dim: Any, axis: Any, layout: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Requires arguments that fit named layers, or a stack; returns the layout as a tuple."""
    require_name("axis", axis)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim={brief(dim)}: must be an integer, got {show(dim)}")
    kinds, is_named = layout_of(layout), HOLE in layers
    if is_named and dim != 0:
        raise ValueError(
            f"dim={brief(dim)}: must be 0 for separate layers ({brief(layers)}), which have no "
            "layers' dim"
        )
    if kinds is not None and not is_named:
        raise ValueError(
            f"layout={brief(layout)}: layers of different kinds cannot be in one stack, "
            f"{brief(layers)}; "
            'give their names ("layers_{}"), or leave layout out'
        )
    return kinds


def _require_dim(stack: PyTree, dim: int, layers: str) -> None:
    """Requires every leaf of a stack to have the dim."""
    raise_all(
        f"dim={brief(dim)}: must be a dim of every leaf of the stack {brief(layers)}, that of the "
        "layers",
        (
            f"{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(stack)
            if not -jnp.ndim(leaf) <= dim < jnp.ndim(leaf)
        ),
    )


def _require_kinds(stacks: Any, layout: tuple[str, ...]) -> None:
    """Requires a stack for each kind, with as many layers as the layout has of it."""
    if not isinstance(stacks, Mapping) or set(stacks) != set(layout):
        has = sorted(map(str, stacks)) if isinstance(stacks, Mapping) else show(stacks)
        raise ValueError(
            f"layout={brief(layout)}: must name the kinds of tree's blocks, each at least once; "
            f"the kinds are {has}"
        )
    raise_all(
        f"layout={brief(layout)}: must name each kind as often as tree's blocks have layers of it",
        (
            f"blocks[{kind!r}]{jax.tree_util.keystr(path)} is of shape {jnp.shape(leaf)}, and "
            f"the layout names {kind!r} {layout.count(kind)} times"
            for kind, stack in stacks.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(stack)
            if jnp.shape(leaf)[:1] != (layout.count(kind),)
        ),
    )


def _map(
    convert: Callable[[Any], Any], tree: PyTree, is_params: Callable[[Any], bool], wanted: str
) -> PyTree:
    """Converts every subtree that is parameters; `wanted` describes these in a message."""
    nodes = jax.tree.leaves(semantics.pytree("tree", tree), is_leaf=is_params)
    if not any(map(is_params, nodes)):
        keys = brief(sorted(map(str, tree))) if isinstance(tree, Mapping) else show(tree)
        raise ValueError(
            f"tree: must hold {wanted}; found none under {keys}; give the names of the modules "
            "above them too"
        )
    return jax.tree.map(
        lambda node: convert(node) if is_params(node) else node, tree, is_leaf=is_params
    )


def _path(layers: str) -> list[str]:
    """Splits a path into names; the last alone may have the hole for a number."""
    path = layers.split("/") if isinstance(layers, str) else []
    if not all(path) or not path or HOLE in "".join(path[:-1]) or path[-1].count(HOLE) > 1:
        raise ValueError(
            f"layers={brief(layers)}: must be the name of the stack, or that of the layers with "
            f"{{}} "
            'for their number, after the names of the modules above it, joined by "/"'
        )
    return path


def _get(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _without(tree: Any, path: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Copies dicts along the path, without `names` at its end, and without emptied dicts."""
    if not path:
        return {name: value for name, value in tree.items() if name not in names}
    inner = _without(tree[path[0]], path[1:], names)
    return {
        name: inner if name == path[0] else value
        for name, value in tree.items()
        if name != path[0] or inner
    }


def _with(tree: Any, path: Sequence[str], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Copies dicts along the path, and adds entries at its end."""
    if not isinstance(tree, Mapping):
        raise ValueError(
            f'tree: must have a dict in "ends", got {show(tree)}; where an optimizer masks '
            "parameters, give it a mask with the structure of params, down to the leaves"
        )
    if not path:
        taken = sorted(map(str, tree.keys() & entries.keys()))
        if taken:
            raise ValueError(
                f'tree: "ends" has entries under the names of layers, {", ".join(taken)}, which '
                "would be lost; give the layers other names"
            )
        return {**tree, **entries}
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], entries)}


def _numbered(holder: Mapping[str, Any], last: str, layers: str) -> list[str]:
    """Lists the names of the layers in order, and requires all of them."""
    before, after = map(re.escape, last.split(HOLE))
    texts = [name for name in holder if isinstance(name, str)]
    numbers = [re.fullmatch(f"{before}([0-9]+){after}", name) for name in texts]
    count = len([match for match in numbers if match])
    names = [last.format(i) for i in range(count)]
    missing = [name for name in names if name not in holder]
    if missing:
        raise ValueError(
            f"tree: must hold every layer of {brief(layers)}, counted from 0, but of {count} "
            f"layers these are missing: {', '.join(missing)}"
        )
    return names


def _stack(names: list[str], holder: Mapping[str, Any], axis: str) -> PyTree:
    """Stacks the layers of one kind, which must have the same parameters."""
    trees = [holder[name] for name in names]
    first = jax.tree.map(jnp.shape, trees[0])
    for name, tree in zip(names, trees, strict=True):
        shapes = jax.tree.map(jnp.shape, tree)
        if shapes != first or jax.tree.structure(tree) != jax.tree.structure(trees[0]):
            raise ValueError(
                f"tree: layers of one kind must have the same parameters, but {names[0]!r} has "
                f"{first} and {name!r} has {shapes}; name the kind of every layer in layout="
            )
    return add_name(stack_layers(trees), 0, axis)
