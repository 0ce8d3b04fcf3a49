"""Finds the layers among a user's parameters: which leaf is which part of which layer.

In: a tree of parameters, and the paths of the layers. Out: `Places`, a `Place` for each leaf.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._errors import brief, raise_all
from dualpipe_jax._model.kinds import keys_of
from dualpipe_jax._model.types import PyTree

HOLE = "{}"
# Flax's collection of variables that gradients overwrite; its paths are those of the parameters.
OVERWRITTEN = "_overwrite_with_gradient"


@dataclass(frozen=True)
class Place:
    """Says whose parameter a leaf is.

    Attributes:
      path: The leaf's path in the whole tree, names joined by "/".
      name: Its path within a layer; for a leaf outside of the layers, the same as `path`.
      layer: The layer, or the first layer of a stack; None for a leaf outside of the layers.
      num_stacked: The number of layers in a stack; None for a leaf of one layer, or outside.
    """

    path: str
    name: str
    layer: int | None = None
    num_stacked: int | None = None

    @property
    def layers(self) -> range:
        """The layers that have their parameters in this leaf."""
        if self.layer is None:
            return range(0)
        return range(self.layer, self.layer + (self.num_stacked or 1))


@dataclass(frozen=True)
class Places:
    """Holds the place of every leaf, in the order of the leaves.

    Attributes:
      leaves: The place of each leaf.
      avals: The shape and dtype of each leaf.
      structure: The structure of the user's tree.
      num_layers: The number of layers.
    """

    leaves: tuple[Place, ...]
    avals: tuple[jax.ShapeDtypeStruct, ...]
    structure: Any
    num_layers: int


def find_places(params: PyTree, layers: Sequence[str], shared: Sequence[str]) -> Places:
    """Finds the place of every leaf.

    Args:
      params: The user's parameters.
      layers: A pattern for each group of layers, in the order in which they run: `"layers_{}"` for
        layers of their own, counted from 0, or the path of a stack.
      shared: Paths that count as outside of the layers, although a pattern matches them.

    Raises:
      ValueError: If a pattern matches no leaf, if layers are missing, if a stack has several sizes,
        or if two patterns match one leaf.

    >>> import jax.numpy as jnp
    >>> tree = {"embed": jnp.ones(2), "layers": [{"w": jnp.ones(3)}, {"w": jnp.ones(3)}]}
    >>> for place in find_places(tree, ["layers/{}"], []).leaves:
    ...     print(place.path, place.name, list(place.layers))
    embed embed []
    layers/0/w w [0]
    layers/1/w w [1]
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [_path(path) for path, _ in flat]
    avals = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for _, x in flat]
    raise_all(
        "params: paths must be unique, joined by '/'; rename keys that hold a '/'",
        sorted({path for path in paths if paths.count(path) > 1}),
    )
    raise_all(
        "shared: must be paths of parameters, or of branches of them",
        (brief(name) for name in shared if not any(_is_under(path, name) for path in paths)),
    )
    is_shared = [any(_is_under(path, name) for name in shared) for path in paths]
    places: dict[int, Place] = {}
    first = 0
    for pattern in layers:
        found = {
            i: match
            for i, path in enumerate(paths)
            if not is_shared[i] and (match := _match(pattern, path)) is not None
        }
        if not found:
            raise ValueError(
                f"layers={brief(pattern)}: no parameter has such a path; numbered parts are "
                f"{_numbered_parts(paths, avals)}"
            )
        raise_all(
            f"layers={brief(pattern)}: its parameters must not be those of another pattern",
            (paths[i] for i in found if i in places),
        )
        if HOLE in pattern:
            count = _require_all_numbers(pattern, {number for number, _ in found.values()})
            for i, (number, name) in found.items():
                places[i] = Place(paths[i], name, first + number)
        else:
            count = _require_one_size(pattern, {paths[i]: avals[i] for i in found})
            for i, (_, name) in found.items():
                places[i] = Place(paths[i], name, first, count)
        first += count
    return Places(
        leaves=tuple(places.get(i, Place(path, path)) for i, path in enumerate(paths)),
        avals=tuple(avals),
        structure=structure,
        num_layers=first,
    )


def _path(path: Sequence[Any]) -> str:
    """Joins the entries of a leaf's path; the value of a box (a variable) has its box's path."""
    in_box = len(path) > 1 and isinstance(path[-1], jax.tree_util.GetAttrKey)
    if in_box and path[-1].name.lstrip(".") in ("value", "raw_value"):
        path = path[:-1]
    return "/".join(map(str, keys_of(path)))


def _is_under(path: str, branch: str) -> bool:
    return path == branch or path.startswith(f"{branch}/")


def _match(pattern: str, path: str) -> tuple[int, str] | None:
    """Gives the number of the layer (0 for a stack) and the path within it, if a path matches.

    A pattern of parameters matches the layers' variables that gradients overwrite, too.
    """
    collection, _, inner = pattern.partition("/")
    if path.startswith(f"{OVERWRITTEN}/") and inner and collection != OVERWRITTEN:
        found = _match(f"{OVERWRITTEN}/{inner}", path)
        return found and (found[0], f"{OVERWRITTEN}/{found[1]}")
    before, hole, after = pattern.partition(HOLE)
    number = "([0-9]+)" if hole else "()"
    match = re.fullmatch(f"{re.escape(before)}{number}{re.escape(after)}(?:/(.*))?", path)
    return match and (int(match[1] or 0), match[2] or "")


def _require_all_numbers(pattern: str, numbers: set[int]) -> int:
    """Requires layers counted from 0 without gaps, and returns their number."""
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        raise ValueError(
            f"layers={brief(pattern)}: the layers must be counted from 0 without gaps, but of "
            f"{max(numbers) + 1} these are missing: {brief(missing)}; rename them, or leave "
            "the layers before the gap outside by another name"
        )
    return len(numbers)


def _require_one_size(pattern: str, avals: dict[str, jax.ShapeDtypeStruct]) -> int:
    """Requires one leading dim of all leaves of a stack, and returns it."""
    sizes = {aval.shape[:1] for aval in avals.values()}
    raise_all(
        f"layers={brief(pattern)}: all leaves of a stack must have the layers as their leading dim "
        f"(for layers of their own give their number's place, such as {pattern + '_{}'!r})",
        (f"{path} of shape {aval.shape}" for path, aval in avals.items())
        if len(sizes) != 1 or sizes == {()}
        else (),
    )
    return sizes.pop()[0]


def _numbered_parts(paths: Sequence[str], avals: Sequence[jax.ShapeDtypeStruct]) -> str:
    """Lists numbered groups of paths, the largest first: those that a user may mean."""
    numbers: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for path, aval in zip(paths, avals, strict=True):
        for match in re.finditer(r"(?<![0-9])[0-9]+(?=/|$)", path):
            pattern = path[: match.start()] + HOLE
            numbers.setdefault(pattern, set()).add(int(match[0]))
            sizes[pattern] = sizes.get(pattern, 0) + math.prod(aval.shape)
    whole = [p for p, found in numbers.items() if len(found) > 1 and max(found) < len(found)]
    ordered = sorted(whole, key=lambda p: -sizes[p])[:5]
    return (
        ", ".join(f"{p!r} ({len(numbers[p])} layers, {sizes[p]:,} parameters)" for p in ordered)
        or "none (name the path of the stack, for layers that a scan runs over)"
    )
