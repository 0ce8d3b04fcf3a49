"""The figures of the runs: the columns of their log, and the picture of losses and loads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.train_lm.log import perplexity
from experiments.train_lm.pictures import frame

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


COLUMNS: dict[str, Callable[[Row], Any]] = {
    "bias_rate": lambda row: row.rate,
    "step": lambda row: row.step,
    "main_loss": lambda row: row.main,
    "mtp_loss": lambda row: row.mtp,
    "held_out_loss": lambda row: row.held_out,
    "held_out_perplexity": lambda row: None if row.held_out is None else perplexity(row.held_out),
    "worst_load": lambda row: row.worst_load,
    "dropped": lambda row: row.dropped,
    "seconds": lambda row: row.seconds,
}


def summary(rows: Sequence[Row], rate: float, *, last: int = 50) -> str:
    """Tells how a run ended: its last held-out loss, and means over the last steps."""
    of_rate = [row for row in rows if row.rate == rate]
    rows = [row for row in of_rate if row.main is not None]
    held_out = [row.held_out for row in of_rate if row.held_out is not None][-1]
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
        f"{perplexity(held_out):.2f}); last {len(late)} steps: loss {main:.3f}, of the "
        f"byte after {mtp:.3f}, the fullest expert has {worst:.2f} x the mean load; {dropped:,} of "
        f"{choices:,} choices dropped"
    )


def plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws the losses of all runs, and for each the loads of the last layer's experts."""
    rates = list(dict.fromkeys(row.rate for row in rows))
    figure = Figure(figsize=(9.5, 2.2 + 2.2 * len(rates)), dpi=90, layout="constrained")
    grid = figure.add_gridspec(len(rates), 2)
    losses = figure.add_subplot(grid[:, 0])
    for rate, style in zip(rates, ["-", "--", ":", "-."] * len(rates), strict=False):
        of_rate = [row for row in rows if row.rate == rate]
        trained = [row for row in of_rate if row.main is not None]
        steps = [row.step for row in trained]
        lines = ("main", _MAIN, "next byte"), ("mtp", _MTP, "byte after it")
        for name, color, line in lines if trained else ():
            values = _smooth(np.array([getattr(row, name) for row in trained]))
            label = f"{line}, bias rate {rate:g}"
            losses.plot(steps, values, color=color, linewidth=1.2, linestyle=style, label=label)
        held_out = [(r.step, r.held_out) for r in of_rate if r.held_out is not None]
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
        loaded = [row for row in rows if row.rate == rate and row.load is not None]
        if loaded:
            shares = _smooth(np.stack([row.shares[-1] for row in loaded]))  # [steps, experts]
            axes.plot([row.step for row in loaded], shares, linewidth=1.0)
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
    frame(axes)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Takes means over the last few steps."""
    return np.stack([values[max(0, i + 1 - _WINDOW) : i + 1].mean(0) for i in range(len(values))])
