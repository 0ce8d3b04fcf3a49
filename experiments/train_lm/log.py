"""The figures of a run: a CSV that grows as it runs, and the picture of the losses."""

import csv
import dataclasses
import math
from pathlib import Path

from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The figures after a step; None where a figure was not taken.

    Losses are in nats a byte. The train loss is that of the step's batch before its update, the
    held-out loss that of fixed windows after it; the perplexity, e to the power of it, is among how
    many bytes, all equally likely, it would be as hard to tell the next one. The seconds count from
    the first step on.
    """

    step: int
    train_loss: float | None = None
    held_out_loss: float | None = None
    held_out_perplexity: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    seconds: float


class Log:
    """Keeps the rows for the picture, and writes each as it comes: a stopped run leaves its own."""

    def __init__(self, path: Path):
        self._path = path
        self._rows: list[Row] = []
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(field.name for field in dataclasses.fields(Row))

    def add(self, row: Row) -> None:
        """Appends a row."""
        self._rows.append(row)
        with self._path.open("a", newline="") as file:
            csv.writer(file).writerow(_cell(value) for value in dataclasses.astuple(row))

    @property
    def last_held_out_loss(self) -> float:
        """The held-out loss that was taken last; nan before the first."""
        losses = [row.held_out_loss for row in self._rows if row.held_out_loss is not None]
        return losses[-1] if losses else math.nan

    def plot(self, path: Path, *, title: str) -> None:
        """Draws the losses over the steps."""
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        train = [(row.step, row.train_loss) for row in self._rows if row.train_loss is not None]
        held_out = [
            (row.step, row.held_out_loss) for row in self._rows if row.held_out_loss is not None
        ]
        if train:
            axes.plot(*zip(*train, strict=True), color="#8cc4ef", linewidth=1, label="train")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True),
                color="#bd4400",
                linewidth=1.8,
                marker="o",
                markersize=4,
                label=f"held out, {held_out[-1][1]:.3f} at the end",
            )
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a byte")
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if train or held_out:
            axes.legend(frameon=False)
        figure.savefig(path)


def perplexity(loss: float) -> float:
    """Makes the perplexity a byte of a loss in nats a byte."""
    return math.exp(min(loss, 700.0))  # beyond, it is more than a float holds


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
