"""Devices -> their layout along the axes of a mesh, neighbours one link apart where possible.

The chips of a TPU slice are the points of a grid, and a link joins each to its neighbours. Links
that close a torus are not counted, because devices do not say where it closes. A device that is a
core of a chip is beside the chip's other core. GPUs share a switch: any order is as good.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from numpy.typing import NDArray

# The names of groups that a fast network joins, by platform.
GROUPS = {"tpu": "slices", "gpu": "hosts"}
# A mesh axis's part of each dim of the grid; their product is the axis's size.
Parts = tuple[int, ...]
# Divisions of a grid with equally few gaps differ in their mirrors only, and building takes time.
_MOST_BUILT = 16


def lay_out(
    devices: Sequence[Any], shape: tuple[int, ...], *, pipeline: int | None = None
) -> np.ndarray:
    """Lays devices out along mesh axes, neighbours beside neighbours where possible.

    Args:
      devices: As many as the mesh has; TPUs must fill a box of the grid.
      shape: The sizes of the axes.
      pipeline: The dim of the pipeline's axis, whose neighbours come first, then those of the last
        axis, of the one before, and so on; then the distances between ranks p and P - 1 - p.
        None: as many devices as possible on axes whose neighbours are all neighbours on the grid.

    Returns:
      The devices: object[*shape].
    """
    if pipeline is None:
        return max(_layouts(devices, shape, ()), key=_fit)
    others = [dim for dim in reversed(range(len(shape))) if dim != pipeline]
    first_to_last = (pipeline, *others)
    return max(
        _layouts(devices, shape, first_to_last),
        key=lambda laid_out: _fit_pipeline(laid_out, first_to_last),
    )


def group_devices(devices: Sequence[Any]) -> list[list[Any]]:
    """Groups devices by the fast network that joins them: slices of TPUs, hosts of GPUs."""
    if devices[0].platform not in GROUPS:
        return [list(devices)]
    # Single slices of TPUs have no index, or None.
    keys = [getattr(device, "slice_index", None) for device in devices]
    if None in keys:
        is_gpu = devices[0].platform == "gpu"
        keys = [device.process_index if is_gpu else 0 for device in devices]
    groups: dict[int, list[Any]] = {key: [] for key in sorted(set(keys))}
    for key, device in zip(keys, devices, strict=True):
        groups[key].append(device)
    return list(groups.values())


def lay_out_across(
    groups: Sequence[Sequence[Any]],
    shape: tuple[int, ...],
    *,
    crossing: int,
    pipeline: int | None = None,
) -> np.ndarray:
    """Lays the devices of each group out, and puts the groups one after the other along one axis.

    `jax.experimental.mesh_utils.create_hybrid_device_mesh` does so too, but inside of its slices
    ranks p and p + 1 are not always neighbours: of 8 ranks on 2 x 4 chips of v5e, the second and
    the third are two links apart.

    Args:
      groups: Equally many devices in each.
      shape: The sizes of the axes.
      crossing: The dim of the axis that goes across groups, a multiple of their number.
      pipeline: As for `lay_out`.

    Returns:
      The devices: object[*shape].
    """
    inside = tuple(
        size // len(groups) if dim == crossing else size for dim, size in enumerate(shape)
    )
    laid_out = [lay_out(_in_order(group), inside, pipeline=pipeline) for group in groups]
    return np.concatenate(laid_out, axis=crossing)


def _in_order(group: Sequence[Any]) -> list[Any]:
    """Sorts GPUs by XLA's numbers, because the order of processes may be any."""
    is_gpu = group[0].platform == "gpu"
    return sorted(group, key=lambda device: device.id) if is_gpu else list(group)


def fills_box(devices: Sequence[Any]) -> bool:
    """Whether devices that are points of a grid fill a box of it; True where there is no grid."""
    if not _is_grid(devices[0]):
        return True
    points = _points(np.array(devices, dtype=object))
    return math.prod(np.ptp(points, axis=0) + 1) == len(np.unique(points, axis=0)) == len(devices)


def num_adjacent(devices: np.ndarray) -> int:
    """Counts the neighbours along mesh axes that are neighbours on the chips' grid."""
    if not _is_grid(devices.flat[0]):
        return 0
    points = _points(devices)
    return sum(int((_hops(points, axis) == 1).sum()) for axis in range(devices.ndim))


def is_adjacent_along(devices: np.ndarray, axis: int) -> bool | None:
    """Whether all neighbours along an axis are neighbours on the grid; None where there is none.

    Neighbours in different slices do not count.
    """
    if not _is_grid(devices.flat[0]):
        return None
    slices = [getattr(device, "slice_index", None) or 0 for device in devices.flat]
    is_inside = np.diff(np.array(slices).reshape(devices.shape), axis=axis) == 0
    return bool((_hops(_points(devices), axis)[is_inside] == 1).all())


def _is_grid(device: Any) -> bool:
    """Whether a device has neighbours: GPUs have coordinates too, but share a switch."""
    return device.platform == "tpu" and hasattr(device, "coords")


def _points(devices: np.ndarray) -> NDArray[np.int_]:
    """Gives the points of devices on the grid, and the core on the chip: int[*shape, 4]."""
    points = [(*device.coords, getattr(device, "core_on_chip", 0)) for device in devices.flat]
    return np.array(points, int).reshape(*devices.shape, -1)


def _hops(points: NDArray[np.int_], axis: int) -> NDArray[np.int_]:
    """Counts the links between neighbours along an axis."""
    return np.abs(np.diff(points, axis=axis)).sum(axis=-1)


def _fit(devices: np.ndarray) -> tuple[int, int]:
    """Ranks a layout of devices: by the sizes of axes without a gap, then by its neighbours."""
    whole = [n for axis, n in enumerate(devices.shape) if is_adjacent_along(devices, axis)]
    return sum(whole), num_adjacent(devices)


def _fit_pipeline(devices: np.ndarray, first_to_last: tuple[int, ...]) -> tuple[int, ...]:
    """Ranks a layout of devices by the gaps along the axes, first to last, then by its mirrors."""
    if not _is_grid(devices.flat[0]):
        return ()
    points = _points(devices)
    gaps = [int((_hops(points, axis) != 1).sum()) for axis in first_to_last]
    ranks = np.moveaxis(points, first_to_last[0], 0)
    return (*(-number for number in gaps), -int(np.abs(ranks - ranks[::-1]).sum()))


def _layouts(
    devices: Sequence[Any], shape: tuple[int, ...], first_to_last: tuple[int, ...]
) -> list[np.ndarray]:
    """Lists ways to lay the devices out: JAX's own first, then along the grid, also to and fro."""
    if not _is_grid(devices[0]):
        return [np.array(devices, dtype=object).reshape(shape)]
    layouts = []
    with contextlib.suppress(NotImplementedError, ValueError):  # JAX knows no way
        layouts.append(mesh_utils.create_device_mesh(shape, devices=devices))
    grid = _grid(devices)
    for order in itertools.permutations(range(grid.ndim)):
        turned = grid.transpose(order)
        layouts.append(turned.reshape(shape))
        for split in range(grid.ndim):
            # The first dims as one line, and the others as another.
            lines = [_to_and_fro(dims) for dims in (turned.shape[:split], turned.shape[split:])]
            flat = turned.reshape(len(lines[0]), len(lines[1]))[np.ix_(*lines)]
            layouts += [flat.reshape(shape), flat.reshape(shape[::-1]).transpose()]
    if first_to_last:
        layouts += _in_boxes(grid, shape, first_to_last)
    return layouts


def _grid(devices: Sequence[Any]) -> np.ndarray:
    """Places devices by their coordinates: object[x, y, z], or [x, y, z, core] of several cores."""
    assert fills_box(devices), devices
    points = _points(np.array(devices, dtype=object))
    points -= points.min(axis=0)
    grid = np.empty(points.max(axis=0) + 1, dtype=object)
    for point, device in zip(points, devices, strict=True):
        grid[tuple(point)] = device
    return grid[..., 0] if grid.shape[-1] == 1 else grid


def _to_and_fro(dims: tuple[int, ...]) -> np.ndarray:
    """Orders the points of a grid so that each follows a neighbour, as an ox ploughs.

    >>> _to_and_fro((2, 3)).tolist()
    [0, 1, 2, 5, 4, 3]
    """
    if not dims:
        return np.zeros(1, int)
    row = _to_and_fro(dims[1:])
    rows = [row if i % 2 == 0 else row[::-1] for i in range(dims[0])]
    return np.concatenate([i * len(row) + row for i, row in enumerate(rows)])


def _in_boxes(
    grid: np.ndarray, shape: tuple[int, ...], first_to_last: tuple[int, ...]
) -> list[np.ndarray]:
    """Lists layouts in which each axis is a box of the grid, and the first axis one without gaps.

    A dim of the grid is divided among the axes, the first axis innermost. Two pipelines of 4 ranks
    on 2 x 4 chips are rows, because two squares of 2 x 2 would be two links apart; on 2 x 2 x 2
    chips they are squares in one of three planes:

    >>> chips = np.arange(8)
    >>> [each.T.tolist() for each in _in_boxes(chips.reshape(2, 4), (4, 2), (0, 1))]
    [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    >>> [each.T.tolist() for each in _in_boxes(chips.reshape(2, 2, 2), (4, 2), (0, 1))]
    [[[0, 1, 3, 2], [4, 5, 7, 6]],
     [[0, 1, 5, 4], [2, 3, 7, 6]],
     [[0, 2, 6, 4], [1, 3, 7, 5]]]
    """
    sizes = tuple(shape[dim] for dim in first_to_last)
    divided = sorted(_divide(grid.shape, sizes), key=_gaps)
    best = [boxes for boxes in divided if _gaps(boxes) == _gaps(divided[0])]
    return [
        np.moveaxis(_build(grid, boxes), range(len(shape)), first_to_last)
        for boxes in best[:_MOST_BUILT]
    ]


def _divide(dims: tuple[int, ...], sizes: tuple[int, ...]) -> Iterator[tuple[Parts, ...]]:
    """Yields the ways to divide the dims of a grid among axes of these sizes.

    >>> list(_divide((2, 4), (4, 2)))
    [((1, 4), (2, 1)), ((2, 2), (1, 2))]
    """
    if not sizes:
        yield ()
        return
    divisors = [[n for n in range(1, dim + 1) if dim % n == 0] for dim in dims]
    for parts in itertools.product(*divisors):
        if math.prod(parts) == sizes[0]:
            rest = tuple(dim // part for dim, part in zip(dims, parts, strict=True))
            yield from ((parts, *more) for more in _divide(rest, sizes[1:]))


def _gaps(boxes: tuple[Parts, ...]) -> tuple[int, ...]:
    """Counts the gaps in a line of each axis: steps in dims where axes before it have a part."""
    return tuple(
        math.prod(part for dim, part in enumerate(parts) if _stride(boxes[:axis], dim) > 1) - 1
        for axis, parts in enumerate(boxes)
    )


def _stride(boxes: tuple[Parts, ...], dim: int) -> int:
    return math.prod(parts[dim] for parts in boxes)


def _build(grid: np.ndarray, boxes: tuple[Parts, ...]) -> np.ndarray:
    """Lays the devices of a grid out: object[*sizes], the axes as in `boxes`."""
    # A dim becomes its parts, the last axis's outermost: [*parts of dim 0, *parts of dim 1, ..].
    num_axes, num_dims = len(boxes), grid.ndim
    split = grid.reshape([parts[dim] for dim in range(num_dims) for parts in reversed(boxes)])
    order, lines = [], []
    for axis, parts in enumerate(boxes):
        strides = [_stride(boxes[:axis], dim) for dim in range(num_dims)]
        # Long steps outermost, so that there are few; then short dims, so that the way goes there
        # and back beside it where a dim is 2.
        keys = [(parts[dim] == 1, -strides[dim], parts[dim]) for dim in range(num_dims)]
        dims = sorted(range(num_dims), key=lambda dim: keys[dim])
        order += [dim * num_axes + num_axes - 1 - axis for dim in dims]
        lines.append(_to_and_fro(tuple(parts[dim] for dim in dims)))
    sizes = [len(line) for line in lines]
    return split.transpose(order).reshape(sizes)[np.ix_(*lines)]
