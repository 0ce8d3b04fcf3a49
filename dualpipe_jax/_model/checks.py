"""Checks of the model, the mesh and the numbers from which a user makes a function.

Every message names the argument, its value, the requirement and the fix, and lists all offenders.
The arguments of the function are checked in `call_checks`, the outputs of a model's functions in
`returns`.
"""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._model.kinds import block_name, blocks_of
from dualpipe_jax._model.types import AxisNames, Mesh, Model


def positive_int(name: str, value: Any) -> int:
    """Requires an integer of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={brief(value)}: must be an integer, got {show(value)}") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name}={brief(value)}: must be an integer of at least 1")
    return number


def is_model(model: Any) -> None:
    """Requires a Model."""
    if not isinstance(model, Model):
        raise TypeError(
            f"model: must be a dualpipe_jax.Model(embed=, block=, head=), got {show(model)}"
        )
    if model.layout is not None or isinstance(model.block, Mapping):
        _layout_fits(model.block, model.layout)
    blocks = {block_name(kind): block for kind, block in blocks_of(model).items()}
    functions: dict[str, Any] = {"model.embed": model.embed, **blocks, "model.head": model.head}
    if model.weight is not None:
        functions["model.weight"] = model.weight
    raise_all(
        "model: embed, block, head and weight (if it is not None) must be functions",
        (f"{name} is {show(value)}" for name, value in functions.items() if not callable(value)),
        error=TypeError,
    )
    raise_all(
        "model: has_aux and block_has_aux must be True or False",
        (
            f"model.{name} is {show(value)}"
            for name in ("has_aux", "block_has_aux")
            if not isinstance(value := getattr(model, name), bool)
        ),
        error=TypeError,
    )


def _layout_fits(block: Any, layout: Any) -> None:
    """Requires a block for every kind in the layout, and a kind for every block."""
    names = "the names of the kinds of all layers, in model order, as keys of the dict block"
    if not isinstance(block, Mapping):
        raise ValueError(
            f"model.layout={brief(layout)}: must be {names}, but block is {show(block)}; make it a "
            "dict with a block for each kind, or leave layout out"
        )
    if layout is None:
        raise ValueError(
            f"model.layout=None: must be {names}, which has {_names(block)}; give it, or make "
            "block one function for all layers"
        )
    if not isinstance(layout, tuple) or not all(isinstance(kind, str) for kind in layout):
        raise TypeError(f"model.layout={brief(layout)}: must be a sequence of strings, {names}")
    if not layout:
        raise ValueError("model.layout=(): must name at least one layer")
    layers: dict[str, list[int]] = {}
    for layer, kind in enumerate(layout):
        layers.setdefault(kind, []).append(layer)
    raise_all(
        "model.layout: must name the keys of the dict block, each at least once; add the "
        "missing names, or leave out the unknown ones",
        [
            *(
                f"layout names {kind!r} (layers {_abbreviate(at)}), but block has {_names(block)}"
                for kind, at in layers.items()
                if kind not in block
            ),
            *(
                f"block has {kind!r}, but no layer is of that kind"
                for kind in block
                if kind not in layers
            ),
        ],
    )


def mesh_axis(mesh: Any, axis: Any, *, argument: str = "axis") -> int:
    """Requires `axis` to be an axis of the mesh, and returns its size."""
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(
            f"mesh: must be a jax.sharding.Mesh, as jax.make_mesh makes, got {show(mesh)}"
        )
    if not isinstance(axis, str):
        raise TypeError(
            f"{argument}={brief(axis)}: must be the name of a mesh axis, got {show(axis)}"
        )
    _known_axes(mesh, argument, axis, [axis])
    return mesh.shape[axis]


def other_axes(mesh: Mesh, axis: str, argument: str, axes: AxisNames) -> tuple[str, ...]:
    """Requires one or several axes of the mesh other than `axis`; returns a tuple."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(
            f"{argument}={brief(axes)}: must be the name of a mesh axis, or a tuple of them"
        )
    _known_axes(mesh, argument, axes, names)
    if axis in names or len(set(names)) < len(names):
        raise ValueError(
            f"{argument}={brief(axes)}: must be mesh axes other than axis={brief(axis)}, each "
            "once; leave out the others"
        )
    return tuple(names)


def _known_axes(mesh: Mesh, argument: str, value: AxisNames, names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        known = ", ".join(f"{name!r} ({size} devices)" for name, size in mesh.shape.items())
        are = "is not an axis" if len(unknown) == 1 else "are not axes"
        raise ValueError(
            f"{argument}={brief(value)}: {brief(unknown)[1:-1]} {are} of the mesh, which "
            f"has {known}; name one of its axes, or make the mesh with these"
        )


def _names(kinds: Iterable[Any]) -> str:
    named = [brief(kind) for kind in kinds]
    return ", ".join(named[:20]) + ", .." * (len(named) > 20) or "no kinds"


def _abbreviate(numbers: list[int]) -> str:
    """Lists the first few of the numbers."""
    return ", ".join(map(str, numbers[:8])) + (", .." if len(numbers) > 8 else "")
