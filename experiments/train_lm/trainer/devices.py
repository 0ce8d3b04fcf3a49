"""The devices that a script runs on: accelerators, or fake devices of the CPU; and why these."""

import os
from pathlib import Path

import jax

from ..flags import Refusal

_TPU_FILES = ("accel[0-9]*", "vfio/[0-9]*")


def find_devices(
    count: int | None, *, flag: str, fake: int, num_processes: int = 1
) -> tuple[list[jax.Device], str]:
    """Finds the devices of all processes, before JAX is first used.

    Args:
      count: How many; None for all accelerators.
      flag: The flag that the user may lower to have fewer.
      fake: How many fake ones without an accelerator, if `count` is None.
      num_processes: The processes that share the fake ones out.

    Returns:
      The devices, and a line that says which they are, of how many, and why if there is a cause.

    Raises:
      Refusal: If there are fewer, or if the processes cannot share them evenly.
    """
    _keep_tpu_compiler_quiet()
    fakes = count or fake
    # Read when the CPU's backend starts; the number of accelerators is given.
    jax.config.update("jax_num_cpu_devices", -(-fakes // num_processes))
    found = jax.devices()
    kind = found[0].platform
    if count is not None and count > len(found):
        raise Refusal(
            f"{flag}: more than the devices here ({len(found)} x {kind}); lower it, or set "
            "JAX_PLATFORMS=cpu for fake devices of the CPU"
        )
    devices = found[: count or len(found)]
    if len({device.process_index for device in devices}) < jax.process_count():
        raise Refusal(
            f"{flag}: leaves some of the {jax.process_count()} processes without a device "
            f"({len(found)} x {kind} in all); raise it, or start fewer processes"
        )
    shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    if kind == "cpu":
        return devices, f"{len(devices)} fake ones of the CPU{shared}, as {_why_no_accelerator()}"
    return devices, f"{len(devices)} of {len(found)} x {found[0].device_kind}{shared}"


def _why_no_accelerator() -> str:
    if os.environ.get("JAX_PLATFORMS"):
        return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} says"
    for files, name, extra in (
        (("nvidia[0-9]*",), "an NVIDIA GPU", "cuda13"),
        (_TPU_FILES, "a TPU", "tpu"),
    ):
        if _exist(*files):
            return f"there is {name}, but this JAX cannot use it: pip install 'jax[{extra}]'"
    return "JAX finds no accelerator"


def _exist(*patterns: str) -> bool:
    """Whether this machine has any of the device files."""
    return any(next(Path("/dev").glob(pattern), None) for pattern in patterns)


def _keep_tpu_compiler_quiet() -> None:
    """Has libtpu not look for a TPU where there is none: it complains at length.

    (It may be installed for its compiler alone.)
    """
    if not _exist(*_TPU_FILES):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
