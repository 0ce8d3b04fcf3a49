"""One part in a process of its own: measures it, and appends each figure to a file as it is known.

In: a Task as JSON, the only argument. Out: a line of JSON for each figure; for the part `machine`,
a single line that describes the devices.
"""

import json
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import dualpipe_jax as dpj
from experiments.hardware import commands, layer, one_rank, schedules
from experiments.hardware.tasks import Task
from experiments.train_lm.trainer.devices import find_devices

_PARTS = {
    "step": one_rank.measure,
    "tick": one_rank.measure_tick,
    "layer": layer.measure,
    "commands": commands.measure,
    "schedules": schedules.measure,
}
_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "dualpipe-jax")
_DRIVER = Path("/proc/driver/nvidia/version")


def main() -> None:
    """Runs the worker."""
    task = Task.from_dict(json.loads(sys.argv[1]))
    # So that the last line of an error is its message.
    jax.config.update("jax_traceback_filtering", "off")
    devices, line = find_devices(task.devices or None, flag="--devices", fake=2)
    with Path(task.output).open("a") as output:
        if task.part == "machine":
            output.write(f"{json.dumps(describe(devices, line))}\n")
            return
        for figure in _PARTS[task.part](task):
            output.write(f"{json.dumps(figure.to_dict())}\n")
            output.flush()


def describe(devices: list[jax.Device], line: str) -> dict[str, Any]:
    """Describes the devices, their software and their published figures."""
    figures = dpj.device_figures(devices[0])
    stats = devices[0].memory_stats() or {}
    installed = {each.name: each.version for each in metadata.distributions()}
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "line": line,
        "memory_bytes": stats.get("bytes_limit"),
        "peak_flops": None if figures is None else figures.peak_flops,
        "versions": {
            "python": platform.python_version(),
            **{name: installed[name] for name in _PACKAGES if name in installed},
            "runtime": devices[0].client.platform_version.replace("\n", " "),
        },
        "driver": _DRIVER.read_text().splitlines()[0] if _DRIVER.exists() else None,
    }


if __name__ == "__main__":
    main()
