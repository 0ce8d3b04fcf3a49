"""A module's state as `{"ends": ..., "blocks": ...}`, and back.

In: a module, and where its layers are: a list of modules, or one module made by `nnx.vmap`, all of
whose state has the layers as its leading dim. Out: `Layers`, which takes the state apart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dualpipe_jax._errors import raise_all, show
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model import stacks as _stacks
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import PyTree
from dualpipe_jax.nnx._kinds import kinds_of
from dualpipe_jax.nnx._part import Part, Path

# The part of canonical parameters beside those of the kinds.
_ENDS = ("ends",)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layers:
    """Where a module's layers are, and what kind each is of.

    Attributes:
      path: Where they are, from the module.
      kinds: The kind of every layer, in model order.
      is_stack: Whether they are one module, stacked.
      structures: The structure of each parameter of the module, a variable with its metadata.
      axis: The name that metadata gets for the layers' dim of blocks.
    """

    path: Path
    kinds: tuple[Kind, ...]
    is_stack: bool
    structures: dict[Path, Any]
    axis: str

    def params(self, module: nnx.Module) -> PyTree:
        """Takes the parameters of the module apart.

        Raises:
          ValueError: If it is not the module that the model was made of, or one like it.
          TypeError: If it is no module.
        """
        _require_module(module)
        found = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
        raise_all(
            "module: must have the parameters of the module of which the model was made; make a "
            "new model of what was changed",
            (
                f"{'.'.join(map(str, path))} is {'missing' if path in self.structures else 'new'}"
                for path in {**self.structures, **found}
                if (path in found) != (path in self.structures)
            ),
        )
        ends = {path: v for path, v in found.items() if not self._is_inside(path)}
        layers = {path: v for path, v in found.items() if self._is_inside(path)}
        stacks = {kind: self._stack(kind, layers) for kind in dict.fromkeys(self.kinds)}
        return {
            "ends": nnx.from_flat_state(ends),
            "blocks": stacks.get(None, stacks),
        }

    def state(self, tree: PyTree) -> nnx.State:
        """Puts the module's state together of canonical parameters, or of trees like them.

        Raises:
          ValueError: If it is nothing of the kind.
        """
        parts, places = self._parts_of(tree), _kinds.places_of(self.kinds)

        def value_of(path: Path) -> list[Any]:
            part, rest = self._place_of(path)
            leaves = jax.tree.leaves(parts[part][rest])
            if part == _ENDS or self.is_stack:
                return leaves
            place = places[path[len(self.path)]]
            return [leaf[place] for leaf in leaves]

        return nnx.from_flat_state(
            {path: jax.tree.unflatten(s, value_of(path)) for path, s in self.structures.items()}
        )

    def _parts_of(self, tree: PyTree) -> dict[Any, dict[Path, nnx.Variable]]:
        """Requires canonical parameters, or a tree like them; returns the variables of each part.

        The parts are `_ENDS` and the kinds.
        """
        must = 'tree: must be {"ends": .., "blocks": ..}, as model.params returns it'
        if not isinstance(tree, Mapping) or set(tree) != {"ends", "blocks"}:
            raise ValueError(f"{must}, got {show(tree)}")
        stacks = {None: tree["blocks"]} if None in self.kinds else tree["blocks"]
        if not isinstance(stacks, Mapping) or set(stacks) != set(self.kinds):
            kinds = list(dict.fromkeys(self.kinds))
            raise ValueError(f"{must}, with blocks of the kinds {kinds}, got {show(tree)}")
        states = {_ENDS: tree["ends"], **stacks}
        raise_all(
            f"{must}, with an nnx.State in each",
            (
                f"{_name_of(part)} is {show(state)}"
                for part, state in states.items()
                if not isinstance(state, nnx.State)
            ),
        )
        is_list = not self.is_stack
        flat = {
            part: dict(
                nnx.to_flat_state(_stacks.gathered(state) if is_list and part != _ENDS else state)
            )
            for part, state in states.items()
        }
        offenders = []
        for path in self.structures:
            part, rest = self._place_of(path)
            name = ".".join(map(str, (_name_of(part), *rest)))
            if rest not in flat[part]:
                offenders.append(f"{name} is missing")
            elif is_list and part != _ENDS:
                count = self.kinds.count(part)
                offenders += [
                    f"{name} is {show(leaf)}, not of {count} layers"
                    for leaf in jax.tree.leaves(flat[part][rest])
                    if np.shape(leaf)[:1] != (count,)
                ]
        raise_all(
            f"{must}, with all parameters, and the layers as the leading dim of those in blocks",
            dict.fromkeys(offenders),
        )
        return flat

    def _place_of(self, path: Path) -> tuple[Any, Path]:
        """Says in which part a parameter of the module stands, and under which path."""
        depth = len(self.path)
        if not self._is_inside(path):
            return _ENDS, path
        if self.is_stack:
            return None, path[depth:]
        return self.kinds[path[depth]], path[depth + 1 :]

    def _is_inside(self, path: Path) -> bool:
        return path[: len(self.path)] == self.path

    def _stack(self, kind: Kind, layers: dict[Path, nnx.Variable]) -> nnx.State:
        """Stacks the parameters of a kind."""
        depth = len(self.path)
        if self.is_stack:
            stack = nnx.from_flat_state({path[depth:]: v for path, v in layers.items()})
            return _named(stack, self.axis, is_new=False)
        own = [
            {path[depth + 1 :]: v for path, v in layers.items() if path[depth] == layer}
            for layer, k in enumerate(self.kinds)
            if k == kind
        ]
        stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.from_flat_state, own))
        return _named(stack, self.axis, is_new=True)


def take_apart(
    module: nnx.Module,
    blocks: str,
    *,
    layout: Sequence[str] | None,
    ignore: Sequence[str],
    axis: str,
) -> tuple[Layers, Part, dict[Kind, Part]]:
    """Finds the layers of a module; returns them, the rest of it, and a layer of each kind.

    Raises:
      ValueError: If there are no layers, if they share parameters with one another or with the
        rest, or if they do not fit the layout.
      TypeError: If module is none.
    """
    _require_module(module)
    path = _path(module, blocks)
    found = _get(module, path)
    is_stack = isinstance(found, nnx.Module) and not isinstance(found, nnx.List)
    layers = [found] if is_stack else list(found) if isinstance(found, Sequence | nnx.List) else []
    if not layers or not all(isinstance(layer, nnx.Module) for layer in layers):
        raise ValueError(
            f"blocks={blocks!r}: must be a list of modules (nnx.List), or one module whose state "
            f"is stacked by nnx.vmap; got {show(found)}"
        )
    _require_attributes(layers, ignore)
    rest = nnx.merge(*nnx.split(module))
    delattr(_get(rest, path[:-1]), path[-1])
    _require_own_parameters(module, rest, layers, blocks)
    name = f"module.{blocks}"
    if is_stack:
        if layout is not None:
            raise ValueError(
                f"layout={tuple(layout)!r}: layers of a stack are of one kind; leave it out, or "
                "have a list of layers"
            )
        kinds: tuple[Kind, ...] = (None,) * _num_layers(found, blocks)
        parts: dict[Kind, Part] = {None: Part.of(name, found)}
    else:
        kinds = kinds_of(layers, layout, ignore)
        parts = {kind: _part(name, layers, kinds, kind) for kind in dict.fromkeys(kinds)}
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


def _require_module(module: Any) -> None:
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module: must be a flax.nnx.Module, got {show(module)}")


def _require_attributes(layers: list[nnx.Module], ignore: Sequence[str]) -> None:
    """Requires names that an attribute of a layer has, or of a module in it."""
    paths = (path for layer in layers for path, _ in nnx.iter_graph(layer))
    known = {path[-1] for path in paths if path and isinstance(path[-1], str)}
    unknown = [name for name in ignore if name not in known]
    if unknown:
        has = sorted(name for name in known if not name.startswith("_"))
        raise ValueError(
            f"ignore={ignore!r}: must name attributes of layers, but they have no "
            f"{', '.join(map(repr, unknown))}; they have {has[:20]}"
        )


def _name_of(part: Any) -> str:
    return "ends" if part == _ENDS else "blocks" if part is None else f"blocks[{part!r}]"


def _part(name: str, layers: list, kinds: tuple[Kind, ...], kind: Kind) -> Part:
    """Makes the part of a kind, its constants stacked."""
    parts = [
        Part.of(f"{name}[{layer}]", layers[layer]) for layer, k in enumerate(kinds) if k == kind
    ]
    values = [jax.tree.leaves(part.constants) for part in parts]
    stacked = [jnp.stack(leaves) for leaves in zip(*values, strict=True)]
    first = parts[0]
    constants = jax.tree.unflatten(
        jax.tree.structure(first.constants), _stacks.as_constants(stacked)
    )
    return replace(first, constants=constants)


def _path(module: nnx.Module, blocks: str) -> Path:
    names = tuple(blocks.split(".")) if isinstance(blocks, str) else ()
    for depth, name in enumerate(names):
        holder = _get(module, names[:depth])
        if not hasattr(holder, name):
            known = [n for n, v in vars(holder).items() if isinstance(v, nnx.Pytree)]
            raise ValueError(
                f"blocks={blocks!r}: must name the attribute that holds the layers, but "
                f"{type(holder).__name__} has no {name!r}; its modules are {known}"
            )
    if not names:
        raise TypeError(f"blocks={blocks!r}: must be the name of the attribute with the layers")
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
        f"blocks={blocks!r}: layers must have parameters of their own, which no other layer and "
        "nothing else in the module holds; make a dualpipe_jax.Model with params['shared'] for "
        "what all blocks use",
        [f"{name} are one" for name in shared] or ["the layers share with the rest of the module"],
    )


def _num_layers(stack: nnx.Module, blocks: str) -> int:
    """Requires one leading dim of all state of a stack."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(stack))
    shapes = [np.shape(leaf) for _, leaf in leaves]
    sizes = {shape[:1] for shape in shapes}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"blocks={blocks!r}: must be a list of modules, or one whose state is stacked by "
            "nnx.vmap, all with the layers as leading dim; its variables have the shapes "
            f"{sorted(set(shapes))[:8]}"
        )
    return sizes.pop()[0]


def _named(stack: nnx.State, axis: str, *, is_new: bool) -> nnx.State:
    """Names the layers' dim in the metadata of all variables of a stack."""

    def name(variable: Any) -> Any:
        # A copy: the module's own variables stay as they are.
        variable = jax.tree.map(lambda leaf: leaf, variable)
        names = variable.get_metadata().get("out_sharding")
        if names is not None and names != ():
            # A stack made without `transform_metadata` has no name for the dim.
            is_missing = is_new or len(names) < variable.get_value().ndim
            variable.set_metadata(out_sharding=(axis, *(names if is_missing else names[1:])))
        return variable

    return jax.tree.map(name, stack, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
