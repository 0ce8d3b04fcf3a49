"""A step's arguments -> their avals on the devices of a topology, and the axes of their mesh.

The step was built over the user's mesh. On the topology it gets a mesh of the same axes, and each
argument keeps its PartitionSpec. Arguments on no mesh are replicated.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jcore
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax._errors import brief
from dualpipe_jax._model.types import PyTree


@dataclass(frozen=True)
class MeshAxes:
    """Holds the axes of a mesh: their sizes by name, and their types."""

    sizes: dict[str, int]
    types: tuple[Any, ...]

    @classmethod
    def of(cls, mesh: Any) -> "MeshAxes":
        """Reads the axes off a mesh, abstract or not."""
        return cls(dict(mesh.shape), tuple(mesh.axis_types))


def find_axes(step: Callable[..., Any], args: tuple[PyTree, ...], mesh: Any) -> MeshAxes:
    """Finds the axes of the step's mesh: as given, by the arguments' shardings, or in the step.

    Raises:
      TypeError: If `mesh` is not a mesh.
      ValueError: If there is no mesh, or more than one.
    """
    if mesh is not None:
        if not (hasattr(mesh, "axis_types") and hasattr(mesh, "shape")):
            raise TypeError(
                f"mesh={brief(mesh)}: must be a jax.sharding.Mesh or AbstractMesh, or None for "
                "that of the arguments"
            )
        return MeshAxes.of(mesh)
    found = []
    for leaf in jax.tree.leaves(args):
        of_leaf = _mesh_of(leaf)
        if of_leaf is not None and MeshAxes.of(of_leaf) not in found:
            found.append(MeshAxes.of(of_leaf))
    if not found:
        # A device's own arrays, or NumPy's: the step itself names the mesh.
        closed = jax.jit(step).trace(*jax.tree.map(_plain, args)).jaxpr
        found = list(_axes_in(closed.jaxpr))[:1]
    if not found:
        raise ValueError(
            "mesh=None: the arguments lie on no mesh, and the step maps over none; say which axes "
            "there are with mesh=, or give arguments with NamedShardings (jax.ShapeDtypeStruct "
            "takes a sharding)"
        )
    if len(found) > 1:
        raise ValueError(
            f"args: must all lie on one mesh, but lie on meshes of axes "
            f"{', '.join(str(axes.sizes) for axes in found)}"
        )
    return found[0]


def put_on_mesh(args: tuple[PyTree, ...], mesh: jax.sharding.Mesh) -> tuple[PyTree, ...]:
    """Makes avals of the arguments on a mesh, sharded as on the user's.

    Raises:
      ValueError: If a dim is not divisible by the axes over which it is sharded.
    """

    def put(leaf: Any) -> jax.ShapeDtypeStruct:
        plain, on = _plain(leaf), _mesh_of(leaf)
        spec = PartitionSpec() if on is None else leaf.sharding.spec
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(plain.shape)
        except ValueError as error:
            raise ValueError(
                f"args: an array of shape {plain.shape} with the spec {spec} must be divisible by "
                f"the axes of mesh={dict(mesh.shape)}; change its shape, or the mesh"
            ) from error
        return plain.update(sharding=sharding)

    return jax.tree.map(put, args)


def _plain(leaf: Any) -> jax.ShapeDtypeStruct:
    """Makes the aval of a leaf, on no mesh."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        leaf = jax.typeof(np.asarray(leaf) if isinstance(leaf, np.generic) else leaf)
    weak_type = getattr(leaf, "weak_type", False)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=weak_type)


def _mesh_of(leaf: Any) -> Any:
    """Finds the mesh of a leaf; None if it is on none."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names:
        return sharding.mesh
    return None


def _axes_in(jaxpr: Any) -> Iterator[MeshAxes]:
    """Yields the axes of the meshes that a jaxpr names, outermost first."""
    for eqn in jaxpr.eqns:
        for sharding in eqn.params.get("out_shardings", ()):
            # A step over Explicit axes runs in a jit that says so: inside, they are Auto.
            if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names:
                yield MeshAxes.of(sharding.mesh)
        if eqn.primitive.name == "shard_map":
            yield MeshAxes.of(eqn.params["mesh"])
        for inner in jcore.jaxprs_in_params(eqn.params):
            yield from _axes_in(inner)
