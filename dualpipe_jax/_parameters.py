"""What of the parameters has a gradient, and how each leaf lies over the axes that a step names.

In: `params`, and the trees that `value_and_grad` takes beside them, which may stop short of its
leaves. Out: the same for every leaf.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jax.tree_util import keystr

from dualpipe_jax._refusals import raise_all, show
from dualpipe_jax._split_vjp import is_differentiable
from dualpipe_jax._types import PyTree


def wanted(params: PyTree, trainable: PyTree | Callable[[PyTree], PyTree]) -> dict[str, list[bool]]:
    """Says for every leaf whether it has a gradient: if it is trainable and not an integer.

    The leaves of each part of `params` stand in a list, as `jax.tree.leaves` gives them.

    Args:
      params: The parameters.
      trainable: A tree of bools whose leaves stand for whole branches of `params`, or a function
        from params to one.

    Raises:
      ValueError: If the tree does not fit params.
      TypeError: If it holds anything but bools.
    """
    mask = trainable(params) if callable(trainable) else trainable
    full = _spread("trainable", mask, params, is_leaf=lambda leaf: leaf is None)
    raise_all(
        "trainable: must hold True for what is trained, and False for what is frozen",
        (
            f"trainable{keystr(path)} is {show(flag)}"
            for path, _, flag in full
            if not isinstance(flag, bool | np.bool_)
        ),
        error=TypeError,
    )
    return {
        part: [
            bool(flag) and is_differentiable(leaf)
            for path, leaf, flag in full
            if path[0].key == part
        ]
        for part in params
    }


def specs(
    params: PyTree,
    param_specs: PyTree | None,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str,
    manual_axes: tuple,
) -> dict[str, list[PartitionSpec]]:
    """Says for every leaf over which axes its dims lie: a PartitionSpec, an entry a dim.

    The leaves of each part of `params` stand in a list, as `jax.tree.leaves` gives them. The
    layers' dim of `blocks` has the entry None; of the other parts a leaf may lie over the pipeline
    axis, too: if the specs say so, or on an Explicit axis its type.

    Args:
      params: The parameters.
      param_specs: A tree of PartitionSpecs whose leaves stand for whole branches of `params`; None
        for what is the same everywhere.
      mesh: The mesh.
      axis: The pipeline axis, which may be named for the layers' dim, and is ignored there; for a
        leaf outside of blocks, it may be the last in the entry of any dim.
      manual_axes: The axes that may be named.

    Raises:
      ValueError: If the specs do not fit the parameters or the mesh.
      TypeError: If the tree holds anything but PartitionSpecs.
    """
    full = _spread("param_specs", param_specs, params, is_leaf=_is_spec)
    raise_all(
        "param_specs: must hold a jax.sharding.PartitionSpec for each leaf or branch of params",
        (
            f"param_specs{keystr(path)} is {show(spec)}"
            for path, _, spec in full
            if not _is_spec(spec)
        ),
        error=TypeError,
    )
    problems: list[str] = []
    out: dict[str, list[PartitionSpec]] = {part: [] for part in params}
    for path, leaf, spec in full:
        is_block = path[0].key == "blocks"
        name = f"params{keystr(path)} of shape {leaf.shape}, spec {spec}"
        if spec is not None and (spec.unreduced or spec.reduced):
            problems.append(f"{name}: unreduced= and reduced= are not for parameters")
            continue
        entries = [_names(entry) for entry in spec or ()]
        if is_block and entries and entries[0] == (axis,):
            entries[0] = ()
        entries += [()] * (leaf.ndim - len(entries))
        known = manual_axes if is_block else (*manual_axes, axis)
        problems += [f"{name}: {problem}" for problem in _problems(leaf, entries, mesh, known)]
        if not is_block and any(axis in entry[:-1] for entry in entries):
            problems.append(
                f"{name}: {axis!r} must come last in its entry, as it is gathered first"
            )
        dim = -1 if is_block else _dim_by_type(leaf, mesh, axis)
        if dim >= 0 and not any(axis in entry for entry in entries):
            entries[dim] = (*entries[dim], axis)
        if is_block and entries and entries[0]:
            problems.append(f"{name}: the layers' dim lies over {axis!r} alone")
        out[path[0].key].append(PartitionSpec(*(entry or None for entry in entries)))
    raise_all(
        f"param_specs: may name the manual_axes={manual_axes!r}, and outside of blocks "
        f"axis={axis!r}, each once, and must divide the dims (the layers' dim of blocks counts as "
        "the first)",
        problems,
    )
    return out


def dim_over(spec: PartitionSpec, axis: str) -> int:
    """Finds the dim that lies over an axis, or -1.

    >>> dim_over(PartitionSpec(None, ("model", "pipe")), "pipe")
    1
    """
    dims = [dim for dim, entry in enumerate(spec) if axis in _names(entry)]
    return dims[0] if dims else -1


def without(spec: PartitionSpec, axis: str) -> PartitionSpec:
    """Takes an axis out of a spec.

    >>> without(PartitionSpec(None, ("model", "pipe")), "pipe")
    P(None, 'model')
    """
    entries = (tuple(name for name in _names(entry) if name != axis) for entry in spec)
    return PartitionSpec(*(entry or None for entry in entries))


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Lists the axes that a spec names."""
    return tuple(name for entry in spec for name in _names(entry))


def local_shape(
    shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> tuple[int, ...]:
    """Returns the shape of a device's part of an array that lies as `spec` says."""
    sizes = list(shape)
    for dim, entry in enumerate(spec):
        for name in _names(entry):
            sizes[dim] //= mesh.shape[name]
    return tuple(sizes)


def _dim_by_type(leaf: Any, mesh: Mesh | AbstractMesh, axis: str) -> int:
    """Finds the dim that lies over an Explicit axis, by the leaf's type, or -1."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds[axis] is not AxisType.Explicit:
        return -1
    return dim_over(jax.typeof(leaf).sharding.spec, axis)


def _problems(leaf: Any, entries: list, mesh: Mesh | AbstractMesh, manual_axes: tuple) -> list[str]:
    names = [name for entry in entries for name in entry]
    problems = [f"{name!r} is none of them" for name in names if name not in manual_axes]
    problems += [f"{name!r} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(entries) > leaf.ndim:
        problems.append(f"has {len(entries)} entries for {leaf.ndim} dims")
    elif not problems:
        for dim, entry in enumerate(entries):
            size = 1
            for name in entry:
                size *= mesh.shape[name]
            if leaf.shape[dim] % size:
                problems.append(f"dim {dim} is not divisible by {size} devices")
    return problems


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _is_spec(value: Any) -> bool:
    return value is None or isinstance(value, PartitionSpec)


def _spread(
    name: str, prefix: PyTree, params: PyTree, *, is_leaf: Callable[[Any], bool]
) -> list[tuple[Any, Any, Any]]:
    """Lists the path of every leaf of `params`, the leaf, and the leaf of `prefix` above it."""
    if isinstance(prefix, Mapping):
        if set(prefix) != set(params):
            raise ValueError(
                f"{name}: must have the keys of params, {sorted(params)}, got "
                f"{sorted(map(str, prefix))}; one leaf may stand for a whole branch"
            )
        prefix = {part: prefix[part] for part in params}  # whatever kind of mapping it is
    plain = {part: params[part] for part in params}
    try:
        full = jax.tree.broadcast(prefix, plain, is_leaf=is_leaf)
    except ValueError as error:
        raise ValueError(
            f"{name}: its tree must be that of params, or stop short of it: {error}"
        ) from error
    # A branch of params that is None has no leaves, but is one where prefix may hold None.
    leaves = jax.tree_util.tree_leaves_with_path(plain, is_leaf=lambda leaf: leaf is None)
    pairs = zip(leaves, jax.tree.leaves(full, is_leaf=is_leaf), strict=True)
    return [(path, leaf, value) for (path, leaf), value in pairs if leaf is not None]
