"""Checks the trees that a user gives beside `params`, and spreads them over its leaves.

In: `params`, and trees as `value_and_grad` takes them, whose leaves may stand for whole branches of
`params`. Out: trees with the structure of `params`. Below: small functions of a `PartitionSpec`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._model.kinds import parts_of
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._model.users_call import call
from dualpipe_jax._split_vjp import is_differentiable

# Dims of an array, and the axes over which each is sharded, the outermost first.
Dims = dict[int, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class StepAxes:
    """Names the axes of the mesh by their use.

    Attributes:
      mesh: The mesh.
      axis: The pipeline axis.
      batch_axes: The axes that shard the batch.
      manual_axes: The axes of the model's own collectives.
    """

    mesh: Mesh | AbstractMesh
    axis: str
    batch_axes: tuple[str, ...]
    manual_axes: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """The shards of the batch."""
        return math.prod(self.mesh.shape[name] for name in self.batch_axes)


def find_wanted(params: PyTree, trainable: PyTree | Callable[[PyTree], PyTree]) -> PyTree:
    """Says for every leaf whether it has a gradient: if it is trainable and not an integer.

    Args:
      params: The parameters.
      trainable: A tree of bools whose leaves stand for whole branches of `params`, or a function
        from params to one.

    Returns:
      A tree of bools like `params`.

    Raises:
      ValueError: If the tree does not fit params.
      TypeError: If it holds anything but bools.
    """
    meaning = "True for leaves to train, and False for frozen ones"
    return _differentiable(_flags("trainable", trainable, params, meaning=meaning), params)


def find_overwritten(
    params: PyTree, overwrite: PyTree | Callable[[PyTree], PyTree] | None
) -> PyTree:
    """Says for every leaf whether its gradient is a new value that overwrites it.

    Args:
      params: The parameters.
      overwrite: A tree of bools whose leaves stand for whole branches of `params`, or a function
        from params to one; None for the leaves in a collection of Flax's
        `OVERWRITE_WITH_GRADIENT`.

    Returns:
      A tree of bools like `params`.

    Raises:
      ValueError: If the tree does not fit params, or names a leaf that cannot be overwritten so.
      TypeError: If it holds anything but bools.
    """
    if overwrite is None:
        overwrite = tree_map_with_path(_is_in_flax_collection, dict(params))
    meaning = "True for leaves that their gradients overwrite, else False"
    full = _flags("overwrite", overwrite, params, meaning=meaning)
    raise_all(
        "overwrite: the largest of several new values is kept, so they must be real numbers, of "
        "one layer or of the ends; leave out leaves that are shared or complex",
        (
            f"params{keystr(path)} is {show(leaf)}"
            for path, leaf, flag in full
            if flag and (path[0].key == "shared" or np.issubdtype(leaf.dtype, np.complexfloating))
        ),
    )
    return _differentiable(full, params)


def _flags(
    name: str, flags: PyTree | Callable[[PyTree], PyTree], params: PyTree, *, meaning: str
) -> "list[_Entry]":
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


def _differentiable(flags: "list[_Entry]", params: PyTree) -> PyTree:
    """Says which leaves are flagged and can have a gradient."""
    found = {path: bool(flag) and is_differentiable(leaf) for path, leaf, flag in flags}
    return _like(params, found)


def _is_in_flax_collection(path: Any, leaf: Any) -> bool:
    del leaf
    # As flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT, which flax.training.train_state heeds too.
    return any(getattr(entry, "key", None) == "_overwrite_with_gradient" for entry in path)


def spread_param_specs(
    params: PyTree,
    param_specs: PyTree | None,
    axes: StepAxes,
    *,
    argument: str = "param_specs",
    only: PyTree = None,
) -> PyTree:
    """Says for every leaf over which axes its dims are sharded: a PartitionSpec, an entry a dim.

    The layers' dim of `blocks` has the entry None. A leaf may also be sharded over axes from which
    it is gathered: those of batch_axes that are not manual, and outside of `blocks` the pipeline's.
    The specs say so, or on an Explicit axis its type.

    Args:
      params: The parameters.
      param_specs: A tree of PartitionSpecs whose leaves stand for whole branches of `params`; None
        for a leaf that is the same everywhere.
      axes: The axes; the pipeline's may be named for the layers' dim, and is ignored there.
      argument: The user's name for the tree.
      only: A tree of bools like `params`: whether a leaf's spec counts; that of others is as None.
        None: all count.

    Returns:
      A tree of PartitionSpecs like `params`.

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
    counts = None if only is None else dict(tree_leaves_with_path(only))
    problems: list[str] = []
    found: dict[Any, PartitionSpec] = {}
    for path, leaf, spec in full:
        if counts is not None and not counts[path]:
            spec = None
        is_block = path[0].key == "blocks"
        found[path], wrong = _spec_of_leaf(leaf, spec, axes, is_block=is_block)
        name = f"params{keystr(path)} of shape {leaf.shape}, spec {spec}"
        problems += [f"{name}: {problem}" for problem in wrong]
    raise_all(
        f"{argument}: may name the manual_axes={axes.manual_axes!r}, "
        f"batch_axes={axes.batch_axes!r}, and outside of blocks axis={axes.axis!r}, each once, and "
        "must divide the dims (the layers' dim of blocks counts as the first)",
        problems,
    )
    return _like(params, found)


def _spec_of_leaf(
    leaf: Any,
    spec: PartitionSpec | None,
    axes: StepAxes,
    *,
    is_block: bool,
) -> tuple[PartitionSpec, list[str]]:
    """Completes a leaf's spec by the leaf's type.

    Args:
      leaf: The leaf.
      spec: The user's spec for it, or None.
      axes: The axes.
      is_block: Whether its first dim is the layers'.

    Returns:
      The spec with an entry for each dim, and the problems of the user's.
    """
    if spec is not None and (spec.unreduced or spec.reduced):
        return PartitionSpec(), ["unreduced= and reduced= are not for parameters"]
    axis, manual_axes = axes.axis, axes.manual_axes
    may_gather = tuple(name for name in axes.batch_axes if name not in manual_axes)
    may_gather += () if is_block else (axis,)
    entries = [_names(entry) for entry in spec or ()]
    if is_block and entries and entries[0] == (axis,):
        entries[0] = ()
    entries += [()] * (leaf.ndim - len(entries))
    by_type = _axes_by_type(leaf, axes.mesh, skip=1 if is_block else 0)
    problems = _problems(leaf, entries, axes.mesh, (*manual_axes, *may_gather), by_type)
    problems += [
        f"{name!r} must come last in its entry, within the parts that manual axes make"
        for entry in entries
        for number, name in enumerate(entry)
        if name in may_gather and set(entry[number:]) & set(manual_axes)
    ]
    named = {name for entry in entries for name in entry}
    for dim, name in by_type:
        if name in may_gather and name not in named:
            entries[dim] = (*entries[dim], name)
    if is_block and entries and entries[0]:
        problems.append(f"the layers' dim may be sharded over {axis!r} alone")
    return PartitionSpec(*(entry or None for entry in entries)), problems


def spread_grad_specs(
    params: PyTree, grad_specs: PyTree | None, axes: StepAxes, *, like: PyTree, wanted: PyTree
) -> PyTree:
    """Says for every leaf how its gradient is sharded: as the leaf, or over more axes than that.

    Args:
      params: The parameters.
      grad_specs: A tree of PartitionSpecs as `spread_param_specs` takes it; None for a gradient
        that is sharded as its parameter.
      axes: The axes.
      like: How the parameters are sharded, as `spread_param_specs` says.
      wanted: A tree of bools: which leaves have a gradient; specs of others are not looked at.

    Returns:
      A tree of PartitionSpecs like `params`.

    Raises:
      ValueError: If the specs do not fit the parameters, how these are sharded, or the mesh.
      TypeError: If the tree holds anything but PartitionSpecs.
    """
    if grad_specs is None:
        return like
    given = spread_param_specs(params, grad_specs, axes, argument="grad_specs", only=wanted)
    completed, of_params, is_wanted = (
        dict(tree_leaves_with_path(tree)) for tree in (given, like, wanted)
    )
    problems: list[str] = []
    found: dict[Any, PartitionSpec] = {}
    for path, leaf, asked in _spread("grad_specs", grad_specs, params, is_leaf=_is_spec):
        of_leaf = of_params[path]
        if asked is None or not is_wanted[path]:
            found[path] = of_leaf
            continue
        spec = found[path] = completed[path]
        name = f"params{keystr(path)} of shape {leaf.shape}: the gradient's spec is {asked}"
        entries = [(_names(entry), _names(of)) for entry, of in zip(spec, of_leaf, strict=True)]
        if any(entry[: len(of)] != of for entry, of in entries):
            problems.append(f"{name}, that of the parameter {of_leaf}")
            continue
        more = {name for entry, of in entries for name in entry[len(of) :]}
        problems += [
            f"{name}, and {axis!r} is one of the manual_axes, but not one of the parameter's axes"
            for axis in sorted(more & set(axes.manual_axes))
        ]
    raise_all(
        "grad_specs: a gradient must be sharded over the axes of its parameter, and may be over "
        "more, named after those in the entry of a dim, but no manual ones; None: as its parameter",
        problems,
    )
    return _like(params, found)


def dims_over(spec: PartitionSpec, axes: Collection[str] | None = None) -> Dims:
    """Finds the dims that are sharded over some of `axes`, or of all axes, and over which.

    >>> dims_over(PartitionSpec(None, ("model", "data", "pipe")), ("pipe", "data"))
    {1: ('data', 'pipe')}
    """
    found = {
        dim: tuple(name for name in _names(entry) if axes is None or name in axes)
        for dim, entry in enumerate(spec)
    }
    return {dim: names for dim, names in found.items() if names}


def without(spec: PartitionSpec, axes: Collection[str]) -> PartitionSpec:
    """Takes axes out of a spec.

    >>> without(PartitionSpec(None, ("model", "pipe")), ("pipe",))
    P(None, 'model')
    """
    entries = (tuple(name for name in _names(entry) if name not in axes) for entry in spec)
    return PartitionSpec(*(entry or None for entry in entries))


def extend(spec: PartitionSpec, dims: Dims) -> PartitionSpec:
    """Shards dims over more axes, within the parts that they have.

    >>> extend(PartitionSpec(None, "model"), {1: ("data", "pipe")})
    P(None, ('model', 'data', 'pipe'))
    """
    entries = ((*_names(entry), *dims.get(dim, ())) for dim, entry in enumerate(spec))
    return PartitionSpec(*(entry or None for entry in entries))


def axes_of(spec: PartitionSpec) -> tuple[str, ...]:
    """Lists the axes that a spec names."""
    return tuple(name for entry in spec for name in _names(entry))


def _axes_by_type(leaf: Any, mesh: Mesh | AbstractMesh, *, skip: int) -> list[tuple[int, str]]:
    """Lists the dims, after the first `skip`, that the leaf's type shards over Explicit axes."""
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
    """Lists the reasons why a leaf cannot be sharded so."""
    names = [name for entry in entries for name in entry]
    problems = [f"{name!r} is none of them" for name in names if name not in known]
    problems += [f"{name!r} stands twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if len(entries) > leaf.ndim:
        problems.append(f"has {len(entries)} entries for {leaf.ndim} dims")
    elif not problems:
        for dim, entry in enumerate(entries):
            more = [name for d, name in by_type if d == dim and name not in names]
            size = math.prod(mesh.shape[name] for name in (*entry, *more))
            if leaf.shape[dim] % size:
                too = f"is sharded over {', '.join(map(repr, more))} too, and " if more else ""
                problems.append(f"dim {dim} {too}is not divisible by {size} devices")
    return problems


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple) else (entry,)


def _is_spec(value: Any) -> bool:
    return value is None or isinstance(value, PartitionSpec)


# The path of a leaf of `params`, the leaf, and the value that a user's tree has for it.
_Entry = tuple[Any, Any, Any]


def _spread(
    name: str, prefix: PyTree, params: PyTree, *, is_leaf: Callable[[Any], bool]
) -> list[_Entry]:
    """Lists the path of every leaf of `params`, the leaf, and the leaf of `prefix` above it."""
    if isinstance(prefix, Mapping):
        if set(prefix) != set(params):
            raise ValueError(
                f"{name}: must have the keys of params, {sorted(params)}, got "
                f"{brief(sorted(map(str, prefix)))}; one leaf may stand for a whole branch"
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
    leaves = tree_leaves_with_path(plain, is_leaf=lambda leaf: leaf is None)
    pairs = zip(leaves, jax.tree.leaves(full, is_leaf=is_leaf), strict=True)
    return [(path, leaf, value) for (path, leaf), value in pairs if leaf is not None]


def _like(params: PyTree, values: Mapping[Any, Any]) -> PyTree:
    """Makes a tree like the parts of `params` of the values for its leaves' paths."""
    return tree_map_with_path(lambda path, _: values[path], parts_of(params))
