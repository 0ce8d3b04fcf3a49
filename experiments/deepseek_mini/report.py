"""The figures of runs: the columns that their logs add, and the picture of losses and loads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.train_lm.pictures import frame
from experiments.train_lm.trainer.log import Row, perplexity, points

_WINDOW = 10  # steps of which means are drawn
_MAIN, _MTP, _GRAY = "#0b6bb5", "#bd4400", "#777777"


def columns(num_experts: int) -> tuple[str, ...]:
    """Lists the columns of a log beside those of every run.

    Losses are in nats a byte, for the step's batch before its update: `main_loss` of the next byte
    and `mtp_loss` of the one after it. `worst_load` is the fullest expert's load, the mean over
    layers, and `load_0` to the last those of the last layer's experts, in loads that are even;
    `dropped` counts choices of an expert that found no room, of `choices`.
    """
    loads = (f"load_{index}" for index in range(num_experts))
    return ("main_loss", "mtp_loss", "worst_load", "dropped", "choices", *loads)


def to_row(figures: Mapping[str, Any]) -> Row:
    """Makes the columns of `main`, `mtp`, `dropped`, and of `load`, int[layers, experts]."""
    load = np.asarray(figures["load"])
    shares = load / load.mean(-1, keepdims=True)
    return {
        "main_loss": float(figures["main"]),
        "mtp_loss": float(figures["mtp"]),
        "worst_load": float(shares.max(-1).mean()),
        "dropped": int(figures["dropped"]),
        "choices": int(load.sum()),
        **{f"load_{index}": float(share) for index, share in enumerate(shares[-1])},
    }


def summary(rows: Sequence[Row], *, last: int = 50) -> str:
    """Tells how a run ended: its last held-out loss, and means over the last steps."""
    held_out = points(rows, "held_out_loss")[-1][1]
    trained = [row for row in rows if row.get("main_loss") is not None]
    late = trained[-last:]
    if not late:
        return "no step was taken"
    main, mtp, worst = (
        float(np.mean([row[name] for row in late]))
        for name in ("main_loss", "mtp_loss", "worst_load")
    )
    dropped, choices = (sum(row[name] for row in trained) for name in ("dropped", "choices"))
    return (
        f"held-out loss {held_out:.3f} nats a byte (perplexity {perplexity(held_out):.2f}); last "
        f"{len(late)} steps: loss {main:.3f}, of the byte after {mtp:.3f}, the fullest expert has "
        f"{worst:.2f} x the mean load; {dropped:,} of {choices:,} choices dropped"
    )


def plot(runs: Mapping[str, Sequence[Row]], path: Path, *, title: str) -> None:
    """Draws the losses of runs by their labels, and for each the loads of the last layer."""
    figure = Figure(figsize=(9.5, 2.2 + 2.2 * len(runs)), dpi=90, layout="constrained")
    grid = figure.add_gridspec(len(runs), 2)
    losses = figure.add_subplot(grid[:, 0])
    for (label, rows), style in zip(runs.items(), ["-", "--", ":", "-."] * len(runs), strict=False):
        lines = ("main_loss", _MAIN, "next byte"), ("mtp_loss", _MTP, "byte after it")
        for name, color, line in lines:
            if drawn := points(rows, name):
                steps, values = zip(*drawn, strict=True)
                losses.plot(
                    steps,
                    _smooth(np.array(values)),
                    color=color,
                    linewidth=1.2,
                    linestyle=style,
                    label=f"{line}, {label}",
                )
        if held_out := points(rows, "held_out_loss"):
            marker = "o" if style == "-" else "x"
            losses.plot(
                *zip(*held_out, strict=True),
                marker,
                color="black",
                markersize=4,
                label=f"held out, {held_out[-1][1]:.3f} at the end",
            )
    _finish(losses, f"loss, nats a byte (mean of {_WINDOW} steps)")
    losses.set_title(title, loc="left", fontsize=10)
    losses.legend(frameon=False, fontsize=8)
    first = None  # all have one scale
    for index, (label, rows) in enumerate(runs.items()):
        axes = figure.add_subplot(grid[index, 1], sharey=first)
        first = first or axes
        loaded = [row for row in rows if row.get("load_0") is not None]
        if loaded:
            names = [name for name in loaded[0] if name.startswith("load_")]
            shares = _smooth(np.array([[row[name] for name in names] for row in loaded]))
            axes.plot([row["step"] for row in loaded], shares, linewidth=1.0)
        axes.axhline(1.0, color=_GRAY, linewidth=1.0, linestyle="--")
        axes.set_title(f"loads of the last layer's experts, {label}", loc="left", fontsize=10)
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
