"""Published figures of some devices: memory, peak, clock, and links.

The bandwidth of a link is that of one direction: a device can send so much over it while it
receives as much. Google publishes the sum over a chip's links and both directions.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Device:
    """Holds the published figures of a device.

    Attributes:
      name: Its name.
      kind: Its name in JAX, `jax.Device.device_kind`.
      memory: Its memory, in bytes.
      peak_flops: Dense bfloat16 FLOPs a second.
      clock: Cycles a second, the unit of the compiler's estimates; None without such estimates.
      link: Bytes a second over one link, in one direction.
      is_switched: Whether a switch connects all devices, each with all of `link`, instead of a grid
        that connects neighbours.
    """

    name: str
    kind: str
    memory: int
    peak_flops: float
    clock: float | None
    link: float
    is_switched: bool = False

    def __post_init__(self) -> None:
        assert min(self.memory, self.peak_flops, self.link) > 0, self


_GIB = 2**30

# docs.cloud.google.com/tpu/docs/v5e, v5p, v6e: bfloat16 peak, HBM, and "bidirectional inter-chip
# interconnect (ICI) bandwidth (per chip)". A link in one direction is that by the ports and by 2:
# v5e 400 GB/s over 4 ports, v5p 1200 over 6 (3D torus), v6e 800 over 4. (Older pages say one
# direction, all ports: v5e 1600 Gbit/s, v5p 4800, the same; v6e 3584, which is 12 % more.)
# Clock: the peak by the FLOPs that the matrix units do in a cycle. v5e has 4 of 128 x 128 (x 2
# FLOPs), v5p 2 cores of 4 each. On v6e the compiler counts up to 369,000 FLOPs a cycle for a large
# matmul, which fits the equivalent of 4 units of 256 x 256 at 1.75 GHz.
_MXU_128, _MXU_256 = 2 * 128 * 128, 2 * 256 * 256
V5E = Device(
    name="TPU v5e",
    kind="TPU v5 lite",
    memory=16 * _GIB,
    peak_flops=197e12,
    clock=197e12 / (4 * _MXU_128),
    link=400e9 / 4 / 2,
)
V5P = Device(
    name="TPU v5p",
    kind="TPU v5",
    memory=95 * _GIB,
    peak_flops=459e12,
    clock=459e12 / (8 * _MXU_128),
    link=1200e9 / 6 / 2,
)
V6E = Device(
    name="TPU v6e",
    kind="TPU v6 lite",
    memory=32 * _GIB,
    peak_flops=918e12,
    clock=918e12 / (4 * _MXU_256),
    link=800e9 / 4 / 2,
)
# NVIDIA H100 Tensor Core GPU datasheet, SXM: 80 GB, 989 TFLOPs dense bfloat16 (1979 with sparsity),
# NVLink 900 GB/s, which is both directions: 450 GB/s each. A host's GPUs share a switch.
H100 = Device(
    name="H100 SXM",
    kind="NVIDIA H100 80GB HBM3",
    memory=80 * 10**9,
    peak_flops=989e12,
    clock=None,
    link=900e9 / 2,
    is_switched=True,
)


def find_device(kind: str | None) -> Device | None:
    """Finds the published figures of devices of a kind; None if they are not known here."""
    return next((device for device in (V5E, V5P, V6E, H100) if device.kind == kind), None)
