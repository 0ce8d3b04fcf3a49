"""Converts between a user's tree and `{"ends": ..., "blocks": ..., "shared": ...}`.

`ends` and `shared` are dicts by path, blocks a dict of stacks by the path within a layer, in a dict
by kind where there are several kinds.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dualpipe_jax._errors import raise_all, show
from dualpipe_jax._from_loss.places import OVERWRITTEN, Place, Places
from dualpipe_jax._model.kinds import group_by_kind, indices_in_stack, replicate_layers_dim
from dualpipe_jax._model.types import Params, PyTree


@dataclass(frozen=True)
class Conversion:
    """Converts trees.

    Attributes:
      places: The place of every leaf.
      kinds: The kind of every layer; all None for layers of one kind.
      shared: The paths of the parameters outside of the layers that layers read.
    """

    places: Places
    kinds: tuple[str | None, ...]
    shared: frozenset[str]

    @functools.cached_property
    def structure(self) -> Any:
        """The structure of converted trees."""
        return jax.tree.structure(self._build(self.places.avals, lambda layers, name: 0))

    def params(self, tree: PyTree) -> Params:
        """Converts a user's tree; layers of their own are stacked, a whole stack stays as it is."""
        leaves = self._leaves(tree)
        values = {
            (layer, place.name): (leaf, layer - place.layers.start if place.num_stacked else None)
            for place, leaf in zip(self.places.leaves, leaves, strict=True)
            for layer in place.layers
        }
        return self._build(leaves, lambda layers, name: _stack([values[n, name] for n in layers]))

    def tree(self, canonical: Params) -> PyTree:
        """Converts parameters or gradients back to the user's tree."""
        blocks = canonical["blocks"]
        replicated = replicate_layers_dim(blocks)
        stacks: Any = {None: replicated} if None in self.kinds else replicated
        indices = indices_in_stack(self.kinds)

        def layer_of(place: Place, layer: int) -> Any:
            stack = stacks[self.kinds[layer]][place.name]
            return stack[indices[layer], ...]  # an array also of NumPy's, for integers' gradients

        def value(place: Place) -> Any:
            if place.layer is None:
                part = "shared" if place.path in self.shared else "ends"
                return canonical[part][place.path]
            if place.num_stacked is None:
                return layer_of(place, place.layer)
            if len(place.layers) == len(self.kinds) and None in self.kinds:
                return blocks[place.name]
            layers = [layer_of(place, layer) for layer in place.layers]
            return _numpy_of(layers).stack(layers)

        return self.places.structure.unflatten([value(place) for place in self.places.leaves])

    def specs(self, argument: str, specs: PyTree) -> PyTree:
        """Converts PartitionSpecs, whose leaves may stand for branches of the user's tree."""
        if specs is None:
            return None
        leaves = self.users_specs(argument, specs)
        stacked = [
            PartitionSpec(None, *(spec or ()))
            if place.layer is not None and not place.num_stacked
            # The pipeline's axis may be named for the layers' dim of a stack.
            else (spec or PartitionSpec())
            for place, spec in zip(self.places.leaves, leaves, strict=True)
        ]
        return self._merge(argument, stacked)

    def users_specs(self, argument: str, specs: PyTree) -> list[PartitionSpec | None]:
        """Gives every leaf of the user's tree its spec, or None."""

        def is_spec(leaf: Any) -> bool:
            return leaf is None or isinstance(leaf, PartitionSpec)

        leaves = self._spread(argument, specs, is_spec)
        raise_all(
            f"{argument}: must hold PartitionSpecs",
            (
                f"that of {place.path} is {show(leaf)}"
                for place, leaf in zip(self.places.leaves, leaves, strict=True)
                if not is_spec(leaf)
            ),
            error=TypeError,
        )
        return leaves

    def flags(self, argument: str, flags: PyTree) -> PyTree:
        """Converts bools, whose leaves may stand for branches of the user's tree."""
        return self._merge(argument, self._spread(argument, flags, lambda leaf: leaf is None))

    def overwritten(self) -> PyTree:
        """Finds the parameters in Flax's collection of those that gradients overwrite, if any."""
        flags = [OVERWRITTEN in place.path.split("/") for place in self.places.leaves]
        return self._merge("overwrite", flags) if any(flags) else None

    def _merge(self, argument: str, leaves: Sequence[Any]) -> PyTree:
        """Makes a tree with one value for the layers of a kind, which must agree."""
        values = {
            (layer, place.name): leaf
            for place, leaf in zip(self.places.leaves, leaves, strict=True)
            for layer in place.layers
        }

        def merge(layers: Sequence[int], name: str) -> Any:
            raise_all(
                f"{argument}: layers of one kind are stacked, so all must have the same entry "
                f"for {name!r}; give layer {layers[0]}'s, {values[layers[0], name]}, to all",
                (
                    f"layer {layer} has {values[layer, name]}"
                    for layer in layers
                    if values[layer, name] != values[layers[0], name]
                ),
            )
            return values[layers[0], name]

        return self._build(leaves, merge)

    def _build(
        self, leaves: Sequence[Any], of_layers: Callable[[Sequence[int], str], Any]
    ) -> Params:
        """Builds a canonical tree; `of_layers` gives the value of some layers' leaf by its name."""
        names: dict[int, list[str]] = {layer: [] for layer in range(len(self.kinds))}
        for place in self.places.leaves:
            for layer in place.layers:
                names[layer].append(place.name)
        stacks: dict[Any, dict[str, Any]] = {
            kind: {name: of_layers(layers, name) for name in names[layers[0]]}
            for kind, layers in group_by_kind(self.kinds, range(len(self.kinds))).items()
        }
        outside = {
            place.path: leaf
            for place, leaf in zip(self.places.leaves, leaves, strict=True)
            if place.layer is None
        }
        ends = {path: leaf for path, leaf in outside.items() if path not in self.shared}
        shared = {path: leaf for path, leaf in outside.items() if path in self.shared}
        canonical = {"ends": ends, "blocks": stacks.get(None, stacks)}
        return canonical | ({"shared": shared} if shared else {})

    def _leaves(self, tree: PyTree) -> list[Any]:
        """Lists the leaves of a user's tree, which must be one like that of `from_loss`."""
        leaves, structure = jax.tree.flatten(tree)
        if structure != self.places.structure:
            raise ValueError(
                "params: must have the structure of the parameters given to from_loss, "
                f"{_cut(self.places.structure)}; got {_cut(structure)}"
            )
        raise_all(
            "params: must have the shapes and dtypes of the parameters given to from_loss",
            (
                f"{place.path} is {jnp.result_type(leaf)}{list(jnp.shape(leaf))}, not "
                f"{aval.dtype}{list(aval.shape)}"
                for place, aval, leaf in zip(
                    self.places.leaves, self.places.avals, leaves, strict=True
                )
                if jnp.shape(leaf) != aval.shape or jnp.result_type(leaf) != aval.dtype
            ),
        )
        return leaves

    def _spread(self, argument: str, prefix: PyTree, is_leaf: Callable[[Any], bool]) -> list[Any]:
        """Gives every leaf of the user's tree the entry that stands for it."""
        whole = self.places.structure.unflatten(range(len(self.places.leaves)))
        # In boxes, as an entry of None is a leaf, and a None of the user's tree is none.
        boxes = jax.tree.map(_Box, prefix, is_leaf=is_leaf)
        try:
            full = jax.tree.broadcast(boxes, whole)
        except ValueError as error:
            raise ValueError(
                f"{argument}: must have the structure of the user's own parameters, with leaves "
                f"that may stand for whole branches ({error})"
            ) from error
        return [box.entry for box in jax.tree.leaves(full)]


@dataclass(frozen=True)
class _Box:
    """Makes any entry a leaf."""

    entry: Any


def _stack(parts: Sequence[tuple[Any, int | None]]) -> Any:
    """Stacks layers: leaves of their own, and entries of stacks; a whole stack stays as it is."""
    (first, _), *_ = parts
    is_whole = [index for leaf, index in parts if leaf is first] == list(range(len(parts)))
    if is_whole and len(parts) == len(first):
        return first
    layers = [
        leaf if index is None else replicate_layers_dim(leaf)[index, ...] for leaf, index in parts
    ]
    return _numpy_of(layers).stack(layers)


def _numpy_of(leaves: Sequence[Any]) -> Any:
    """Chooses NumPy for arrays that are NumPy's (gradients of integers), and else JAX's."""
    return np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp


def _cut(structure: Any) -> str:
    text = str(structure)
    return text if len(text) < 400 else f"{text[:400]}.."
