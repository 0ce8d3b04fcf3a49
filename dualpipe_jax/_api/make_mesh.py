"""Sizes of mesh axes -> a mesh whose neighbouring ranks are neighbours on the hardware.

Devices come in groups that a fast network joins: slices of TPUs, hosts or NVLink domains of GPUs.
The pipeline, which sends least, goes across the groups; `_grid` lays the devices of a group out.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from dualpipe_jax import _grid
from dualpipe_jax._errors import brief, require_name, require_names, show
from dualpipe_jax._model import checks
from dualpipe_jax._model.types import AxisNames


def make_mesh(
    *,
    axis: str = "pipe",
    batch_axes: AxisNames | None = None,
    devices: Sequence[Any] | None = None,
    axis_types: AxisType | Sequence[AxisType] | None = None,
    **sizes: int,
) -> jax.sharding.Mesh:
    """Makes a mesh on which neighbouring ranks of the pipeline are neighbours on the hardware.

    >>> import dualpipe_jax as dpj
    >>> mesh = dpj.make_mesh(pipe=4, data=2)  # eight devices, here fake ones of the CPU
    >>> dict(mesh.shape)
    {'pipe': 4, 'data': 2}
    >>> [[device.id for device in rank] for rank in mesh.devices]
    [[0, 1], [2, 3], [4, 5], [6, 7]]

    The layout depends on the hardware:

    - The chips of a TPU slice are a grid, with links between neighbours. Ranks p and p + 1 are one
      link apart. Then the neighbours along the other axes are one link apart where possible, the
      last axis first: name axes in the order of their traffic, `data` before `expert`. An axis
      without links of its own takes longer steps over those of the other axes. Among layouts that
      are equal in this, one is taken whose ranks p and P - 1 - p are near each other, because
      DualPipe sends parameters and gradients between them once a step.
      `jax.make_mesh` treats all axes alike, and may place ranks p and p + 1 several links apart.
    - The pipeline goes across several slices. Each slice has consecutive ranks, so that the slower
      network between slices carries the activations and cotangents of one boundary of the
      pipeline, and no all-reduce of `data` or all-to-all of `expert`. (Once a step, schedules with
      several stages a rank also send parameters and gradients of stages between any ranks.) Where
      the number of slices does not divide the pipeline, one of `batch_axes` goes across them, whose
      all-reduce of the gradients comes once a step.
    - GPUs likewise: each host (or larger NVLink domain, as JAX reports it) has consecutive ranks.
      A switch joins the GPUs of a host, so that their order does not matter.
    - Other devices, fake ones of the CPU among them, are laid out in their order, as
      `np.reshape` does.

    Links that close a torus, as large slices have them, are not counted.

    Args:
      axis: The pipeline's axis.
      batch_axes: The axes that may go across slices or hosts if the pipeline cannot, in this order;
        None for `"data"`, if there is one.
      devices: The devices, None for `jax.devices()`. If there are more than the mesh has, the first
        ones are used, provided that all are in one process and one slice, of whose grid the first
        ones fill a box.
      axis_types: The axes' types in order, or one for all; None for Explicit, as `jax.make_mesh`.
      **sizes: The size of each axis, by its name. The mesh has the axes in this order.

    Returns:
      The mesh.

    Raises:
      ValueError: If a size is below 1; there is none of `axis`, or of one of batch_axes; there are
        fewer devices than the mesh has, or more and the first ones are no part to use alone; the
        slices or hosts have unequally many devices, or divide neither the pipeline nor one of
        batch_axes; the devices are of several platforms; or axis_types are too many or too few.
      TypeError: If a size is no integer, or an argument is not of its type.
    """
    sizes = {name: checks.positive_int(name, size) for name, size in sizes.items()}
    require_name("axis", axis)
    if axis not in sizes:
        raise ValueError(
            f"axis={brief(axis)}: must be an axis of the mesh, whose sizes are {_show(sizes)}; "
            "give it a size, or name the pipeline's axis with axis="
        )
    may_cross = _require_batch_axes(batch_axes, axis, sizes)
    types = _require_types(axis_types, sizes)
    used = _require_devices(devices, sizes)
    laid_out = _lay_out(_grid.group_devices(used), axis, may_cross, sizes)
    return jax.sharding.Mesh(laid_out, tuple(sizes), axis_types=types)


def _show(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={brief(size)}" for name, size in sizes.items()) or "none"


def _require_batch_axes(
    batch_axes: AxisNames | None, axis: str, sizes: dict[str, int]
) -> tuple[str, ...]:
    if batch_axes is None:
        return tuple(name for name in ("data",) if name in sizes and name != axis)
    names = require_names("batch_axes", batch_axes)
    if axis in names or not set(names) <= set(sizes) or len(set(names)) < len(names):
        raise ValueError(
            f"batch_axes={brief(batch_axes)}: must be axes of the mesh other than axis={axis!r}, "
            f"each once; its sizes are {_show(sizes)}"
        )
    return names


def _require_types(
    axis_types: AxisType | Sequence[AxisType] | None, sizes: dict[str, int]
) -> tuple[AxisType, ...]:
    if axis_types is None:
        axis_types = AxisType.Explicit  # as jax.make_mesh
    if isinstance(axis_types, AxisType):
        return (axis_types,) * len(sizes)
    if not isinstance(axis_types, Sequence) or not all(isinstance(t, AxisType) for t in axis_types):
        raise TypeError(
            f"axis_types={brief(axis_types)}: must be a jax.sharding.AxisType, or one for each axis"
        )
    if len(axis_types) != len(sizes):
        raise ValueError(
            f"axis_types: must be one, or one for each of the {len(sizes)} axes ({_show(sizes)}), "
            f"got {len(axis_types)}"
        )
    return tuple(axis_types)


def _require_devices(devices: Sequence[Any] | None, sizes: dict[str, int]) -> list[Any]:
    """Requires as many devices as the mesh has, or more of which the first can be used alone."""
    try:
        found = list(jax.devices() if devices is None else devices)
    except TypeError:  # also of an array without dims
        raise TypeError(
            f"devices={brief(devices)}: must be a sequence of jax.Devices, or None"
        ) from None
    strange = [one for one in found if not isinstance(getattr(one, "device_kind", None), str)]
    if strange:
        raise TypeError(
            f"devices: must be jax.Devices, as of jax.devices(), got {show(strange[0])}"
        )
    num_needed, name = math.prod(sizes.values()), "jax.devices()" if devices is None else "devices"
    if num_needed > len(found):
        number = brief(num_needed)
        fake = f', or before JAX is first used jax.config.update("jax_num_cpu_devices", {number})'
        is_cpu = bool(found) and found[0].platform == "cpu"
        raise ValueError(
            f"{_show(sizes)}: needs {number} devices, but {name} has {len(found)}; lower a size"
            + fake * is_cpu
        )
    if len({device.platform for device in found}) > 1:
        raise ValueError(f"devices: must be of one platform, got {found}"[:400])
    if num_needed < len(found):
        is_alone = (
            len({device.process_index for device in found}) == len(_grid.group_devices(found)) == 1
        )
        if not is_alone or not _grid.fills_box(found[:num_needed]):
            why = (
                "the first ones fill no box of the chips' grid"
                if is_alone
                else "they are in several processes or slices, each of which has a part of a mesh"
            )
            raise ValueError(
                f"{_show(sizes)}: needs {num_needed} devices, and {name} has {len(found)}, of "
                f"which none can be left out, because {why}; use all, or give devices="
            )
    elif not all(_grid.fills_box(group) for group in _grid.group_devices(found)):
        raise ValueError(
            f"devices: must fill a box of the chips' grid in each slice, got {found}"[:400]
            + "; for any others make a jax.sharding.Mesh yourself"
        )
    return found[:num_needed]


def _lay_out(
    groups: list[list[Any]], axis: str, may_cross: tuple[str, ...], sizes: dict[str, int]
) -> np.ndarray:
    """Lays devices out, the groups one after the other along the first axis that can."""
    num_groups, kinds = len(groups), _grid.GROUPS.get(groups[0][0].platform, "groups")
    per_group = [len(group) for group in groups]
    if len(set(per_group)) > 1:
        raise ValueError(
            f"devices: the {kinds} must have equally many devices, but have {per_group}; give "
            "devices= with as many of each"
        )
    crossing = next((name for name in (axis, *may_cross) if sizes[name] % num_groups == 0), None)
    if crossing is None:
        tried = " or ".join(f"{name}={sizes[name]}" for name in (axis, *may_cross))
        raise ValueError(
            f"{_show(sizes)}: the devices are {num_groups} {kinds} of {per_group[0]}, and "
            f"{num_groups} must divide {tried}, because one of these goes across the {kinds}; "
            "change the size, or name another axis that may with batch_axes="
        )
    names = list(sizes)
    return _grid.lay_out_across(
        groups,
        tuple(sizes.values()),
        crossing=names.index(crossing),
        pipeline=names.index(axis),
    )
