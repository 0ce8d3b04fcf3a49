"""Published figures of devices, by the devices themselves or their kinds."""

import jax
import pytest
from jax.experimental import topologies as jax_topologies

import dualpipe_jax as dpj
from dualpipe_jax import _devices
from dualpipe_jax._preflight.topologies import H100_TARGET, find_topology


@pytest.mark.parametrize(
    ("kind", "name", "num_bytes", "tflops", "gigabytes_a_second"),
    [
        # As published: all links of a device, both directions.
        ("TPU v4", "TPU v4", 32 * 2**30, 275, 6 * 2 * 50),
        ("TPU v5 lite", "TPU v5e", 16 * 2**30, 197, 400),
        ("TPU v5", "TPU v5p", 95 * 2**30, 459, 1200),
        ("TPU v6 lite", "TPU v6e", 32 * 2**30, 918, 800),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB", 80e9, 312, 600),
        ("NVIDIA H100 80GB HBM3", "H100 SXM", 80e9, 989, 900),
        ("NVIDIA H200", "H200 SXM", 141e9, 989, 900),
        ("NVIDIA B200", "B200", 1440e9 / 8, 4500 / 2, 1800),
    ],
)
def test_figures_are_as_published(
    kind: str, name: str, num_bytes: float, tflops: float, gigabytes_a_second: float
) -> None:
    figures = dpj.device_figures(kind)
    assert figures is not None
    assert figures is dpj.device_figures(name)
    assert (figures.kind, figures.name) == (kind, name)
    assert (figures.memory, figures.peak_flops) == (num_bytes, tflops * 1e12)
    num_links = {"TPU v4": 6, "TPU v5 lite": 4, "TPU v5": 6, "TPU v6 lite": 4}.get(kind, 1)
    assert figures.link * num_links * 2 == gigabytes_a_second * 1e9
    assert figures.is_switched is kind.startswith("NVIDIA")


def test_the_table_has_no_kind_twice() -> None:
    names = [name for each in _devices.KNOWN for name in {each.kind, each.name}]
    assert len(set(names)) == len(names) == 2 * len(_devices.KNOWN) - 1  # a v4's name is its kind


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        ("v4:2x2x1", "TPU v4"),
        ("v5e:2x2", "TPU v5e"),
        ("v5p:2x2x1", "TPU v5p"),
        ("v6e:2x2", "TPU v6e"),
    ],
)
def test_kinds_are_those_that_jax_reports(topology: str, name: str) -> None:
    find_topology("tpu:v5e:2x2")  # keeps libtpu from looking for a TPU
    made = jax_topologies.get_topology_desc(platform="tpu", topology_name=topology)
    figures = dpj.device_figures(made.devices[0])
    assert figures is not None
    assert figures.name == name


def test_the_described_gpu_is_in_the_table() -> None:
    assert f'device_description_str: "{_devices.H100.kind}"' in H100_TARGET


def test_devices_without_figures() -> None:
    assert dpj.device_figures(jax.devices()[0]) is None
    assert dpj.device_figures("TPU v1") is None
    with pytest.raises(TypeError, match=r"device=3: must be a jax\.Device, as of jax\.devices"):
        dpj.device_figures(3)
