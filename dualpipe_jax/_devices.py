"""Devices -> their published figures: memory, peak, clock, and links.

The bandwidth of a link is that of one direction: a device can send so much over it while it
receives as much. Google publishes the sum over a chip's links and both directions.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Device:
    """Holds the published figures of a device.

    Attributes:
      name: Its usual name.
      kind: Its name in JAX, `jax.Device.device_kind`.
      memory: Its memory, in bytes.
      peak_flops: Dense bfloat16 FLOPs a second.
      clock: Cycles a second, the unit of the compiler's estimates; None without such estimates.
      link: Bytes a second over one link, in one direction.
      host_link: Bytes a second between the device and its host's memory, in one direction.
      dcn: Its share of its host's data-centre network, in bytes a second each way; None where
        nothing is published.
      is_switched: Whether a switch connects all devices, each with all of `link`, instead of a grid
        that connects neighbours.
    """

    name: str
    kind: str
    memory: int
    peak_flops: float
    clock: float | None
    link: float
    host_link: float
    dcn: float | None = None
    is_switched: bool = False

    def __post_init__(self) -> None:
        assert min(self.memory, self.peak_flops, self.link, self.host_link) > 0, self


_GIB = 2**30
# PCI Express, 16 lanes, one direction, as NVIDIA's datasheets round it. Google publishes no figure
# for the link between a TPU and its host: PCI Express 4 is an assumption, and chips of a host may
# share it.
_PCIE_4, _PCIE_5 = 32e9, 64e9

# docs.cloud.google.com/tpu/docs/v5e, v5p, v6e: bfloat16 peak, HBM, and "bidirectional inter-chip
# interconnect (ICI) bandwidth (per chip)". A link in one direction is that by the ports and by 2:
# v5e 400 GB/s over 4 ports, v5p 1200 over 6 (3D torus), v6e 800 over 4. (Older pages say one
# direction, all ports: v5e 1600 Gbit/s, v5p 4800, the same; v6e 3584, which is 12 % more.)
# Clock: the peak by the FLOPs that the matrix units do in a cycle. v5e has 4 of 128 x 128 (x 2
# FLOPs), v5p 2 cores of 4 each. On v6e the compiler counts up to 369,000 FLOPs a cycle for a large
# matmul, which fits the equivalent of 4 units of 256 x 256 at 1.75 GHz.
# Data-centre network, in one direction: v5e and v6e 6.4 and 25.6 Tbit/s a Pod of 256 chips (and 2 x
# 100 and 4 x 200 Gbit/s a host of 8, the same); v5p 50 Gbit/s a chip (its page, and tpu7x's, which
# also says v6e's 100). None is published for v4.
_MXU_128, _MXU_256 = 2 * 128 * 128, 2 * 256 * 256
V5E = Device(
    name="TPU v5e",
    kind="TPU v5 lite",
    memory=16 * _GIB,
    peak_flops=197e12,
    clock=197e12 / (4 * _MXU_128),
    link=400e9 / 4 / 2,
    host_link=_PCIE_4,
    dcn=6.4e12 / 256 / 8,
)
V5P = Device(
    name="TPU v5p",
    kind="TPU v5",
    memory=95 * _GIB,
    peak_flops=459e12,
    clock=459e12 / (8 * _MXU_128),
    link=1200e9 / 6 / 2,
    host_link=_PCIE_4,
    dcn=50e9 / 8,
)
V6E = Device(
    name="TPU v6e",
    kind="TPU v6 lite",
    memory=32 * _GIB,
    peak_flops=918e12,
    clock=918e12 / (4 * _MXU_256),
    link=800e9 / 4 / 2,
    host_link=_PCIE_4,
    dcn=25.6e12 / 256 / 8,
)
# docs.cloud.google.com/tpu/docs/v4: peak and HBM; the link is that of Jouppi et al., "TPU v4: An
# Optically Reconfigurable Supercomputer" (ISCA 2023), table 4: 6 links of 50 GB/s. 2 cores of 4
# matrix units, as a v5p's; JAX has one device for both.
V4 = Device(
    name="TPU v4",
    kind="TPU v4",
    memory=32 * _GIB,
    peak_flops=275e12,
    clock=275e12 / (8 * _MXU_128),
    link=50e9,
    host_link=_PCIE_4,
)


def _gpu(
    *,
    name: str,
    kind: str,
    gigabytes: int,
    tera_flops: float,
    nvlink: float,
    host_link: float = _PCIE_5,
) -> Device:
    """Holds the figures of a GPU's datasheet: NVLink's are bytes a second in both directions.

    A switch joins the GPUs of a host.
    """
    return Device(
        name=name,
        kind=kind,
        memory=gigabytes * 10**9,
        peak_flops=tera_flops * 1e12,
        clock=None,
        link=nvlink / 2,
        host_link=host_link,
        is_switched=True,
    )


# NVIDIA's Tensor Core GPU datasheets, SXM: dense bfloat16, half of the figure with sparsity (1979
# for H100 and H200). For B200 the DGX's datasheet, divided by its 8 GPUs: 1,440 GB, and 4.5 PFLOPs
# with sparsity.
A100 = _gpu(
    name="A100 SXM 80GB",
    kind="NVIDIA A100-SXM4-80GB",
    gigabytes=80,
    tera_flops=312,
    nvlink=600e9,
    host_link=_PCIE_4,
)
H100 = _gpu(
    name="H100 SXM", kind="NVIDIA H100 80GB HBM3", gigabytes=80, tera_flops=989, nvlink=900e9
)
H200 = _gpu(name="H200 SXM", kind="NVIDIA H200", gigabytes=141, tera_flops=989, nvlink=900e9)
B200 = _gpu(name="B200", kind="NVIDIA B200", gigabytes=180, tera_flops=2250, nvlink=1800e9)
KNOWN = (V4, V5E, V5P, V6E, A100, H100, H200, B200)


def device_figures(device: Any) -> Device | None:
    """Looks up the published figures of a device: memory, peak and the bandwidth of its links.

    For the share of the peak that a step reaches (MFU), say, or the memory that a step may take:

    >>> figures = device_figures("TPU v5 lite")  # or a device, such as jax.devices()[0]
    >>> figures.name, figures.memory / 2**30, figures.peak_flops / 1e12, figures.link / 1e9
    ('TPU v5e', 16.0, 197.0, 50.0)

    The figures are those of the makers' datasheets; nothing is measured or read off the device.
    Makers add up all links of a device and both directions; `link` is one link in one direction.
    On the TPUs of the table a device of JAX is a chip, with all of its cores.

    Args:
      device: A `jax.Device`, its kind as JAX reports it (`device_kind`: `"NVIDIA H200"`), or its
        usual name (`"H200 SXM"`).

    Returns:
      `memory` in bytes, `peak_flops` in FLOPs a second (two for a multiply-add), `link` in bytes a
      second (of a GPU, all NVLinks together), `host_link` in bytes a second each way (PCI Express;
      for TPUs an assumption), `dcn`, its share of its host's data-centre network in bytes a second
      each way (None for TPU v4 and GPUs), `is_switched`, `clock` in cycles a second; None for
      devices that are not in the table, such as CPUs. The table has TPU v4, v5e, v5p and v6e, and
      NVIDIA's A100 (SXM, 80 GB), H100 (SXM), H200 (SXM) and B200.

    Raises:
      TypeError: If `device` is neither a device nor a string.
    """
    kind = device if isinstance(device, str) else getattr(device, "device_kind", None)
    if not isinstance(kind, str):
        raise TypeError(
            f"device={repr(device)[:80]}: must be a jax.Device, as of jax.devices(), or its kind "
            'as a string, such as "TPU v5 lite"'
        )
    return next((figures for figures in KNOWN if kind in (figures.kind, figures.name)), None)


def find_device(kind: str | None) -> Device | None:
    """Finds the published figures of devices of a kind; None if they are not known here."""
    return next((device for device in KNOWN if device.kind == kind), None)
