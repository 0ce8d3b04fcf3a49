"""Names of topologies -> devices to compile for, with or without the hardware."""

import importlib.util
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies as jax_topologies

from dualpipe_jax._devices import H100, V5E, V5P, V6E, Device
from dualpipe_jax._errors import brief
from dualpipe_jax._grid import group_devices, lay_out_across

# An H100 SXM as XLA's GPU compiler wants it described, so that it compiles without one: a
# GpuTargetConfigProto as text, with CUDA's figures. Without the versions in it XLA takes the driver
# for an old one, and leaves loops, conditionals and calls of libraries out of command buffers.
H100_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


# As large as any slice: v5p's has 8,960 chips. CPU devices are this process's threads and memory.
_MOST_CHIPS, _MOST_GPUS, _MOST_CPU_DEVICES = 2**14, 8, 1024
_TPU_SHAPE = re.compile(r"([0-9]{1,5}(?:x[0-9]{1,5}){1,2})(?:\*([0-9]{1,5}))?")
# The axes that go across slices, the first that can: by their usual names, as a step does not name
# them.
_PIPELINE, _DATA = "pipe", "data"
_TPUS = {"v5e": V5E, "v5p": V5P, "v6e": V6E}
_GPUS = {"h100": (H100, H100_TARGET)}
KNOWN = (
    "tpu:v5e:2x4 (also 2x2 up to 16x16)",
    "tpu:v5p:2x2x1 (also 4x4x4 and more)",
    "tpu:v6e:2x4 (also 2x2 up to 16x16)",
    "tpu:v5e:4x4*2 (two slices; also of v5p and v6e)",
    "gpu:h100:8 (one host's GPUs, up to 8)",
    "cpu:8 (this process's CPU devices, up to 1024)",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Topology:
    """Holds the devices to compile for.

    Attributes:
      name: As the user gave it.
      platform: `"tpu"`, `"gpu"` or `"cpu"`.
      devices: The devices as JAX sees them.
      device: The published figures; None for CPUs.
    """

    name: str
    platform: str
    devices: tuple[Any, ...]
    device: Device | None

    @property
    def lowering_platform(self) -> str:
        """Gives the platform's name for `lower`."""
        return "cuda" if self.platform == "gpu" else self.platform


def find_topology(name: str) -> Topology:
    """Makes the devices of a topology.

    Raises:
      ValueError: If the name is not known, or this process has too few CPU devices.
      ModuleNotFoundError: If the compiler for it is not installed.
    """
    match name.split(":") if isinstance(name, str) else ():
        case ("tpu", kind, text) if kind in _TPUS and (found := _TPU_SHAPE.fullmatch(text)):
            # libtpu ends the process where a size is 0.
            shape, num_slices = found[1], int(found[2] or 1)
            if 0 < math.prod(map(int, shape.split("x"))) * num_slices <= _MOST_CHIPS:
                return _tpu(name, kind, shape, num_slices)
        case ("gpu", kind, number) if kind in _GPUS and _is_up_to(_MOST_GPUS, number):
            return _gpu(name, kind, int(number))
        case ("cpu", number) if _is_up_to(_MOST_CPU_DEVICES, number):
            return _cpu(name, int(number))
    raise _unknown(name)


def _is_up_to(most: int, number: str) -> bool:
    return re.fullmatch(r"[0-9]{1,5}", number) is not None and 0 < int(number) <= most


def make_mesh(topology: Topology, axes: dict[str, int], axis_types: Iterable[Any]) -> Any:
    """Lays the topology's devices out along mesh axes, neighbours beside neighbours if it can.

    One axis goes across slices: the pipeline's, else `data`, else the first that can.

    Raises:
      ValueError: If there are not as many devices as the mesh has, or the number of slices divides
        no axis.
    """
    shape, num_devices = tuple(axes.values()), len(topology.devices)
    if int(np.prod(shape)) != num_devices:
        sizes = ", ".join(f"{axis} {size}" for axis, size in axes.items())
        raise ValueError(
            f"topology={topology.name!r}: has {num_devices} devices, but the step's mesh "
            f"({sizes}) needs {int(np.prod(shape))}; name a topology of that size"
        )
    groups, names = group_devices(topology.devices), list(axes)
    first_to_last = sorted(names, key=lambda name: (name != _PIPELINE, name != _DATA))
    crossing = next((name for name in first_to_last if axes[name] % len(groups) == 0), None)
    if crossing is None:
        raise ValueError(
            f"topology={topology.name!r}: has {len(groups)} slices, which must divide the size of "
            f"the mesh axis that goes across them, but the step's mesh is {axes}; change a size, "
            "or the number of slices"
        )
    laid_out = lay_out_across(
        groups,
        shape,
        crossing=names.index(crossing),
        pipeline=names.index(_PIPELINE) if _PIPELINE in axes else None,
    )
    return jax.sharding.Mesh(laid_out, tuple(axes), axis_types=tuple(axis_types))


def _tpu(name: str, kind: str, shape: str, num_slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise _missing(name, "jax[tpu]")
    if not [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]:
        # A machine without TPUs. libtpu reads these when it is loaded: it would ask a cloud's
        # metadata server for a TPU, and refuse to be loaded by two processes at once.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        made = jax_topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", num_slices=num_slices
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"{_unknown(name)}; the TPU compiler says: {error}") from error
    return Topology(name=name, platform="tpu", devices=tuple(made.devices), device=_TPUS[kind])


def _gpu(name: str, kind: str, number: int) -> Topology:
    if not all(map(importlib.util.find_spec, ("jax_plugins", "jax_plugins.xla_cuda13"))):
        raise _missing(name, "jax[cuda13]")
    device, target = _GPUS[kind]
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    made = jax_topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=target, topology=f"1x{number}x1"
    )
    return Topology(name=name, platform="gpu", devices=tuple(made.devices), device=device)


def _cpu(name: str, number: int) -> Topology:
    devices = jax.devices("cpu")
    if len(devices) < number:
        raise ValueError(
            f"topology={brief(name)}: this process has {len(devices)} CPU devices; before JAX is "
            f'first used, call jax.config.update("jax_num_cpu_devices", {number})'
        )
    return Topology(name=name, platform="cpu", devices=tuple(devices[:number]), device=None)


def _unknown(name: Any) -> ValueError:
    return ValueError(f"topology={brief(name)}: must be one of {', '.join(KNOWN)}")


def _missing(name: str, package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"topology={brief(name)}: needs a compiler that is not installed: pip install '{package}'"
    )
