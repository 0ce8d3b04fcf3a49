"""Shardings of parameters, and of an optimizer's state: those of the gradients of a step."""

import math
import operator
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr

from dualpipe_jax._errors import brief, raise_all, show
from dualpipe_jax._from_loss import LossModel
from dualpipe_jax._from_loss.places import Place
from dualpipe_jax._model import call_checks, checks, semantics
from dualpipe_jax._model.kinds import PARTS, is_stacked, keys_of
from dualpipe_jax._model.types import Mesh, Model, PyTree


def shardings(
    tree: PyTree | LossModel,
    *,
    mesh: Mesh,
    axis: str = "pipe",
    param_specs: PyTree = None,
    blocks: str = "blocks",
) -> PyTree:
    """Gives the shardings of parameters, or of any state that holds trees like them.

    The gradients of `value_and_grad` have these shardings, and so has the updated state of a
    training step. If the first state has others, the second call of the step is compiled again:

    >>> import jax, jax.numpy as jnp, optax, dualpipe_jax as dpj
    >>> mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
    >>> params = {"ends": jnp.ones(3), "blocks": {"kernel": jnp.ones((4, 3, 3))}}
    >>> state = params, optax.adam(1e-3).init(params)
    >>> state = jax.device_put(state, dpj.shardings(state, mesh=mesh))
    >>> state[1][0].mu["blocks"]["kernel"].sharding.spec, state[1][0].count.sharding.spec
    (P('pipe',), P())

    Args:
      tree: A model of `from_loss`, for the shardings of the user's own parameters: stacks over
        `axis` by layers, and each leaf of a layer of its own over `axis` in its first dim that the
        axis divides (and that param_specs leaves free), so that no device holds all layers. Or
        arrays or `jax.ShapeDtypeStruct`s: parameters, an optax state, a
        `flax.training.train_state.TrainState`, an `nnx.Module`, an `nnx.Optimizer`. A leaf under
        a key or attribute `blocks` has the layers' dim first, unless a module holds its layers in
        a list.
      mesh: The mesh.
      axis: The pipeline axis.
      param_specs: As for `value_and_grad`, with the keys `"ends"`, `"blocks"` and `"shared"` also
        where `blocks` is another name. An optimizer's state of a parameter is sharded as the
        parameter, in the dims that the axes divide.
      blocks: The key or attribute under which the layers are stacked; in an NNX module the
        attribute of the stack.

    Returns:
      A tree of `jax.sharding.NamedSharding`s for `jax.device_put` or `out_shardings=`: the layers'
      dim over `axis` if the axis divides it, all other dims by param_specs.

    Raises:
      ValueError: If the mesh has no such axis, or param_specs names an axis that the mesh does not
        have, or one twice in a spec.
      TypeError: If param_specs holds anything but PartitionSpecs, or blocks is no name.
    """
    checks.mesh_axis(mesh, axis)
    if not isinstance(blocks, str):
        raise TypeError(f"blocks={brief(blocks)}: must be a name")
    if isinstance(tree, LossModel):
        return users_shardings(tree, mesh=mesh, axis=axis, specs=param_specs)
    _require_specs(param_specs, mesh)

    call_checks.arrays(semantics.pytree("tree", tree), "tree")

    def sharding(keys: Sequence[Any], leaf: Any, *, has_layers: bool) -> NamedSharding:
        shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
        spec = _spec_of(param_specs, keys)
        # A spec may have fewer entries than the leaf has dims.
        entries = [
            _divided(mesh, entry, shape[dim]) for dim, entry in enumerate(spec[: len(shape)])
        ]
        if has_layers and shape:
            entries[:1] = [axis if shape[0] % mesh.shape[axis] == 0 else None]
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    def in_parameters(path: Sequence[Any], leaf: Any) -> NamedSharding:
        keys = keys_of(path)
        return sharding(keys, leaf, has_layers=keys[0] == "blocks")

    def elsewhere(path: Sequence[Any], leaf: Any) -> Any:
        if _is_parameters(leaf):
            return of_parameters(leaf)
        # In a module, say, parts are known by their names alone, and layers may be in a list.
        keys = keys_of(path)
        names = (*PARTS, blocks)
        found = keys[next((n for n, key in enumerate(keys) if key in names), len(keys)) :]
        found[:1] = ["blocks" if key == blocks else key for key in found[:1]]
        return sharding(found, leaf, has_layers=is_stacked(path, blocks))

    def of_parameters(node: Mapping[str, Any]) -> PyTree:
        is_child = partial(operator.is_not, node)
        parts, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_child)
        inner = [any(map(_is_parameters, _leaves(part))) for _, part in parts]
        if any(inner):
            # Its keys are labels, of groups of parameters for example.
            return structure.unflatten([of_any(part) for _, part in parts])
        return jax.tree_util.tree_map_with_path(in_parameters, node)

    def of_any(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(elsewhere, tree, is_leaf=_is_parameters)

    return of_any(tree)


def users_shardings(model: Model, *, mesh: Mesh, axis: str, specs: PyTree) -> PyTree:
    """Gives the shardings of a user's own parameters; None for a model that has no such form."""
    if not isinstance(model, LossModel):
        return None
    conversion = model.conversion
    _require_specs(conversion.specs("param_specs", specs), mesh)

    def sharding(place: Place, shape: tuple[int, ...], spec: PartitionSpec | None) -> NamedSharding:
        entries: list[Any] = [
            _divided(mesh, entry, size)
            for entry, size in zip((*(spec or ()), *[None] * len(shape)), shape, strict=False)
        ]
        taken = {name for entry in entries for name in _names(entry)}
        dims = range(len(shape)) if place.num_stacked is None else range(1)
        if place.layer is not None and axis not in taken:
            free = [d for d in dims if entries[d] is None and shape[d] % mesh.shape[axis] == 0]
            for dim in free[:1]:
                entries[dim] = axis
        while entries and entries[-1] is None:
            entries.pop()
        return NamedSharding(mesh, PartitionSpec(*entries))

    leaf_specs = conversion.users_specs("param_specs", specs)
    places = zip(conversion.places.leaves, conversion.places.avals, leaf_specs, strict=True)
    leaves = [sharding(place, aval.shape, spec) for place, aval, spec in places]
    return conversion.places.structure.unflatten(leaves)


def _is_parameters(node: Any) -> bool:
    return isinstance(node, Mapping) and {"ends", "blocks"} <= node.keys()


def _leaves(tree: PyTree) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=_is_parameters)


def _require_specs(param_specs: PyTree, mesh: Mesh) -> None:
    """Requires a tree of PartitionSpecs of the mesh's axes, each once in a spec.

    Raises:
      ValueError: If it names other parts or axes, or one twice.
      TypeError: If it holds anything but PartitionSpecs.
    """
    if param_specs is None or isinstance(param_specs, PartitionSpec):
        parts = {}
    elif isinstance(param_specs, Mapping):
        parts = param_specs
    else:
        raise TypeError(
            f"param_specs: must be a dict with the keys of params; got {show(param_specs)}"
        )
    raise_all(
        f"param_specs: must have keys among {', '.join(map(repr, PARTS))}",
        (repr(key) for key in parts if key not in PARTS),
    )
    leaves = jax.tree_util.tree_leaves_with_path(
        param_specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    raise_all(
        "param_specs: must hold PartitionSpecs",
        (f"{keystr(path)} is {show(leaf)}" for path, leaf in leaves if not _is_spec(leaf)),
        error=TypeError,
    )
    names = [(path, [n for entry in spec for n in _names(entry)]) for path, spec in leaves]
    raise_all(
        f"param_specs: must name axes of the mesh, which has {tuple(mesh.shape)}, each once",
        (
            f"{keystr(path)} names {name!r}" + " twice" * (name in mesh.shape)
            for path, axes in names
            for name in dict.fromkeys(axes)
            if name not in mesh.shape or axes.count(name) > 1
        ),
    )


def _is_spec(leaf: Any) -> bool:
    """Whether a leaf is a PartitionSpec of names, tuples of names, and None."""
    if not isinstance(leaf, PartitionSpec):
        return False
    return all(entry is None or all(isinstance(n, str) for n in _names(entry)) for entry in leaf)


def _names(entry: Any) -> tuple[Any, ...]:
    """Lists the axes that an entry of a spec names."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, tuple | list) else (entry,)


def _spec_of(specs: PyTree, keys: Sequence[Any]) -> PartitionSpec:
    """Finds the spec of the branch of parameters that holds a leaf; an empty one if none does."""
    node = specs if keys else None
    for key in keys:
        if node is None or isinstance(node, PartitionSpec):
            break
        if isinstance(node, Mapping):
            node = node.get(key)
        else:  # a tuple of stacks, say
            node = node[key] if isinstance(key, int) and key < len(node) else None
    return node if isinstance(node, PartitionSpec) else PartitionSpec()


def _divided(mesh: Mesh, entry: Any, size: int) -> Any:
    """Gives an entry of a spec for a dim of a size; None where the axes do not divide it."""
    parts = math.prod(mesh.shape[name] for name in _names(entry))
    return entry if entry is not None and size % parts == 0 else None
