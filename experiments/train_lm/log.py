"""The figures of a run: a CSV that grows as it runs, and the picture of the losses."""

import csv
import dataclasses
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .pictures import frame


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


COLUMNS = {f.name: operator.attrgetter(f.name) for f in dataclasses.fields(Row)}


class Log:
    """Keeps the rows, and writes each as it is made: a stopped run leaves its own.

    Attributes:
      rows: All until now.
    """

    def __init__(self, path: Path, columns: Mapping[str, Callable[[Any], Any]]):
        self.rows: list[Any] = []
        self._path, self._columns = path, columns
        self._append(list(columns), mode="w")

    def add(self, row: Any) -> None:
        """Appends a row."""
        self.rows.append(row)
        self._append([_cell(of(row)) for of in self._columns.values()], mode="a")

    def _append(self, cells: Sequence[str], *, mode: str) -> None:
        with self._path.open(mode, newline="") as file:
            csv.writer(file).writerow(cells)


def plot(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draws the losses over the steps."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    train = [(row.step, row.train_loss) for row in rows if row.train_loss is not None]
    held_out = [(row.step, row.held_out_loss) for row in rows if row.held_out_loss is not None]
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
    frame(axes)
    if train or held_out:
        axes.legend(frameon=False)
    figure.savefig(path)


def perplexity(loss: float) -> float:
    """Makes the perplexity a byte of a loss in nats a byte."""
    return math.exp(min(loss, 700.0))  # beyond, it is more than a float holds


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
