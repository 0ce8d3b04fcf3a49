"""Which layers of a module are of one kind: the same computation, of other parameters.

In: the layers. Out: the name of each one's kind. Layers are of one kind if all that is static in
them is equal, types and sharing included, and their variables and arrays have the same shapes.
"""

import functools
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from flax import nnx

from dualpipe_jax._errors import is_array, show

Fields = dict[tuple[Any, ...], Any]


def kinds_of(
    layers: Sequence[nnx.Module], layout: Sequence[str] | None, ignore: Sequence[str]
) -> tuple[str, ...]:
    """Names the kind of every layer, in model order.

    Args:
      layers: The layers.
      layout: The names, if the user gives them; layers of one name must be of one kind.
      ignore: Names of attributes in which layers of one kind may differ.

    Raises:
      ValueError: If layers of one name differ; without a layout, if all of several layers do.
    """
    fields = [_fields(layer, ignore) for layer in layers]
    if layout is not None:
        return _checked(fields, tuple(layout))
    firsts: list[int] = []
    found: list[int] = []
    for layer, mine in enumerate(fields):
        same = [first for first in firsts if not _differences(fields[first], mine)]
        firsts += [] if same else [layer]
        found.append(same[0] if same else layer)
    if len(firsts) == len(layers) > 2:
        raise ValueError(
            f"blocks: the {len(layers)} layers differ from one another all, so that none could be "
            f"stacked with another: {_told(fields, 0, 1)}. Name an attribute that makes no "
            "difference to a call, such as a layer's own number, in ignore=; or name the kind of "
            "every layer in layout="
        )
    names = _unique_names([type(layers[first]).__name__ for first in firsts])
    return tuple(names[firsts.index(first)] for first in found)


def _checked(fields: list[Fields], layout: tuple[str, ...]) -> tuple[str, ...]:
    if len(layout) != len(fields):
        raise ValueError(
            f"layout={layout!r}: must name the kind of every layer, but names {len(layout)}, and "
            f"there are {len(fields)}"
        )
    for layer, kind in enumerate(layout):
        first = layout.index(kind)
        if _differences(fields[first], fields[layer]):
            raise ValueError(
                f"layout={layout!r}: layers of one kind must be alike, but {kind!r} has layers "
                f"{first} and {layer}: {_told(fields, first, layer)}. Name a kind for each, or an "
                "attribute that makes no difference to a call in ignore="
            )
    return layout


def _unique_names(names: list[str]) -> list[str]:
    """Numbers names that stand several times.

    >>> _unique_names(["Dense", "Moe", "Dense"])
    ['Dense_0', 'Moe', 'Dense_1']
    """
    return [
        name if names.count(name) == 1 else f"{name}_{names[:i].count(name)}"
        for i, name in enumerate(names)
    ]


def _fields(layer: nnx.Module, ignore: Sequence[str]) -> Fields:
    """Lists what a layer is made of, by path: what must be the same in layers of one kind."""
    return {
        path: _field(node)
        for path, node in nnx.iter_graph(layer)
        if not path or not (path[-1] in ignore or str(path[-1]).startswith("_pytree__"))
    }


def _field(node: Any) -> Any:
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
    paths = [path for path in one if path not in other]
    paths += [path for path in other if path not in one or not _same(one[path], other[path])]
    return paths


def _told(fields: list[Fields], first: int, second: int) -> str:
    one, other = fields[first], fields[second]
    told = [
        f"{'.'.join(map(str, path))} is {_show(one, path)} in layer {first} and "
        f"{_show(other, path)} in layer {second}"
        for path in _differences(one, other)
    ]
    return "; ".join(told[:4]) + ("; .." if len(told) > 4 else "")


def _show(fields: Fields, path: tuple[Any, ...]) -> str:
    return show(fields[path]) if path in fields else "missing"


def _same(one: Any, other: Any) -> bool:
    """Whether two static values are equal; functions are if their code and what they hold is."""
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
        return _same(_held(one), _held(other))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _held(function: FunctionType) -> tuple[CodeType, Any, Any, Any]:
    cells = function.__closure__ or ()
    held = tuple(cell.cell_contents for cell in cells)
    return function.__code__, function.__defaults__, function.__kwdefaults__, held
