"""The mesh of a run, and how parameters are sharded over it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jax.tree_util import tree_map_with_path

import dualpipe_jax as dpj

PIPE, DATA, FSDP = "pipe", "data", "fsdp"
_SMALL = 2**10  # elements of a leaf that is not worth sharding


def make_mesh(
    devices: Sequence[jax.Device], sizes: Mapping[str, int], *, always: Sequence[str] = (PIPE,)
) -> Mesh:
    """Makes the mesh of the axes that have more than one device.

    Args:
      devices: All devices, as many as the product of the sizes.
      sizes: The devices of each axis, by name.
      always: Axes that the mesh has in any case, because functions name them.
    """
    used: Any = {name: size for name, size in sizes.items() if size > 1 or name in always}
    return dpj.make_mesh(
        axis=PIPE, batch_axes=(DATA,) if DATA in used else (), devices=devices, **used
    )


def batch_axes(mesh: Mesh) -> tuple[str, ...]:
    """Lists the axes over which the rows of a batch are spread: all but the pipeline's."""
    return tuple(name for name in mesh.axis_names if name != PIPE)


def with_fsdp(specs: Any, params: Any, mesh: Mesh) -> Any:
    """Shards parameters over the axis of FSDP too, each in its largest dim that it divides.

    Args:
      specs: The `PartitionSpec` of each leaf, over other axes.
      params: The parameters' shapes; under `blocks` the first dim is that of the layers.
      mesh: Without the axis the specs stay as they are.
    """
    if FSDP not in mesh.axis_names:
        return specs
    size = mesh.shape[FSDP]

    def add(path: Any, leaf: Any, spec: PartitionSpec) -> PartitionSpec:
        first = 1 if path[0].key == "blocks" else 0
        entries = [*spec, *[None] * (leaf.ndim - len(spec))]
        free = [
            dim
            for dim in range(first, leaf.ndim)
            if entries[dim] is None and leaf.shape[dim] % size == 0
        ]
        if not free or leaf.size < _SMALL:
            return spec
        entries[max(free, key=lambda dim: leaf.shape[dim])] = FSDP
        return PartitionSpec(*entries)

    return tree_map_with_path(add, params, specs)


def unsharded(params: Any) -> Any:
    """Gives each leaf the spec of one that no axis shards."""
    return jax.tree.map(lambda _: PartitionSpec(), params)
