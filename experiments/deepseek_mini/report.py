"""The figures of the runs: a CSV that grows as they go on, and the picture of losses and loads."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

_COLUMNS = [
    "bias_rate",
    "step",
    "main_loss",
    "mtp_loss",
    "held_out_loss",
    "held_out_perplexity",
    "worst_load",
    "dropped",
    "seconds",
]
_WINDOW = 10  # steps of which means are drawn
_MAIN, _MTP, _GRAY = "#0b6bb5", "#bd4400", "#777777"


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures after a step; None where a figure was not taken.

    Losses are in nats a byte: `main` of the next byte and `mtp` of the one after it, for the step's
    batch before its update; `held_out` of the next byte, for fixed windows, after it. `load` is
    int[expert layers, experts], `dropped` the choices of an expert that found no room.
    """

    rate: float
    step: int
    main: float | None = None
    mtp: float | None = None
    held_out: float | None = None
    load: np.ndarray | None = None
    dropped: int | None = None
    seconds: float

    @property
    def shares(self) -> np.ndarray:
        """The loads of each layer, in loads that were even."""
        assert self.load is not None
        return self.load / self.load.mean(-1, keepdims=True)

    @property
    def worst_load(self) -> float | None:
        """The fullest expert's load, in loads that were even; the mean over layers."""
        return None if self.load is None else float(self.shares.max(-1).mean())


class Log:
    """Keeps the rows, and writes each as it comes: a stopped run leaves its own."""

    def __init__(self, path: Path):
        self._path = path
        self.rows: list[Row] = []
        self._append(_COLUMNS, mode="w")

    def add(self, row: Row) -> None:
        """Appends a row."""
        self.rows.append(row)
        perplexity = None if row.held_out is None else math.exp(min(row.held_out, 700.0))
        self._append(
            [
                row.rate,
                row.step,
                row.main,
                row.mtp,
                row.held_out,
                perplexity,
                row.worst_load,
                row.dropped,
                row.seconds,
            ]
        )

    def of_rate(self, rate: float) -> list[Row]:
        """Lists the rows of one run."""
        return [row for row in self.rows if row.rate == rate]

    def _append(self, values: list[Any], mode: str = "a") -> None:
        with self._path.open(mode, newline="") as file:
            csv.writer(file).writerow(_cell(value) for value in values)


def summary(log: Log, rate: float, *, last: int = 50) -> str:
    """Tells how a run ended: its last held-out loss, and means over the last steps."""
    rows = [row for row in log.of_rate(rate) if row.main is not None]
    held_out = [row.held_out for row in log.of_rate(rate) if row.held_out is not None][-1]
    late = rows[-last:]
    if not late:
        return f"bias rate {rate:g}: no step was taken"
    main, mtp, worst = (
        float(np.mean([getattr(row, name) for row in late]))
        for name in ("main", "mtp", "worst_load")
    )
    dropped = sum(row.dropped or 0 for row in rows)
    choices = sum(int(row.load.sum()) for row in rows if row.load is not None)
    return (
        f"bias rate {rate:g}: held-out loss {held_out:.3f} nats a byte (perplexity "
        f"{math.exp(min(held_out, 700.0)):.2f}); last {len(late)} steps: loss {main:.3f}, of the "
        f"byte after {mtp:.3f}, the fullest expert has {worst:.2f} x the mean load; {dropped:,} of "
        f"{choices:,} choices dropped"
    )


def plot(log: Log, path: Path, *, title: str) -> None:
    """Draws the losses of all runs, and for each the loads of the last layer's experts."""
    rates = list(dict.fromkeys(row.rate for row in log.rows))
    figure = Figure(figsize=(9.5, 2.2 + 2.2 * len(rates)), dpi=90, layout="constrained")
    grid = figure.add_gridspec(len(rates), 2)
    losses = figure.add_subplot(grid[:, 0])
    for rate, style in zip(rates, ["-", "--", ":", "-."] * len(rates), strict=False):
        rows = [row for row in log.of_rate(rate) if row.main is not None]
        steps = [row.step for row in rows]
        lines = ("main", _MAIN, "next byte"), ("mtp", _MTP, "byte after it")
        for name, color, what in lines if rows else ():
            values = _smooth(np.array([getattr(row, name) for row in rows]))
            label = f"{what}, bias rate {rate:g}"
            losses.plot(steps, values, color=color, linewidth=1.2, linestyle=style, label=label)
        held_out = [(r.step, r.held_out) for r in log.of_rate(rate) if r.held_out is not None]
        marker = "o" if style == "-" else "x"
        label = f"held out, {held_out[-1][1]:.3f} at the end"
        losses.plot(*zip(*held_out, strict=True), marker, color="black", markersize=4, label=label)
    _finish(losses, f"loss, nats a byte (mean of {_WINDOW} steps)")
    losses.set_title(title, loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    first = None  # all have one scale
    for place, rate in enumerate(rates):
        axes = figure.add_subplot(grid[place, 1], sharey=first)
        first = first or axes
        rows = [row for row in log.of_rate(rate) if row.load is not None]
        if rows:
            shares = _smooth(np.stack([row.shares[-1] for row in rows]))  # [steps, experts]
            axes.plot([row.step for row in rows], shares, linewidth=1.0)
        axes.axhline(1.0, color=_GRAY, linewidth=1.0, linestyle="--")
        axes.set_title(
            f"loads of the last layer's experts, bias rate {rate:g}", loc="left", fontsize=10
        )
        _finish(axes, f"x mean load (mean of {_WINDOW} steps)")
    if first is not None:
        first.set_ylim(bottom=0)
    figure.savefig(path)


def _finish(axes: Any, label: str) -> None:
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Takes means over the last few steps."""
    return np.stack([values[max(0, i + 1 - _WINDOW) : i + 1].mean(0) for i in range(len(values))])


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
