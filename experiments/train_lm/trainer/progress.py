"""What one looks at while a run trains: a bar with loss, speed, model FLOP/s and memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

import dualpipe_jax as dpj


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The figures of a step's speed.

    Attributes:
      tokens: Tokens of a step, over all devices.
      devices: The devices.
      flops: FLOPs of the model for a step, forward and backward, without those done twice.
      peak: Published FLOP/s of a device; None if it is not known.
    """

    tokens: int
    devices: Sequence[jax.Device]
    flops: float
    peak: float | None

    def describe(self, seconds: float) -> str:
        """Writes tokens a second, in all and a device, the step's time, and MFU if it is known."""
        speed = self.tokens / seconds
        text = f"{speed:,.0f} tokens/s"
        if len(self.devices) > 1:
            text += f" ({speed / len(self.devices):,.0f} a device)"
        text += f", {1000 * seconds:,.0f} ms"
        if (share := self.mfu(seconds)) is not None:
            text += f", MFU {100 * share:.1f} %"
        return text

    def mfu(self, seconds: float) -> float | None:
        """Gives the share of the devices' peak that the model's FLOPs take; None if unknown."""
        if self.peak is None:
            return None
        return self.flops / seconds / (self.peak * len(self.devices))


def memory_in_use(devices: Sequence[jax.Device]) -> str:
    """Writes the bytes in use on this process's fullest device, at most; "" if it does not say."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in mine]
    known = [peak for peak in peaks if peak is not None]
    return f"{max(known) / 2**30:.2f} GiB" if known else ""


def bar(console: Console) -> Progress:
    """Makes the bar; its task needs the fields `loss`, `speed` and `memory`."""
    return Progress(
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[memory]}"),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=2,
        disable=console.quiet,
    )


def fields(**known: Any) -> dict[str, Any]:
    """Gives the bar's fields, empty but those that are known."""
    return {"loss": "-", "speed": "", "memory": "", **known}


def peak_of(device: jax.Device) -> float | None:
    """Gives the published bfloat16 FLOP/s of a device; None if they are not known."""
    figures = dpj.device_figures(device)
    return None if figures is None else figures.peak_flops
