"""What of the parameters has a gradient, and how each leaf lies over the axes that a step names.

In: `params`, and the trees that `value_and_grad` takes beside them, which may stop short of its
leaves. Out: the same for every leaf.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jax.tree_util import keystr

from dualpipe_jax._errors import call, raise_all, show
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._split_vjp import is_differentiable

# Dims of an array, and the axes over which each lies, the outermost first.
Dims = dict[int, tuple[str, ...]]


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
    meaning = "True for what is trained, and False for what is frozen"
    return _differentiable(_flags("trainable", trainable, params, meaning=meaning), params)


def overwritten(
    params: PyTree, overwrite: PyTree | Callable[[PyTree], PyTree] | None
) -> dict[str, list[bool]]:
    """Says for every leaf whether its gradient is a new value, that overwrites it.

    The leaves of each part of `params` stand in a list, as `jax.tree.leaves` gives them.

    Args:
      params: The parameters.
      overwrite: A tree of bools whose leaves stand for whole branches of `params`, or a function
        from params to one; None for what is in a collection of Flax's `OVERWRITE_WITH_GRADIENT`.

    Raises:
      ValueError: If the tree does not fit params, or names what cannot be overwritten so.
      TypeError: If it holds anything but bools.
    """
    if overwrite is None:
        overwrite = jax.tree_util.tree_map_with_path(_is_in_flax_collection, dict(params))
    meaning = "True for what its gradient overwrites, else False"
    full = _flags("overwrite", overwrite, params, meaning=meaning)
    raise_all(
        "overwrite: of several new values the largest is taken, so they must be real numbers, of "
        "one layer or of the ends; leave out what is shared or complex",
        (
            f"params{keystr(path)} is {show(leaf)}"
            for path, leaf, flag in full
            if flag and (path[0].key == "shared" or np.issubdtype(leaf.dtype, np.complexfloating))
        ),
    )
    return _differentiable(full, params)


def _flags(
    name: str, flags: PyTree | Callable[[PyTree], PyTree], params: PyTree, *, meaning: str
) -> list[tuple[Any, Any, Any]]:
    """Lists the path of every leaf of `params`, the leaf, and the bool that stands for it."""
    mask = call(name, "params -> tree", flags, params) if callable(flags) else flags
    full = _spread(name, mask, params, is_leaf=lambda leaf: leaf is None)
    raise_all(
        f"{name}: must hold {meaning}",
        (
            f"{name}{keystr(path)} is {show(flag)}"
            for path, _, flag in full
            if not isinstance(flag, bool | np.bool_)
        ),
        error=TypeError,
    )
    return full


def _differentiable(flags: list[tuple[Any, Any, Any]], params: PyTree) -> dict[str, list[bool]]:
    """Says by part which leaves are flagged and can have a gradient."""
    return {
        part: [
            bool(flag) and is_differentiable(leaf)
            for path, leaf, flag in flags
            if path[0].key == part
        ]
        for part in params
    }


def _is_in_flax_collection(path: Any, leaf: Any) -> bool:
    del leaf
    # As flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT, which flax.training.train_state heeds too.
    return any(getattr(entry, "key", None) == "_overwrite_with_gradient" for entry in path)


def specs(
    params: PyTree,
    param_specs: PyTree | None,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str,
    manual_axes: tuple[str, ...],
    batch_axes: tuple[str, ...] = (),
    argument: str = "param_specs",
    only: Mapping[str, Sequence[bool]] | None = None,
) -> dict[str, list[PartitionSpec]]:
    """Says for every leaf over which axes its dims lie: a PartitionSpec, an entry a dim.

    The leaves of each part of `params` stand in a list, as `jax.tree.leaves` gives them. The
    layers' dim of `blocks` has the entry None. A leaf may also lie over axes from which it is
    gathered: those of batch_axes that are not manual, and outside of `blocks` the pipeline's. The
    specs say so, or on an Explicit axis its type.

    Args:
      params: The parameters.
      param_specs: A tree of PartitionSpecs whose leaves stand for whole branches of `params`; None
        for what is the same everywhere.
      mesh: The mesh.
      axis: The pipeline axis, which may be named for the layers' dim, and is ignored there.
      manual_axes: The axes of which the model's functions see a device's part.
      batch_axes: The axes over which the batch is sharded.
      argument: What the user calls the tree.
      only: For every leaf whether its spec counts; that of others is as None. None: all count.

    Raises:
      ValueError: If the specs do not fit the parameters or the mesh.
      TypeError: If the tree holds anything but PartitionSpecs.
    """
    full = _spread(argument, param_specs, params, is_leaf=_is_spec)
    raise_all(
        f"{argument}: must hold a jax.sharding.PartitionSpec for each leaf or branch of params",
        (
            f"{argument}{keystr(path)} is {show(spec)}"
            for path, _, spec in full
            if not _is_spec(spec)
        ),
        error=TypeError,
    )
    problems: list[str] = []
    gathered = (*(name for name in batch_axes if name not in manual_axes), axis)
    out: dict[str, list[PartitionSpec]] = {part: [] for part in params}
    counts = {part: iter(flags) for part, flags in (only or {}).items()}
    for path, leaf, spec in full:
        is_block = path[0].key == "blocks"
        if only is not None and not next(counts[path[0].key]):
            spec = None
        name = f"params{keystr(path)} of shape {leaf.shape}, spec {spec}"
        if spec is not None and (spec.unreduced or spec.reduced):
            problems.append(f"{name}: unreduced= and reduced= are not for parameters")
            continue
        entries = [_names(entry) for entry in spec or ()]
        if is_block and entries and entries[0] == (axis,):
            entries[0] = ()
        entries += [()] * (leaf.ndim - len(entries))
        may_gather = gathered[:-1] if is_block else gathered
        known = (*manual_axes, *may_gather)
        by_type = _places_by_type(leaf, mesh, skip=1 if is_block else 0)
        found = _problems(leaf, entries, mesh, known, by_type)
        problems += [f"{name}: {problem}" for problem in found]
        problems += [
            f"{name}: {each!r} must come last in its entry, within the parts that manual axes make"
            for entry in entries
            for place, each in enumerate(entry)
            if each in may_gather and set(entry[place:]) & set(manual_axes)
        ]
        named = {each for entry in entries for each in entry}
        for dim, each in by_type:
            if each in may_gather and each not in named:
                entries[dim] = (*entries[dim], each)
        if is_block and entries and entries[0]:
            problems.append(f"{name}: the layers' dim lies over {axis!r} alone")
        out[path[0].key].append(PartitionSpec(*(entry or None for entry in entries)))
    raise_all(
        f"{argument}: may name the manual_axes={manual_axes!r}, batch_axes={batch_axes!r}, and "
        f"outside of blocks axis={axis!r}, each once, and must divide the dims (the layers' dim of "
        "blocks counts as the first)",
        problems,
    )
    return out


def specs_of_grads(
    params: PyTree,
    grad_specs: PyTree | None,
    *,
    like: dict[str, list[PartitionSpec]],
    wanted: dict[str, list[bool]],
    **axes: Any,
) -> dict[str, list[PartitionSpec]]:
    """Says for every leaf how its gradient lies: as the leaf does, or over more axes than that.

    Args:
      params: The parameters.
      grad_specs: A tree of PartitionSpecs as `specs` takes it; None for what lies as its parameter.
      like: How the parameters lie, as `specs` says.
      wanted: Which leaves have a gradient; what stands for others is not looked at.
      **axes: The axes, as for `specs`.

    Raises:
      ValueError: If the specs do not fit the parameters, how these lie, or the mesh.
      TypeError: If the tree holds anything but PartitionSpecs.
    """
    if grad_specs is None:
        return like
    given = specs(params, grad_specs, argument="grad_specs", only=wanted, **axes)
    problems: list[str] = []
    out: dict[str, list[PartitionSpec]] = {part: [] for part in params}
    rest = {part: zip(given[part], like[part], wanted[part], strict=True) for part in params}
    for path, leaf, asked in _spread("grad_specs", grad_specs, params, is_leaf=_is_spec):
        spec, of_leaf, is_wanted = next(rest[path[0].key])
        if asked is None or not is_wanted:
            out[path[0].key].append(of_leaf)
            continue
        out[path[0].key].append(spec)
        name = f"params{keystr(path)} of shape {leaf.shape}: the gradient's spec is {asked}"
        entries = [(_names(entry), _names(of)) for entry, of in zip(spec, of_leaf, strict=True)]
        if any(entry[: len(of)] != of for entry, of in entries):
            problems.append(f"{name}, that of the parameter {of_leaf}")
            continue
        more = {each for entry, of in entries for each in entry[len(of) :]}
        problems += [
            f"{name}, and {each!r} is one of the manual_axes, over which the parameter does not lie"
            for each in sorted(more & set(axes["manual_axes"]))
        ]
    raise_all(
        "grad_specs: a gradient must lie over the axes of its parameter, and may over more, named "
        "after those in the entry of a dim, but no manual ones; None lies as the parameter",
        problems,
    )
    return out


def dims_over(spec: PartitionSpec, axes: Collection[str]) -> Dims:
    """Finds the dims that lie over some of `axes`, and over which.

    >>> dims_over(PartitionSpec(None, ("model", "data", "pipe")), ("pipe", "data"))
    {1: ('data', 'pipe')}
    """
    found = {
        dim: tuple(name for name in _names(entry) if name in axes) for dim, entry in enumerate(spec)
    }
    return {dim: names for dim, names in found.items() if names}


def without(spec: PartitionSpec, axes: Collection[str]) -> PartitionSpec:
    """Takes axes out of a spec.

    >>> without(PartitionSpec(None, ("model", "pipe")), ("pipe",))
    P(None, 'model')
    """
    entries = (tuple(name for name in _names(entry) if name not in axes) for entry in spec)
    return PartitionSpec(*(entry or None for entry in entries))


def along(spec: PartitionSpec, dims: Dims) -> PartitionSpec:
    """Has dims lie over more axes, within the parts that they have.

    >>> along(PartitionSpec(None, "model"), {1: ("data", "pipe")})
    P(None, ('model', 'data', 'pipe'))
    """
    entries = ((*_names(entry), *dims.get(dim, ())) for dim, entry in enumerate(spec))
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


def _places_by_type(leaf: Any, mesh: Mesh | AbstractMesh, *, skip: int) -> list[tuple[int, str]]:
    """Lists the dims, after the first `skip`, that by the leaf's type lie over an Explicit axis."""
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit not in kinds.values():
        return []
    return [
        (dim, name)
        for dim, entry in enumerate(jax.typeof(leaf).sharding.spec)
        for name in _names(entry)
        if dim >= skip and kinds.get(name) is AxisType.Explicit
    ]


def _problems(
    leaf: Any,
    entries: list,
    mesh: Mesh | AbstractMesh,
    known: tuple,
    by_type: list[tuple[int, str]],
) -> list[str]:
    names = [name for entry in entries for name in entry]
    problems = [f"{name!r} is none of them" for name in names if name not in known]
    problems += [f"{name!r} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(entries) > leaf.ndim:
        problems.append(f"has {len(entries)} entries for {leaf.ndim} dims")
    elif not problems:
        for dim, entry in enumerate(entries):
            more = [name for place, name in by_type if place == dim and name not in names]
            size = math.prod(mesh.shape[name] for name in (*entry, *more))
            if leaf.shape[dim] % size:
                too = f"lies over {', '.join(map(repr, more))} too, and " if more else ""
                problems.append(f"dim {dim} {too}is not divisible by {size} devices")
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
