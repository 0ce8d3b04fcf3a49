"""The figures of a run, a row a step: a CSV that grows as it runs, JSON lines, TensorBoard.

A run that resumes goes on with the same files: rows of steps that are taken again leave them first.
"""

import contextlib
import csv
import io
import json
import math
import os
import time
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

    The CSV says how far the run is; the JSON lines are made of its rows again at each start. A full
    disk does not end the run: its rows are kept, and written when there is room again.

    Attributes:
      rows: All rows of the run, those of earlier starts with it.
    """

    def __init__(
        self,
        folder: Path,
        columns: Sequence[str],
        *,
        step: int = -1,
        kinds: Sequence[str] = (),
        warn: Callable[[str], None] = print,
    ):
        """Opens the files, and keeps the rows up to a step.

        Args:
          folder: The folder of the run.
          columns: The columns; the first one is `step`.
          step: The last step whose row stays; -1 for a new run.
          kinds: The logs to write beside the CSV, among `KINDS`.
          warn: Shows a line to the user.

        Raises:
          OSError: If a file cannot be written.
        """
        self._columns = list(columns)
        self._warn = warn
        self._has_warned = False
        self.rows = [row for row in read_rows(folder / CSV) if row["step"] <= step]
        head = _to_csv(self._columns)
        self._files: list[Any] = [_Lines(folder / CSV, self.rows, self._to_csv, head=head)]
        if "jsonl" in kinds:
            self._files.append(_Lines(folder / JSON_LINES, self.rows, _to_json))
        if "tensorboard" in kinds:
            self._files.append(_Events(folder / TENSORBOARD, step))

    def add(self, row: Row) -> None:
        """Appends a row."""
        assert row.keys() <= set(self._columns), row.keys() - set(self._columns)
        self.rows.append(row)
        for file in self._files:
            try:
                file.add(row)
            except OSError as error:
                if not self._has_warned:
                    self._warn(f"{file.path}: {error.strerror}; training goes on")
                self._has_warned = True

    def close(self) -> None:
        """Closes the files."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()

    def _to_csv(self, row: Row) -> bytes:
        return _to_csv([_cell(row.get(name)) for name in self._columns])


class NoLog(Log):
    """The log of a process that writes none."""

    def __init__(self) -> None:
        self.rows = []
        self._files = []

    def add(self, row: Row) -> None:
        """Keeps the row."""
        self.rows.append(row)


class _Lines:
    """A file with a line for each row; bytes that do not fit are tried again with the next row."""

    def __init__(
        self, path: Path, rows: Sequence[Row], encode: Callable[[Row], bytes], *, head: bytes = b""
    ):
        """Writes it anew under another name first, so that it is never half a file."""
        self.path = path
        self._encode = encode
        part = path.with_name(f"{path.name}.part")
        with part.open("wb") as file:
            file.write(head)
            file.writelines(map(encode, rows))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        self._file = path.open("ab", buffering=0)
        self._left = b""

    def add(self, row: Row) -> None:
        self._left += self._encode(row)
        while self._left:
            self._left = self._left[self._file.write(self._left) :]

    def close(self) -> None:
        self._file.close()


class _Events:
    """A file of TensorBoard's events.

    tensorboardX's `SummaryWriter` writes in a thread that ends at the first error, and whoever adds
    an event then waits for ever; its `EventsWriter` writes at once.
    """

    def __init__(self, path: Path, step: int):
        """Opens a file beside those of earlier starts, whose later steps TensorBoard then drops."""
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2, summary_pb2

        # Their classes are made as they are imported, which type checkers do not see.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        self._events, self._summaries = events, summaries
        path.mkdir(exist_ok=True)
        self.path = path
        self._writer = event_file_writer.EventsWriter(str(path / "events"), f".{step + 1}")
        session = events.SessionLog(status=events.SessionLog.START)
        self._write(events.Event(step=step + 1, session_log=session))

    def add(self, row: Row) -> None:
        figures = [(name, v) for name, v in row.items() if name != "step" and v is not None]
        values = [self._summaries.Summary.Value(tag=n, simple_value=v) for n, v in figures]
        summary = self._summaries.Summary(value=values)
        self._write(self._events.Event(step=row["step"], summary=summary))

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()


def read_rows(path: Path) -> list[Row]:
    """Reads a CSV of `Log`; a last line that was cut short is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.DictReader(whole.splitlines()))
    return [{name: _value(text) for name, text in line.items()} for line in lines]


def _to_csv(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()


def _to_json(row: Row) -> bytes:
    known = {name: value for name, value in row.items() if value is not None}
    # JSON has no word for numbers that are not finite, which skipped steps have.
    return (
        json.dumps({k: v if math.isfinite(v) else None for k, v in known.items()}) + "\n"
    ).encode()


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
