"""The figures of a run, a row a step: a CSV that grows as it runs, JSON lines, TensorBoard.

A run that resumes goes on with the same files: rows of steps that are taken again leave them first.
"""

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..pictures import frame

# A figure by its column; None where none was taken.
Row = dict[str, Any]
KINDS = ("jsonl", "tensorboard")
CSV, JSON_LINES, TENSORBOARD = "log.csv", "log.jsonl", "tensorboard"


class Log:
    """Writes each row as it is made, so that a run that is killed leaves its own.

    Attributes:
      rows: All rows of the run, those of earlier starts with it.
    """

    def __init__(
        self, folder: Path, columns: Sequence[str], *, step: int = -1, kinds: Sequence[str] = ()
    ):
        """Opens the files, and keeps the rows up to a step.

        Args:
          folder: The folder of the run.
          columns: The columns; the first one is `step`.
          step: The last step whose row stays; -1 for a new run.
          kinds: Among `KINDS`, what is written beside the CSV.

        Raises:
          OSError: If a file cannot be written.
        """
        self._columns = list(columns)
        self._csv = folder / CSV
        self.rows = [row for row in read_rows(self._csv) if row["step"] <= step]
        rows = [self._columns, *([_cell(row.get(name)) for name in columns] for row in self.rows)]
        _replace(self._csv, lambda file: csv.writer(file).writerows(rows))
        self._files = contextlib.ExitStack()
        self._file = self._files.enter_context(self._csv.open("a", newline=""))
        self._writers: list[Callable[[Row], None]] = []
        if "jsonl" in kinds:
            self._writers.append(_open_json_lines(folder / JSON_LINES, step, self._files))
        if "tensorboard" in kinds:
            self._writers.append(_open_tensorboard(folder / TENSORBOARD, step, self._files))

    def add(self, row: Row) -> None:
        """Appends a row."""
        assert row.keys() <= set(self._columns), row.keys() - set(self._columns)
        self.rows.append(row)
        csv.writer(self._file).writerow([_cell(row.get(name)) for name in self._columns])
        self._file.flush()
        for write in self._writers:
            write(row)

    def close(self) -> None:
        """Closes the files."""
        self._files.close()


class NoLog(Log):
    """The log of a process that writes none."""

    def __init__(self) -> None:
        self.rows = []
        self._files = contextlib.ExitStack()

    def add(self, row: Row) -> None:
        """Keeps the row."""
        self.rows.append(row)


def read_rows(path: Path) -> list[Row]:
    """Reads a CSV of `Log`; a last line that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.DictReader(whole.splitlines()))
    return [{name: _value(text) for name, text in line.items()} for line in lines]


def _open_json_lines(path: Path, step: int, files: contextlib.ExitStack) -> Callable[[Row], None]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    _replace(path, lambda file: file.writelines(kept))
    file = files.enter_context(path.open("a"))

    def write(row: Row) -> None:
        file.write(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
        file.flush()

    return write


def _open_tensorboard(path: Path, step: int, files: contextlib.ExitStack) -> Callable[[Row], None]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(path), purge_step=step + 1 if step >= 0 else None)
    files.callback(writer.close)

    def write(row: Row) -> None:
        for name, value in row.items():
            if name != "step" and value is not None:
                writer.add_scalar(name, value, row["step"])

    return write


def _replace(path: Path, write: Callable[[Any], Any]) -> None:
    """Writes a file under another name first, so that it is never half a file."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", newline="") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draws the losses over the steps."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    train, held_out = (points(rows, name) for name in ("train_loss", "held_out_loss"))
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


def points(rows: Sequence[Mapping[str, Any]], column: str) -> list[tuple[int, float]]:
    """Lists the steps that have a figure, and the figure."""
    return [(row["step"], row[column]) for row in rows if row.get(column) is not None]


def perplexity(loss: float) -> float:
    """Makes the perplexity a byte of a loss in nats a byte."""
    return math.exp(min(loss, 700.0))  # beyond, it is more than a float holds


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def _value(text: str) -> Any:
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        return float(text)
