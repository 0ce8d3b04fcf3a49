"""The parameters of a Flax model as `{"ends": ..., "blocks": ...}`, and back.

Also trees of the same form anywhere in gradients, optimizer and train states: what holds the layers
is found by their names, and everything else is left as it is.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax import _errors
from dualpipe_jax._errors import raise_all, show
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model import stacks as _stacks
from dualpipe_jax._model.types import PyTree
from dualpipe_jax.linen import _metadata as metadata

HOLE = "{}"


def to_canonical(
    tree: PyTree,
    layers: str,
    *,
    dim: int = 0,
    axis: str = "pipe",
    layout: Sequence[str] | None = None,
) -> PyTree:
    """Makes `{"ends": ..., "blocks": ...}` of the parameters of a Flax model, wherever they stand.

    Args:
      tree: The parameters, or a tree that holds trees like them: gradients, an optimizer's state, a
        TrainState, all variables. Arrays, or boxes around them.
      layers: Where the layers are, as names joined by "/". With "{}" for the number in the last
        name (`"layers_{}"`, `"transformer/h/{}"`): one entry for each layer, counted from 0.
        Without: the layers are stacked already, as by `nn.scan` (`"decoder/layers"`).
      dim: The layers' dim of a stack, `variable_axes={"params": dim}` of `nn.scan`.
      axis: The name that boxes get for the layers' dim, in place of what the scan called it.
      layout: The kind of every layer, for layers of different kinds (see `Model`).

    Returns:
      The tree with `{"ends": what is left of the parameters, "blocks": the layers, stacked}` in
      place of parameters; leaves of blocks are `[num_layers, ...]`. Without layout the blocks have
      the structure of one layer's parameters, else are a dict with a stack for each kind.

    Raises:
      ValueError: If no layers are found, if one is missing, if layers that are to be stacked are
        not alike, or if a stack has no such dim.
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
        if not is_named:
            _require_dim(holder[last], dim, layers)
            blocks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, dim, 0), holder[last])
            blocks = metadata.add_name(metadata.take_name(blocks, dim, axis), 0, axis)
            return {"ends": _without(params, parent, [last]), "blocks": blocks}
        names = _numbered(holder, last, layers)
        if layout is not None and len(layout) != len(names):
            raise ValueError(
                f"layout={layout!r}: must name the kind of every layer, but names "
                f"{len(layout)}, and {layers!r} has {len(names)}"
            )
        kinds = (None,) * len(names) if layout is None else layout
        stacks = {
            kind: _stack([n for n, k in zip(names, kinds, strict=True) if k == kind], holder, axis)
            for kind in dict.fromkeys(kinds)
        }
        blocks = stacks[None] if layout is None else stacks
        return {"ends": _without(params, parent, names), "blocks": blocks}

    def holds_layers(node: Any) -> bool:
        holder = _get(node, parent)
        if not isinstance(holder, Mapping):
            return False
        return last.format(0) in holder if is_named else isinstance(holder.get(last), Mapping)

    what = f"the layers {layers!r}, as keys of a dict"
    return _map(convert, tree, holds_layers, what)


def to_flax(
    tree: PyTree,
    layers: str,
    *,
    dim: int = 0,
    axis: str = "pipe",
    partition_name: str = "layers",
    layout: Sequence[str] | None = None,
) -> PyTree:
    """Makes the parameters of a Flax model of `{"ends": ..., "blocks": ...}`, wherever they stand.

    The inverse of `to_canonical`, with the same arguments.

    Args:
      tree: What `to_canonical` returns: parameters, or a tree that holds trees like them.
      layers: Where the layers are to be.
      dim: The layers' dim of a stack.
      axis: The name that boxes have for the layers' dim of blocks.
      partition_name: The name that boxes of a stack get for the layers' dim: that in
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

    def convert(params: Mapping[str, PyTree]) -> PyTree:
        blocks = params["blocks"]
        if HOLE not in last:
            _require_dim(blocks, dim, layers)
            blocks = metadata.add_name(metadata.take_name(blocks, 0, axis), dim, partition_name)
            blocks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, dim), blocks)
            return _with(params["ends"], parent, {last: blocks})
        blocks = _stacks.gathered(blocks)
        stacks: Any = {None: blocks} if layout is None else blocks
        kinds = (None,) * num_layers() if layout is None else layout
        if layout is not None:
            _require_kinds(stacks, layout)
        places = _kinds.places_of(kinds)
        found = {
            last.format(i): _layer(stacks[kind], place, axis)
            for i, (kind, place) in enumerate(zip(kinds, places, strict=True))
        }
        return _with(params["ends"], parent, found)

    def is_canonical(node: Any) -> bool:
        return isinstance(node, Mapping) and set(node) == {"ends", "blocks"}

    @functools.cache
    def num_layers() -> int:
        """Counts layers in all of the tree: where an optimizer masks the blocks, none are left."""
        nodes = filter(is_canonical, jax.tree.leaves(tree, is_leaf=is_canonical))
        sizes = {leaf.shape[0] for node in nodes for leaf in jax.tree.leaves(node["blocks"])}
        if len(sizes) != 1:
            raise ValueError(
                "tree: must have one leading dim, the number of layers, in all leaves of blocks; "
                f"got {sorted(sizes)}; convert parameters and optimizer state together, as a pair, "
                "if all blocks are masked"
            )
        return sizes.pop()

    return _map(convert, tree, is_canonical, 'what to_canonical makes, {"ends": .., "blocks": ..}')


def _checked(
    layers: str, *, dim: Any, axis: Any, layout: Sequence[str] | None
) -> tuple[str, ...] | None:
    """Requires arguments that fit the layers, named or a stack; returns the layout as a tuple."""
    _errors.name("axis", axis)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim={dim!r}: must be an integer, got {show(dim)}")
    kinds, is_named = _kinds.layout_of(layout), HOLE in layers
    if is_named and dim != 0:
        raise ValueError(
            f"dim={dim}: must be 0 for layers by name ({layers!r}), which are no stack"
        )
    if kinds is not None and not is_named:
        raise ValueError(
            f"layout={layout!r}: layers of different kinds cannot be in one stack, {layers!r}; "
            'give their names ("layers_{}"), or leave layout out'
        )
    return kinds


def _require_dim(stack: PyTree, dim: int, layers: str) -> None:
    """Requires every leaf of a stack to have the dim."""
    raise_all(
        f"dim={dim}: must be a dim of every leaf of the stack {layers!r}, that of the layers",
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
            f"layout={layout!r}: must name the kinds of tree's blocks, each at least once; these "
            f"have {has}"
        )
    raise_all(
        f"layout={layout!r}: must name the kind of every layer, as many of each as tree's blocks "
        "have",
        (
            f"blocks[{kind!r}]{jax.tree_util.keystr(path)} is of shape {jnp.shape(leaf)}, and "
            f"{kind!r} is named {layout.count(kind)} times"
            for kind, stack in stacks.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(stack)
            if jnp.shape(leaf)[:1] != (layout.count(kind),)
        ),
    )


def _map(
    convert: Callable[[Any], Any], tree: PyTree, is_params: Callable[[Any], bool], what: str
) -> PyTree:
    """Converts every subtree that is parameters."""
    nodes = jax.tree.leaves(tree, is_leaf=is_params)
    if not any(map(is_params, nodes)):
        keys = sorted(map(str, tree)) if isinstance(tree, Mapping) else show(tree)
        raise ValueError(
            f"tree: must hold {what}; found none under {keys}; mind the names of the modules above"
        )
    return jax.tree.map(
        lambda node: convert(node) if is_params(node) else node, tree, is_leaf=is_params
    )


def _path(layers: str) -> list[str]:
    """Splits the names, of which the last alone may have the number."""
    path = layers.split("/") if isinstance(layers, str) else []
    if not all(path) or not path or HOLE in "".join(path[:-1]) or path[-1].count(HOLE) > 1:
        raise ValueError(
            f"layers={layers!r}: must be the name of the stack, or that of the layers with {{}} "
            'for their number; after the names of the modules above, joined by "/"'
        )
    return path


def _get(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def _without(tree: Any, path: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Copies dicts along the path, leaving out names at its end, and what is empty then."""
    if not path:
        return {name: value for name, value in tree.items() if name not in names}
    inner = _without(tree[path[0]], path[1:], names)
    return {
        name: inner if name == path[0] else value
        for name, value in tree.items()
        if name != path[0] or inner
    }


def _with(tree: Any, path: Sequence[str], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Copies dicts along the path, with more entries at its end."""
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
    """Lists the names of the layers in order, of which none may be missing."""
    before, after = map(re.escape, last.split(HOLE))
    numbers = [re.fullmatch(f"{before}([0-9]+){after}", name) for name in holder]
    count = len([match for match in numbers if match])
    names = [last.format(i) for i in range(count)]
    missing = [name for name in names if name not in holder]
    if missing:
        raise ValueError(
            f"tree: must hold every layer of {layers!r}, counted from 0, but of {count} layers "
            f"these are missing: {', '.join(missing)}"
        )
    return names


def _stack(names: list[str], holder: Mapping[str, Any], axis: str) -> PyTree:
    trees = [holder[name] for name in names]
    first = jax.tree.map(jnp.shape, trees[0])
    for name, tree in zip(names, trees, strict=True):
        shapes = jax.tree.map(jnp.shape, tree)
        if shapes != first or jax.tree.structure(tree) != jax.tree.structure(trees[0]):
            raise ValueError(
                f"tree: layers of one kind must have the same parameters, but {names[0]!r} has "
                f"{first} and {name!r} has {shapes}; name the kind of every layer in layout="
            )
    return metadata.add_name(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), 0, axis)


def _layer(stack: PyTree, place: int, axis: str) -> PyTree:
    return metadata.take_name(jax.tree.map(lambda leaf: leaf[place], stack), 0, axis)
