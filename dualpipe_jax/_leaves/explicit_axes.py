"""Runs a program on a mesh with Explicit axes, those where sharding is part of an array's type.

`jax.shard_map` takes an argument on Explicit axes only in the very sharding that it asks for, and
leaves the other Explicit axes to the user's code. So inside the step all axes are Auto, left to the
partitioner; outside, the step's results have the user's mesh in their types again.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def context_mesh(*, like: Mesh | AbstractMesh) -> AbstractMesh | None:
    """Returns the mesh of the context (`jax.set_mesh`) if it has the axes of `like`, else None.

    So a step made over one mesh can be compiled for the devices of another.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = mesh.axis_names, mesh.axis_sizes, mesh.axis_types
    return mesh if axes == (like.axis_names, like.axis_sizes, like.axis_types) else None


def platform_of(mesh: Mesh | AbstractMesh) -> str | None:
    """Names the platform of a mesh's devices, such as "cpu"; None if it is not known."""
    device = mesh.abstract_mesh.abstract_device
    return None if device is None else device.platform


def device_kind_of(mesh: Mesh | AbstractMesh) -> str | None:
    """Names the kind of a mesh's devices, such as "TPU v5 lite"; None if it is not known."""
    device = mesh.abstract_mesh.abstract_device
    return None if device is None else device.device_kind


def explicit_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Lists the axes of the mesh that are Explicit, as those of `jax.make_mesh` are."""
    types = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in types if kind is AxisType.Explicit)


def run_as_auto(
    run: Callable[..., tuple[Any, Any]],
    *args: Any,
    mesh: Mesh | AbstractMesh,
    out_shardings: tuple[Any, Any],
) -> tuple[Any, Any]:
    """Calls `run` with all axes Auto, and gives its two results the shardings asked for.

    Raises:
      ValueError: If a function of the model closes over an array on the mesh.
    """
    as_auto = jax.sharding.auto_axes(run, axes=explicit_axes(mesh), out_sharding=out_shardings)
    # The jit names devices and mesh: inside auto_axes there is only an abstract mesh.
    placed = jax.jit(as_auto, out_shardings=(out_shardings[0], None))
    try:
        # JAX drops a result that nobody reads, and with the first one its knowledge of devices.
        return lax.optimization_barrier(placed(*args))
    except NotImplementedError as error:
        if "Closing over" not in str(error):
            raise
        raise ValueError(
            "model: one of its functions closes over an array on a mesh with Explicit axes, "
            "which JAX cannot bring inside; pass it with params or batch, or close over a "
            "NumPy array (numpy.asarray(array))"
        ) from error


def sharding_like(
    leaf: Any,
    *,
    mesh: Mesh | AbstractMesh,
    without: tuple[str, ...],
    over: dict[int, tuple[str, ...]],
    after: tuple[str, ...] = (),
) -> NamedSharding:
    """Makes a sharding like that of `leaf`, over Explicit axes.

    Args:
      leaf: An array.
      mesh: The mesh.
      without: Axes to leave out.
      over: Dims, and axes over which to shard them, where Explicit: an axis that does not shard its
        dim yet divides the parts that the axes `after` make.
      after: Axes that come first in an entry of a dim.
    """
    explicit = explicit_axes(mesh)
    spec = jax.typeof(leaf).sharding.spec
    dims = []
    for number, dim in enumerate((*spec, *(None,) * (np.ndim(leaf) - len(spec)))):
        names = dim if isinstance(dim, tuple) else (dim,)
        dims.append(
            [
                name
                for name in names
                if name in explicit and (name not in without or name in over.get(number, ()))
            ]
        )
    for number, axes in over.items():
        for axis in axes:
            if axis in explicit and axis not in dims[number]:
                dims[number].insert(sum(name in (*after, *axes) for name in dims[number]), axis)
    return NamedSharding(mesh, PartitionSpec(*(tuple(dim) or None for dim in dims)))
