"""Finds the layers of a module, their kinds, and the rest of the module.

In: a module, and the path of its layers: a list of modules, or one module made by `nnx.vmap`, all
of whose state has the layers as its leading dim. Out: `Layers`, and a `Part` of the rest and of
each kind.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx

from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._model.kinds import Kind, as_constants, group_by_kind, stack_layers
from dualpipe_jax.nnx._kinds import kinds_of
from dualpipe_jax.nnx._layers import Layers, require_module
from dualpipe_jax.nnx._part import Part, Path


def take_apart(
    module: nnx.Module,
    blocks: str,
    *,
    layout: Sequence[str] | None,
    ignore: Sequence[str],
    axis: str,
) -> tuple[Layers, Part, dict[Kind, Part]]:
    """Finds the layers of a module.

    Args:
      module: The module.
      blocks: The path of the layers, names joined by ".".
      layout: The kind of every layer; None finds the kinds.
      ignore: Names of attributes in which layers of one kind may differ.
      axis: The name of the layers' dim in metadata.

    Returns:
      The layers, the rest of the module, and the part of each kind.

    Raises:
      ValueError: If there are no layers, if they share parameters with one another or with the
        rest, or if they do not fit the layout.
      TypeError: If module is no module.
    """
    require_module(module)
    path = _path(module, blocks)
    found = _get(module, path)
    is_stack = isinstance(found, nnx.Module) and not isinstance(found, nnx.List)
    layers = [found] if is_stack else list(found) if isinstance(found, Sequence | nnx.List) else []
    if not layers or not all(isinstance(layer, nnx.Module) for layer in layers):
        raise ValueError(
            f"blocks={brief(blocks)}: must be a list of modules (nnx.List), or one module whose "
            f"state is stacked by nnx.vmap; got {show(found)}"
        )
    _require_attributes(layers, ignore)
    rest = nnx.merge(*nnx.split(module))
    delattr(_get(rest, path[:-1]), path[-1])
    _require_own_parameters(module, rest, layers, blocks)
    name = f"module.{blocks}"
    if is_stack:
        if layout is not None:
            raise ValueError(
                f"layout={brief(layout)}: must be None for a stack, whose layers are all of one "
                "kind; leave it out, or make a list of layers"
            )
        kinds: tuple[Kind, ...] = (None,) * _num_layers(found, blocks)
        parts: dict[Kind, Part] = {None: Part.of(name, found)}
    else:
        kinds = kinds_of(layers, layout, ignore)
        numbered = group_by_kind(kinds, list(enumerate(layers)))
        parts = {kind: _part(name, layers_of_kind) for kind, layers_of_kind in numbered.items()}
        if layout is None and len(parts) == 1:
            kinds = (None,) * len(layers)
            parts = dict.fromkeys([None], *parts.values())
    variables = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return (
        Layers(
            path=path,
            kinds=kinds,
            is_stack=is_stack,
            structures={path: jax.tree.structure(variable) for path, variable in variables},
            axis=axis,
        ),
        Part.of("module", rest),
        parts,
    )


def _require_attributes(layers: list[nnx.Module], ignore: Sequence[str]) -> None:
    """Requires names of attributes of layers, or of modules in them."""
    paths = (path for layer in layers for path, _ in nnx.iter_graph(layer))
    known = {path[-1] for path in paths if path and isinstance(path[-1], str)}
    unknown = [name for name in ignore if name not in known]
    if unknown:
        has = sorted(name for name in known if not name.startswith("_"))
        raise ValueError(
            f"ignore={brief(ignore)}: must name attributes of layers, but they have no "
            f"{brief(unknown)[1:-1]}; they have {has[:20]}"
        )


def _part(name: str, layers: list[tuple[int, nnx.Module]]) -> Part:
    """Makes the part of the layers of one kind, given with their indices; constants are stacked."""
    parts = [Part.of(f"{name}[{index}]", layer) for index, layer in layers]
    first = parts[0]
    leaves = as_constants(stack_layers([jax.tree.leaves(part.constants) for part in parts]))
    structure = jax.tree.structure(first.constants)
    return replace(first, constants=jax.tree.unflatten(structure, leaves))


def _path(module: nnx.Module, blocks: str) -> Path:
    """Splits the path of the layers, and requires each name to be an attribute."""
    names = tuple(blocks.split(".")) if isinstance(blocks, str) else ()
    for depth, name in enumerate(names):
        holder = _get(module, names[:depth])
        if not hasattr(holder, name):
            known = [n for n, v in vars(holder).items() if isinstance(v, nnx.Pytree)]
            raise ValueError(
                f"blocks={brief(blocks)}: must name the attribute that holds the layers, but "
                f"{type(holder).__name__} has no {brief(name)}; its modules are {known}"
            )
    if not names:
        raise TypeError(
            f"blocks={brief(blocks)}: must be the name of the attribute that holds the layers"
        )
    return names


def _get(module: Any, path: Path) -> Any:
    for name in path:
        module = getattr(module, name)
    return module


def _require_own_parameters(module: Any, rest: Any, layers: list, blocks: str) -> None:
    """Requires every parameter to belong to one layer, or to the rest of the module."""

    def count(module: Any) -> int:
        return len(nnx.to_flat_state(nnx.state(module, nnx.Param)))

    if count(module) == count(rest) + sum(map(count, layers)):
        return
    owners: dict[int, list[str]] = {}
    for i, layer in enumerate(layers):
        for path, node in nnx.iter_graph(layer):
            if isinstance(node, nnx.Param):
                name = ".".join(map(str, (blocks, i, *path)))
                owners.setdefault(id(node), []).append(name)
    shared = [" and ".join(names) for names in owners.values() if len(names) > 1]
    raise_all(
        f"blocks={brief(blocks)}: layers must not share parameters, neither with one another nor "
        "with the rest of the module; for parameters that all blocks use make a dualpipe_jax.Model "
        "with params['shared']",
        [f"{name} are one" for name in shared] or ["the layers share with the rest of the module"],
    )


def _num_layers(stack: nnx.Module, blocks: str) -> int:
    """Requires one leading dim of all state of a stack."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(stack))
    shapes = [np.shape(leaf) for _, leaf in leaves]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"blocks={brief(blocks)}: must be a list of modules, or one whose state is stacked by "
            "nnx.vmap, all with the layers as leading dim; its variables have the shapes "
            f"{sorted(set(shapes))[:8]}"
        )
    return sizes.pop()[0]
