"""Converts a module's state to `{"ends": ..., "blocks": ...}`, and back.

The layers of the module are a list of modules, or one module made by `nnx.vmap`, all of whose state
has the layers as its leading dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from dualpipe_jax._errors import raise_all, show
from dualpipe_jax._model.kinds import (
    Kind,
    group_by_kind,
    indices_in_stack,
    replicate_layers_dim,
    stack_layers,
    take_layer,
    unwrap_kinds,
)
from dualpipe_jax._model.types import Params
from dualpipe_jax.nnx._part import Path

# Names the part of parameters outside the layers, beside the kinds.
_ENDS = ("ends",)


@dataclass(frozen=True, eq=False, kw_only=True)
class Layers:
    """Converts the state of a module whose layers are at a path.

    Attributes:
      path: The path of the layers, from the module.
      kinds: The kind of every layer, in model order.
      is_stack: Whether the layers are one module, stacked.
      structures: The structure of each parameter of the module, a variable with its metadata.
      axis: The name of the layers' dim of blocks in metadata.
    """

    path: Path
    kinds: tuple[Kind, ...]
    is_stack: bool
    structures: dict[Path, Any]
    axis: str

    def params(self, module: nnx.Module) -> Params:
        """Takes the parameters from a module.

        Raises:
          ValueError: If its parameters are not those of the module from which the model was made.
          TypeError: If it is no module.
        """
        require_module(module)
        found = dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))
        raise_all(
            "module: must have the parameters of the module from which the model was made; make a "
            "new model after a change",
            (
                f"{'.'.join(map(str, path))} is {'missing' if path in self.structures else 'new'}"
                for path in {**self.structures, **found}
                if (path in found) != (path in self.structures)
            ),
        )
        ends = {path: v for path, v in found.items() if not self._is_inside(path)}
        layers = {path: v for path, v in found.items() if self._is_inside(path)}
        stacks = {kind: self._stack(kind, layers) for kind in dict.fromkeys(self.kinds)}
        return {"ends": nnx.from_flat_state(ends), "blocks": unwrap_kinds(stacks)}

    def state(self, tree: Params) -> nnx.State:
        """Makes the module's state from canonical parameters, or from a tree like them.

        Raises:
          ValueError: If it is no such tree.
        """
        parts, indices = self._parts_of(tree), indices_in_stack(self.kinds)

        def leaves_of(path: Path) -> list[Any]:
            part, path_in_part = self._locate(path)
            variable = parts[part][path_in_part]
            if part != _ENDS and not self.is_stack:
                variable = take_layer(variable, indices[path[len(self.path)]])
            return jax.tree.leaves(variable)

        return nnx.from_flat_state(
            {path: jax.tree.unflatten(s, leaves_of(path)) for path, s in self.structures.items()}
        )

    def _parts_of(self, tree: Params) -> dict[Any, dict[Path, nnx.Variable]]:
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
                nnx.to_flat_state(
                    replicate_layers_dim(state) if is_list and part != _ENDS else state
                )
            )
            for part, state in states.items()
        }
        offenders = []
        for path in self.structures:
            part, path_in_part = self._locate(path)
            name = ".".join(map(str, (_name_of(part), *path_in_part)))
            if path_in_part not in flat[part]:
                offenders.append(f"{name} is missing")
            elif is_list and part != _ENDS:
                count = self.kinds.count(part)
                offenders += [
                    f"{name} is {show(leaf)}, not of {count} layers"
                    for leaf in jax.tree.leaves(flat[part][path_in_part])
                    if np.shape(leaf)[:1] != (count,)
                ]
        raise_all(
            f"{must}, with all parameters, and the layers as the leading dim of those in blocks",
            dict.fromkeys(offenders),
        )
        return flat

    def _locate(self, path: Path) -> tuple[Any, Path]:
        """Gives the part that holds a parameter of the module, and the parameter's path in it."""
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
        states = [
            nnx.from_flat_state(
                {path[depth + 1 :]: v for path, v in layers.items() if path[depth] == layer}
            )
            for layer in group_by_kind(self.kinds, range(len(self.kinds)))[kind]
        ]
        return _named(stack_layers(states), self.axis, is_new=True)


def require_module(module: Any) -> None:
    """Requires an NNX module."""
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module: must be a flax.nnx.Module, got {show(module)}")


def _name_of(part: Any) -> str:
    return "ends" if part == _ENDS else "blocks" if part is None else f"blocks[{part!r}]"


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
