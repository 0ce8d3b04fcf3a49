"""Names of topologies, and how their devices are laid out along a mesh."""

import importlib.util
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from dualpipe_jax._grid import is_adjacent_along
from dualpipe_jax._preflight import topologies
from dualpipe_jax._preflight.options import compiler_options, explain_options
from dualpipe_jax._preflight.topologies import find_topology, make_mesh


@dataclass(frozen=True)
class Chip:
    coords: tuple[int, int, int]
    device_kind: str = "toy"
    platform: str = "tpu"


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            "tpu",
            "tpu:v9:2x4",
            "gpu:h100:9",
            "gpu:h100:0",
            "gpu:h100:²",
            "cpu:x",
            "cpu:99999",
            8,
        ),
        # libtpu would end the process.
        *("tpu:v5e:0x0", "tpu:v5p:2x2x0", "tpu:v5e:2x-2", "tpu:v5e:", "tpu:v5e:99999x99999"),
        *(
            "tpu:v5e:2x2*0",
            "tpu:v5e:2x2*",
            "tpu:v5e:2x2*-2",
            "tpu:v5e:2x2*2*2",
            "tpu:v5e:2x2*99999",
        ),
    ],
)
def test_unknown_topology_lists_the_known(name: object) -> None:
    with pytest.raises(ValueError, match=r"must be one of tpu:v5e:2x4 .*gpu:h100:8 .*cpu:8"):
        find_topology(name)  # pyrefly: ignore


def test_too_few_cpu_devices() -> None:
    assert len(find_topology("cpu:8").devices) == 8
    with pytest.raises(ValueError, match=r'has 8 CPU devices; .*"jax_num_cpu_devices", 9'):
        find_topology("cpu:9")


@pytest.mark.parametrize(("name", "extra"), [("tpu:v5e:2x4", "tpu"), ("gpu:h100:8", "cuda13")])
def test_missing_compiler_names_its_package(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'jax\[{extra}\]'"):
        find_topology(name)


def test_shape_that_the_tpu_compiler_does_not_know() -> None:
    with pytest.raises(ValueError, match="topology='tpu:v5e:3x5': must be one of"):
        find_topology("tpu:v5e:3x5")


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("tpu:v5e:2x4", [(8,), (2, 4), (4, 2)]),
        ("tpu:v5e:4x4", [(16,), (4, 4), (2, 8), (8, 2)]),
        ("tpu:v5p:2x2x2", [(8,), (2, 4), (4, 2), (2, 2, 2)]),
        ("tpu:v5p:4x4x4", [(64,), (16, 4), (4, 16), (4, 4, 4)]),
    ],
)
def test_neighbours_of_the_mesh_are_neighbours_on_the_grid(
    name: str, shapes: list[tuple[int, ...]]
) -> None:
    topology = find_topology(name)
    for shape in shapes:
        axes = dict(zip(["a", "b", "c"], shape, strict=False))
        mesh = make_mesh(topology, axes, (AxisType.Auto,) * len(shape))
        assert set(mesh.devices.flat) == set(topology.devices)
        assert mesh.devices.shape == shape
        for dim in range(len(shape)):
            # A line of eight chips folds on 4 x 4, and then the other one cannot lie beside it.
            if not (name == "tpu:v5e:4x4" and shape[dim] == 2):
                assert is_adjacent_along(mesh.devices, dim)


@pytest.mark.parametrize(
    ("name", "sizes", "crossing"),
    [
        ("tpu:v5e:2x2*2", {"data": 2, "pipe": 4}, 1),
        ("tpu:v5e:2x2*2", {"expert": 2, "data": 4}, 1),
        ("tpu:v5e:2x2*2", {"pipe": 1, "expert": 8}, 1),
        ("tpu:v5e:2x4*3", {"pipe": 4, "data": 6}, 1),  # three slices do not divide the pipeline
    ],
)
def test_one_axis_goes_across_slices(name: str, sizes: dict[str, int], crossing: int) -> None:
    topology = find_topology(name)
    mesh = make_mesh(topology, sizes, (AxisType.Auto,) * len(sizes))
    assert {device.id for device in mesh.devices.flat} == {d.id for d in topology.devices}
    number = int(name[-1])
    for index, part in enumerate(np.split(mesh.devices, number, axis=crossing)):
        assert {device.slice_index for device in part.flat} == {index}
    # The chips of different slices are no neighbours on a grid, and not far apart on one either.
    assert is_adjacent_along(mesh.devices, crossing)


def test_slices_must_divide_an_axis() -> None:
    sizes = dict.fromkeys(("pipe", "data", "expert", "model"), 2)
    with pytest.raises(ValueError, match=r"2x2\*4': has 4 slices, which must divide .*'pipe': 2"):
        make_mesh(find_topology("tpu:v5e:2x2*4"), sizes, (AxisType.Auto,) * 4)


def test_neighbours_far_apart_are_noticed() -> None:
    chips = [Chip((x, 0, 0)) for x in (0, 2, 1, 3)]
    assert is_adjacent_along(np.array(chips, dtype=object), 0) is False
    assert is_adjacent_along(np.array(jax.devices()), 0) is None


def test_options_have_reasons() -> None:
    assert compiler_options("tpu") == {
        "xla_tpu_enable_async_all_to_all": True,
        "xla_tpu_enable_async_ragged_all_to_all": True,
        "xla_lhs_loop_fusion_latency_multiplier": "0.5",
        "xla_msa_use_bundle_aware_cost_model": True,
    }
    assert compiler_options("cpu") == {}
    for platform in ("tpu", "gpu"):
        for option in explain_options(platform):
            assert compiler_options(platform)[option.name] == option.value
            assert len(option.reason) > 20
    with pytest.raises(ValueError, match="platform='cuda': must be one of 'tpu', 'gpu', 'cpu'"):
        compiler_options("cuda")


def test_known_names_are_found() -> None:
    assert topologies.KNOWN
    for text in topologies.KNOWN:
        name = text.split()[0]
        if not name.startswith("gpu"):
            assert find_topology(name).name == name
