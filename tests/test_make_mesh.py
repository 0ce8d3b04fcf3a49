"""Meshes on hardware: the links between ranks, by coordinates and in compiled programs."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies as jax_topologies
from jax.sharding import AxisType, Mesh

import dualpipe_jax as dpj
from dualpipe_jax._grid import lay_out
from dualpipe_jax._preflight.hlo import parse
from dualpipe_jax._preflight.links import source_target_pairs
from dualpipe_jax._preflight.topologies import find_topology
from tests.preflight.steps import make_args, make_step


@dataclass(frozen=True)
class Gpu:
    """A GPU of another host, as far as a mesh looks at it."""

    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "toy"


def tpus(name: str, num_slices: int = 1) -> list[Any]:
    """The devices of absent TPUs."""
    devices = list(find_topology(f"tpu:{name}").devices)
    if num_slices > 1:
        made = jax_topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=num_slices
        )
        devices = list(made.devices)
    return devices


def num_links(a: Any, b: Any) -> int:
    """Links from a chip to another one of its slice."""
    return sum(abs(here - there) for here, there in zip(a.coords, b.coords, strict=True))


def links_between(devices: np.ndarray, axis: int) -> list[int]:
    lines = np.moveaxis(devices, axis, -1).reshape(-1, devices.shape[axis])
    return [num_links(a, b) for line in lines for a, b in itertools.pairwise(line)]


def test_axes_are_in_the_order_of_the_keywords() -> None:
    mesh = dpj.make_mesh(data=2, pipe=4)
    assert mesh.axis_names == ("data", "pipe")
    by_hand = jax.make_mesh((2, 4), ("data", "pipe"))
    assert mesh == by_hand
    assert mesh.axis_types == by_hand.axis_types
    few = dpj.make_mesh(stage=2, axis="stage", axis_types=AxisType.Auto)
    assert list(few.devices) == jax.devices()[:2]
    assert few.axis_types == (AxisType.Auto,)
    types = (AxisType.Auto, AxisType.Explicit)
    assert dpj.make_mesh(pipe=2, data=2, axis_types=types).axis_types == types


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:2x4", {"pipe": 8}),
        ("v5e:2x4", {"pipe": 4, "data": 2}),
        ("v5e:2x4", {"data": 4, "pipe": 2}),
        ("v5e:4x4", {"pipe": 16}),
        ("v5e:4x4", {"pipe": 4, "expert": 4}),
        ("v5e:8x8", {"data": 8, "pipe": 8}),
        ("v5p:2x2x2", {"pipe": 2, "data": 2, "expert": 2}),
        ("v5p:4x4x4", {"pipe": 16, "expert": 4}),
        ("v5p:4x4x4", {"pipe": 4, "data": 4, "expert": 4}),
    ],
)
def test_neighbours_along_every_axis_are_one_link_apart(name: str, sizes: dict[str, Any]) -> None:
    devices = tpus(name)
    mesh = dpj.make_mesh(**sizes, devices=devices)
    assert mesh.devices.shape == tuple(sizes.values())
    assert set(mesh.devices.flat) == set(devices)
    for axis in range(len(sizes)):
        assert set(links_between(mesh.devices, axis)) == {1}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("v5e:2x4", {"pipe": 2, "data": 2, "expert": 2}),
        ("v5e:4x4", {"data": 2, "pipe": 8}),
        ("v5e:4x4", {"pipe": 4, "data": 2, "expert": 2}),
        ("v5e:16x16", {"pipe": 8, "data": 4, "expert": 8}),
    ],
)
def test_ranks_come_first_and_then_the_last_axis(name: str, sizes: dict[str, Any]) -> None:
    mesh = dpj.make_mesh(**sizes, devices=tpus(name))
    links = {axis: links_between(mesh.devices, dim) for dim, axis in enumerate(sizes)}
    assert set(links["pipe"]) == {1}
    assert max(links["data"]) > 1
    if "expert" in sizes:
        assert set(links["expert"]) == {1}


@pytest.mark.parametrize(
    ("name", "most"), [("v5e:2x2", 1), ("v5e:2x4", 1), ("v5p:2x2x2", 1), ("v5e:4x4", 3)]
)
def test_mirror_ranks_are_near_each_other(name: str, most: int) -> None:
    devices = tpus(name)
    ranks = dpj.make_mesh(pipe=len(devices), devices=devices).devices
    assert max(num_links(a, b) for a, b in zip(ranks, ranks[::-1], strict=True)) == most


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [
        ({"pipe": 8}, "pipe"),
        ({"pipe": 4, "data": 2}, "pipe"),
        ({"data": 2, "pipe": 4}, "pipe"),
        ({"pipe": 1, "data": 4, "expert": 2}, "data"),
    ],
)
def test_one_axis_goes_across_slices(sizes: dict[str, Any], crossing: str) -> None:
    devices = tpus("v5e:2x2", num_slices=2)
    mesh = dpj.make_mesh(**sizes, devices=devices[::-1])
    assert set(mesh.devices.flat) == set(devices)
    halves = np.split(mesh.devices, 2, axis=list(sizes).index(crossing))
    for half, index in zip(halves, (0, 1), strict=True):
        assert {device.slice_index for device in half.flat} == {index}
        for axis in range(len(sizes)):
            assert set(links_between(half, axis)) <= {1}


def test_batch_axes_may_cross_in_their_order() -> None:
    devices = tpus("v5e:2x2", num_slices=2)
    sizes: dict[str, Any] = {"pipe": 1, "replica": 2, "data": 4}
    mesh = dpj.make_mesh(**sizes, devices=devices, batch_axes=("replica", "data"))
    assert [len({d.slice_index for d in part.flat}) for part in mesh.devices[0]] == [1, 1]


@pytest.mark.parametrize("has_slices", [True, False])
@pytest.mark.parametrize(
    ("sizes", "hosts"),
    [
        ({"pipe": 4, "data": 2}, [[0, 0], [0, 0], [1, 1], [1, 1]]),
        ({"data": 4, "pipe": 2}, [[0, 1], [0, 1], [0, 1], [0, 1]]),
        ({"data": 8, "pipe": 1}, [[0], [0], [0], [0], [1], [1], [1], [1]]),
    ],
)
def test_ranks_of_a_host_are_consecutive(
    sizes: dict[str, Any], hosts: list[list[int]], has_slices: bool
) -> None:
    # Hosts take turns in the list of devices, and their devices are in no order.
    gpus: Any = [
        Gpu(id=host * 4 + i, process_index=host, slice_index=host if has_slices else None)
        for i in (2, 0, 3, 1)
        for host in (1, 0)
    ]
    mesh = dpj.make_mesh(**sizes, devices=gpus)
    assert [[gpu.process_index for gpu in row] for row in mesh.devices] == hosts
    for host in (0, 1):
        ids = [gpu.id for gpu in mesh.devices.flat if gpu.process_index == host]
        assert ids == sorted(ids)


def test_processes_that_share_a_switch_are_one_host() -> None:
    gpus: Any = [Gpu(id=i, process_index=i, slice_index=0) for i in range(4)]
    mesh = dpj.make_mesh(pipe=2, expert=2, devices=gpus)
    assert [[gpu.id for gpu in row] for row in mesh.devices] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pipe": 0}, ValueError, "pipe=0: must be an integer of at least 1"),
        ({"pipe": 2, "data": -1}, ValueError, "data=-1: must be an integer of at least 1"),
        ({"pipe": True}, ValueError, "pipe=True: must be an integer of at least 1"),
        ({"pipe": 2.0}, TypeError, "pipe=2.0: must be an integer, got float 2.0"),
        ({"pipe": 4, "data": 4}, ValueError, "needs 16 devices, but jax.devices.. has 8; .*, 16"),
        ({"data": 2}, ValueError, "axis='pipe': must be an axis of the mesh, .* data=2; give"),
        ({"pipe": 2, "axis": "stage"}, ValueError, "axis='stage': must be an axis .* pipe=2"),
        ({"pipe": 2, "axis": 3}, TypeError, "axis=3: must be a name"),
        ({"pipe": 2, "batch_axes": "pipe"}, ValueError, "batch_axes='pipe': must be axes of the"),
        ({"pipe": 2, "batch_axes": "dp"}, ValueError, "batch_axes='dp': must be axes of the mesh"),
        ({"pipe": 2, "axis_types": "Auto"}, TypeError, "axis_types='Auto': must be a jax.sharding"),
        (
            {"pipe": 2, "axis_types": (AxisType.Auto,) * 2},
            ValueError,
            r"one for each of the 1 axes \(pipe=2\), got 2",
        ),
        ({"pipe": 2, "devices": 2}, TypeError, "devices=2: must be a sequence of jax.Devices"),
        ({"pipe": 2, "devices": [0, 1]}, TypeError, "must be jax.Devices, .* got int 0"),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dpj.make_mesh(**arguments)


def test_devices_that_make_no_mesh() -> None:
    with pytest.raises(ValueError, match="2 slices of 4, and 2 must divide pipe=1 or data=1"):
        dpj.make_mesh(pipe=1, data=1, expert=8, devices=tpus("v5e:2x2", num_slices=2))
    with pytest.raises(ValueError, match=r"slices must have equally many devices.*\[4, 1\]"):
        dpj.make_mesh(pipe=5, devices=tpus("v5e:2x2", num_slices=2)[:5])
    with pytest.raises(ValueError, match="none can be left out, because they are in several"):
        dpj.make_mesh(pipe=4, devices=tpus("v5e:2x4"))
    with pytest.raises(ValueError, match="because the first ones fill no box"):
        dpj.make_mesh(pipe=3, devices=tpus("v5e:2x2"))
    with pytest.raises(ValueError, match="must fill a box of the chips' grid"):
        dpj.make_mesh(pipe=3, devices=tpus("v5e:2x2")[:3])
    with pytest.raises(ValueError, match="must be of one platform"):
        dpj.make_mesh(pipe=8, devices=[*tpus("v5e:2x2"), *jax.devices()[:4]])
    assert dpj.make_mesh(pipe=2, devices=tpus("v5e:2x2")).devices.size == 2


def test_a_core_of_a_chip_is_beside_the_other() -> None:
    chips = list(
        jax_topologies.get_topology_desc(platform="tpu", topology_name="tpu7x:2x2x1").devices
    )
    ranks = dpj.make_mesh(pipe=8, devices=chips).devices
    steps = [
        num_links(a, b) + abs(a.core_on_chip - b.core_on_chip) for a, b in itertools.pairwise(ranks)
    ]
    assert steps == [1] * 7


def test_a_layout_has_each_device_once() -> None:
    """Also where not every axis has links of its own."""
    devices = tpus("v5e:4x8")
    for shape in itertools.product((1, 2, 4), (2, 4, 8), (1, 2, 4, 8)):
        if np.prod(shape) == 32:
            for pipeline in range(3):
                laid_out = lay_out(devices, shape, pipeline=pipeline)
                assert laid_out.shape == shape
                assert set(laid_out.flat) == set(devices)
                assert set(links_between(laid_out, pipeline)) <= {1}


def compile_step(mesh: Mesh, **options: Any) -> str:
    """A step for absent TPUs, as text."""
    with jax.enable_x64(False):
        step = make_step(mesh, num_microbatches=16, **options)
        args = make_args(mesh, num_layers=mesh.shape["pipe"], rows=16)
        text = jax.jit(step).lower(*args).compile().as_text()
    assert text is not None
    return text


@pytest.mark.slow
def test_a_permute_of_a_step_takes_single_links() -> None:
    mesh = dpj.make_mesh(pipe=8, devices=tpus("v5e:2x4"))
    found = [
        pairs
        for computation in parse(compile_step(mesh)).computations.values()
        for instruction in computation.instructions
        if (pairs := source_target_pairs(instruction))
    ]
    pairs = {pair for each in found for pair in each}
    # To both neighbours while the pipeline runs, and once a step to the mirror rank.
    between = {(p, p + 1) for p in range(7)} | {(p + 1, p) for p in range(7)}
    assert pairs == between | {(p, 7 - p) for p in range(8)}
    ranks = mesh.devices
    assert {num_links(ranks[source], ranks[target]) for source, target in pairs} == {1}
    # JAX's own order of these chips would send over more.
    theirs = jax.make_mesh((8,), ("pipe",), devices=tpus("v5e:2x4")).devices
    assert max(links_between(theirs, 0)) > 1


@pytest.mark.slow
def test_one_boundary_of_the_pipeline_crosses_slices() -> None:
    mesh = dpj.make_mesh(pipe=8, devices=tpus("v5e:2x2", num_slices=2))
    # Transfers between slices go through the hosts, which number chips by slice: 200000.
    numbers = {
        (device.slice_index + 1) * 100_000 + device.id % 100_000: rank
        for rank, device in enumerate(mesh.devices)
    }
    text = compile_step(mesh, schedule="1f1b")
    sent = re.findall(r" send\(.*_xla_megascale_target=\{(\{.*?\})\}", text)
    assert sent
    crossing = {
        tuple(numbers[int(number)] for number in pair)
        for each in sent
        for pair in re.findall(r"(\d+)->(\d+)", each)
    }
    assert crossing == {(3, 4), (4, 3)}
