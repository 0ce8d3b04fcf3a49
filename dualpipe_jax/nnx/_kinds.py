"""Finds layers of one kind: the same computation with other parameters.

In: the layers. Out: the name of each layer's kind. Layers are of one kind if their static fields
are equal, types and sharing included, and their variables and arrays have the same shapes.
"""

import functools
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from flax import nnx

from dualpipe_jax._errors import brief, is_array, show
from dualpipe_jax._model.kinds import require_layout_length

# The static value of each field of a layer, by path.
Fields = dict[tuple[Any, ...], Any]


def kinds_of(
    layers: Sequence[nnx.Module], layout: Sequence[str] | None, ignore: Sequence[str]
) -> tuple[str, ...]:
    """Names the kind of every layer, in model order.

    Args:
      layers: The layers.
      layout: The user's names, or None; layers with the same name must be of one kind.
      ignore: Names of attributes in which layers of one kind may differ.

    Raises:
      ValueError: If layers with the same name differ; without a layout, if more than two all do.
    """
    fields = [_fields(layer, ignore) for layer in layers]
    if layout is not None:
        _require_layout(fields, tuple(layout))
        return tuple(layout)
    firsts: list[int] = []  # the first layer of each kind
    first_of: list[int] = []  # that of each layer's kind
    for layer, fields_of_layer in enumerate(fields):
        same = [first for first in firsts if not _differences(fields[first], fields_of_layer)]
        firsts += [] if same else [layer]
        first_of.append(same[0] if same else layer)
    if len(firsts) == len(layers) > 2:
        raise ValueError(
            f"blocks: all {len(layers)} layers differ from one another, so that no two could be "
            f"stacked: {_show_differences(fields, 0, 1)}. Name an attribute that makes no "
            "difference to a call, such as a layer's own number, in ignore=; or name the kind of "
            "every layer in layout="
        )
    names = _unique_names([type(layers[first]).__name__ for first in firsts])
    return tuple(names[firsts.index(first)] for first in first_of)


def _require_layout(fields: list[Fields], layout: tuple[str, ...]) -> None:
    """Requires a layout to name every layer, and layers of one name to be of one kind."""
    require_layout_length(layout, len(fields))
    for layer, kind in enumerate(layout):
        first = layout.index(kind)
        if _differences(fields[first], fields[layer]):
            raise ValueError(
                f"layout={brief(layout)}: layers of one kind must not differ, but {kind!r} has "
                f"layers {first} and {layer}: {_show_differences(fields, first, layer)}. Give them "
                "two names, or name an attribute that makes no difference to a call in ignore="
            )


def _unique_names(names: list[str]) -> list[str]:
    """Numbers names that occur several times.

    >>> _unique_names(["Dense", "Moe", "Dense"])
    ['Dense_0', 'Moe', 'Dense_1']
    """
    return [
        name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]


def _fields(layer: nnx.Module, ignore: Sequence[str]) -> Fields:
    """Lists the fields of a layer that must be the same in layers of one kind, by path."""
    return {
        path: _field(node)
        for path, node in nnx.iter_graph(layer)
        if not path or not (path[-1] in ignore or str(path[-1]).startswith("_pytree__"))
    }


def _field(node: Any) -> Any:
    """Gives the static value of a node: types, metadata and shapes of variables and arrays."""
    if isinstance(node, nnx.Variable):
        value = node.get_value()
        shape = (value.shape, value.dtype) if is_array(value) else value
        return type(node), node.get_metadata(), shape
    if is_array(node):
        return node.shape, node.dtype
    if isinstance(node, nnx.Module | nnx.Pytree):
        return type(node)
    return node


def _differences(one: Fields, other: Fields) -> list[tuple[Any, ...]]:
    """Lists the paths at which two layers differ."""
    paths = [path for path in one if path not in other]
    paths += [path for path in other if path not in one or not _same(one[path], other[path])]
    return paths


def _show_differences(fields: list[Fields], first: int, second: int) -> str:
    """Lists the fields in which two layers differ, the first few of them."""
    one, other = fields[first], fields[second]
    shown = [
        f"{'.'.join(map(str, path))} is {_show(one, path)} in layer {first} and "
        f"{_show(other, path)} in layer {second}"
        for path in _differences(one, other)
    ]
    return "; ".join(shown[:4]) + ("; .." if len(shown) > 4 else "")


def _show(fields: Fields, path: tuple[Any, ...]) -> str:
    return show(fields[path]) if path in fields else "missing"


def _same(one: Any, other: Any) -> bool:
    """Whether two static values are equal; functions by code, defaults and closed-over values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, functools.partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    if isinstance(one, FunctionType):
        return _same(_parts_of(one), _parts_of(other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _parts_of(function: FunctionType) -> tuple[CodeType, Any, Any, Any]:
    """Lists the code, the defaults and the closed-over values of a function."""
    cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
    return function.__code__, function.__defaults__, function.__kwdefaults__, cells
