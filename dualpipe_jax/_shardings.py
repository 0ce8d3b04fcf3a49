"""How parameters, and the state of an optimizer, lie over a mesh: as gradients leave a step."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax import _validate
from dualpipe_jax._refusals import raise_all, show
from dualpipe_jax._types import PyTree

_PARTS = ("ends", "blocks", "shared")


def shardings(
    tree: PyTree,
    *,
    mesh: Mesh | AbstractMesh,
    axis: str = "pipe",
    param_specs: PyTree = None,
    blocks: str = "blocks",
) -> PyTree:
    """Says how parameters lie over the mesh, or any state that holds trees like them.

    So gradients leave `value_and_grad`, and so the updated state leaves a training step. A state
    that lies otherwise when it comes in makes the second call of the step compile it again:

    >>> import jax, jax.numpy as jnp, optax, dualpipe_jax as dpj
    >>> mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
    >>> params = {"ends": jnp.ones(3), "blocks": {"kernel": jnp.ones((4, 3, 3))}}
    >>> state = params, optax.adam(1e-3).init(params)
    >>> state = jax.device_put(state, dpj.shardings(state, mesh=mesh))
    >>> state[1][0].mu["blocks"]["kernel"].sharding.spec, state[1][0].count.sharding.spec
    (P('pipe',), P())

    Args:
      tree: Arrays or `jax.ShapeDtypeStruct`s: parameters, an optax state, a
        `flax.training.train_state.TrainState`, an `nnx.Module`, an `nnx.Optimizer`. A leaf under
        a key or attribute `blocks` has the layers' dim first, unless layers stand there in a list,
        by their numbers.
      mesh: The mesh.
      axis: The pipeline axis.
      param_specs: As for `value_and_grad`. An optimizer's state of a parameter lies as the
        parameter, in the dims that the axes divide.
      blocks: The key or attribute under which the layers are stacked: of an NNX module that of the
        stack.

    Returns:
      A tree of `jax.sharding.NamedSharding`s, as `jax.device_put` and `out_shardings=` take it:
      the layers' dim over `axis` if the axis divides it, all else as param_specs says.

    Raises:
      ValueError: If the mesh has no such axis, or param_specs names another one.
      TypeError: If param_specs holds anything but PartitionSpecs.
    """
    _validate.mesh_axis(mesh, axis)
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    found = []
    for path, leaf in flat:
        keys = [_key_of(entry) for entry in path]
        shape = np.shape(leaf) if not hasattr(leaf, "shape") else leaf.shape
        roots = [place for place, key in enumerate(keys) if key in (*_PARTS, blocks)]
        spec = _spec_of(param_specs, keys[roots[0] :] if roots else [], blocks)
        entries = [_divided(mesh, entry, n) for entry, n in zip(spec, shape, strict=False)]
        place = roots[0] if roots else len(keys)
        is_stacked = keys[place : place + 1] == [blocks]
        is_stacked &= not (len(keys) > place + 1 and isinstance(keys[place + 1], int))
        if is_stacked and shape:
            entries[:1] = [axis if shape[0] % mesh.shape[axis] == 0 else None]
        while entries and entries[-1] is None:
            entries.pop()
        found.append(NamedSharding(mesh, PartitionSpec(*entries)))
    return jax.tree.unflatten(structure, found)


def _key_of(entry: Any) -> Any:
    """The key, attribute or number that an entry of a path stands for."""
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return getattr(entry, name)
    return entry


def _spec_of(specs: PyTree, keys: Sequence[Any], blocks: str) -> PartitionSpec:
    """Finds the spec of the branch of parameters in which a leaf stands; empty if there is none."""
    node = specs
    for key in keys:
        if node is None or isinstance(node, PartitionSpec):
            break
        key = "blocks" if key == blocks and node is specs else key
        node = _child(node, key)
    if node is None or not keys:
        return PartitionSpec()
    if not isinstance(node, PartitionSpec):
        raise TypeError(f"param_specs: must hold PartitionSpecs, but has {show(node)} at {keys}")
    return node


def _child(node: Any, key: Any) -> Any:
    """Finds a tree's entry under a key, attribute or number; None if there is none."""
    if isinstance(node, Mapping):
        return node.get(key)
    if isinstance(node, list | tuple) and isinstance(key, int):
        return node[key] if key < len(node) else None
    return getattr(node, str(key), None)


def _divided(mesh: Mesh | AbstractMesh, entry: Any, size: int) -> Any:
    """An entry of a spec for a dim of a size; None where the axes do not divide it."""
    names = (entry,) if isinstance(entry, str) else tuple(entry or ())
    unknown = [name for name in names if name not in mesh.shape]
    raise_all(
        f"param_specs: must name axes of the mesh, which has {tuple(mesh.shape)}",
        map(repr, unknown),
    )
    parts = int(np.prod([mesh.shape[name] for name in names], dtype=int))
    return entry if names and size % parts == 0 else None
