"""Contenders that ran -> rows of figures -> a CSV, a table in Markdown, a picture."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from experiments import tables
from experiments.compare.measuring import SEQUENTIAL, Contender
from experiments.train_lm import pictures

# Light to dark over the numbers of ranks.
_COLORS = ("#8cc4ef", "#3d86c6", "#12508f", "#0a2c52")
_MARKERS = ("o", "s", "D", "^")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one contender; None where one has no meaning.

    Seconds a step and their ratios to those of the model without a pipeline are medians over the
    rounds; a ratio is of two steps of the same round. Bytes are those of one device. The loss
    difference is the largest of any step, relative to the model without a pipeline.
    """

    ranks: int
    schedule: str
    layers_per_stage: float
    ticks: int | None = None
    idle_share: float | None = None
    received_slots: int | None = None
    residual_slots: int | None = None
    weight_residual_slots: int | None = None
    stash_slots: int | None = None
    temporary_bytes: int
    argument_bytes: int
    compile_seconds: float
    wall_seconds: float
    cpu_seconds: float
    wall_ratio: float
    cpu_ratio: float
    loss_difference: float

    @property
    def slots(self) -> tuple[int | None, ...]:
        """Those of each buffer."""
        kept = self.residual_slots, self.weight_residual_slots
        return self.received_slots, *kept, self.stash_slots


def summarize(contenders: Sequence[Contender], *, num_layers: int) -> list[Row]:
    """Makes the rows of those that ran in turns; one of them has no pipeline."""
    (plain,) = (contender for contender in contenders if contender.name == SEQUENTIAL)
    rows = []
    for contender in contenders:
        schedule = contender.schedule
        of_schedule: dict[str, Any] = {}
        if schedule is not None:
            timeline = schedule.timeline()
            of_schedule = {
                "ticks": timeline.num_ticks,
                "idle_share": float((timeline.opcode == 0).mean()),
                **{f"{kind}_slots": number for kind, number in timeline.num_slots.items()},
            }
        difference = np.abs(np.subtract(contender.losses, plain.losses)) / plain.losses
        rows.append(
            Row(
                ranks=contender.num_ranks,
                schedule=contender.name,
                layers_per_stage=num_layers / (schedule.num_stages if schedule else 1),
                **of_schedule,
                temporary_bytes=contender.memory.temp_size_in_bytes,
                argument_bytes=contender.memory.argument_size_in_bytes,
                compile_seconds=contender.compile_seconds,
                wall_seconds=float(np.median(contender.wall_seconds)),
                cpu_seconds=float(np.median(contender.cpu_seconds)),
                wall_ratio=_median_ratio(contender.wall_seconds, plain.wall_seconds),
                cpu_ratio=_median_ratio(contender.cpu_seconds, plain.cpu_seconds),
                loss_difference=float(difference.max()),
            )
        )
    return rows


def write_steps(contenders: Sequence[Contender], path: Path) -> None:
    """Writes a line a step of each: its loss, and its seconds but for the first."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["ranks", "schedule", "step", "loss", "wall_seconds", "cpu_seconds"])
        for contender in contenders:
            seconds = zip(contender.wall_seconds, contender.cpu_seconds, strict=True)
            columns = zip(contender.losses, [("", ""), *seconds], strict=True)
            for step, (loss, (wall, cpu)) in enumerate(columns, start=1):
                writer.writerow([contender.num_ranks, contender.name, step, loss, wall, cpu])


# The table's columns; a terminal shows those that are not in _LONG.
COLUMNS: dict[str, tables.Cell] = {
    "ranks": lambda row: row.ranks,
    "schedule": lambda row: row.schedule,
    "layers a stage": lambda row: f"{row.layers_per_stage:g}",
    "ticks": lambda row: tables.number(row.ticks, "d"),
    "idle": lambda row: tables.number(row.idle_share, ".1%"),
    "slots": lambda row: "-" if row.ticks is None else "/".join(map(str, row.slots)),
    "MiB": lambda row: f"{row.temporary_bytes / 2**20:.1f}",
    "compile": lambda row: f"{row.compile_seconds:.1f} s",
    "wall, s": lambda row: f"{row.wall_seconds:.3f}",
    "CPU, s": lambda row: f"{row.cpu_seconds:.3f}",
    "wall": lambda row: f"{row.wall_ratio:.2f}x",
    "CPU": lambda row: f"{row.cpu_ratio:.2f}x",
    "loss": lambda row: "-" if row.ticks is None else f"{row.loss_difference:.0e}",
}
_WORDS = ("ranks", "schedule")
_LONG = ("ranks", "layers a stage", "wall, s", "CPU, s")


def to_markdown(rows: Sequence[Row]) -> str:
    """Makes the table of the README."""
    return tables.markdown(COLUMNS, rows, words=_WORDS)


def to_terminal(rows: Sequence[Row]) -> Table:
    """Makes the table of a terminal, of those that ran in turns."""
    short = {title: cell for title, cell in COLUMNS.items() if title not in _LONG}
    return tables.terminal(short, rows, words=_WORDS, title=f"{rows[0].ranks} ranks")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a dot for each schedule and number of ranks, a panel a question."""
    piped = [row for row in rows if row.schedule != SEQUENTIAL]
    names = list(dict.fromkeys(row.schedule for row in piped))
    all_ranks = sorted({row.ranks for row in piped})
    figure = Figure(figsize=(11, 0.45 * len(names) + 1.5), dpi=150, layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel, (title, name, scale) in zip(
        panels,
        (
            ("idle ticks, %", "idle_share", 100),
            ("temporaries a device, MiB", "temporary_bytes", 1 / 2**20),
            ("wall time a step,\nwithout a pipeline = 1", "wall_ratio", 1),
            ("CPU time a step,\nwithout a pipeline = 1", "cpu_ratio", 1),
        ),
        strict=True,
    ):
        for index, ranks in enumerate(all_ranks):
            of_ranks = {row.schedule: row for row in piped if row.ranks == ranks}
            panel.scatter(
                [getattr(of_ranks[schedule], name) * scale for schedule in names],
                np.arange(len(names)) + 0.2 * (index - (len(all_ranks) - 1) / 2),
                s=36,
                color=_COLORS[index % len(_COLORS)],
                marker=_MARKERS[index % len(_MARKERS)],
                edgecolor="white",
                linewidth=0.6,
                label=f"{ranks} ranks",
                clip_on=False,
                zorder=3,
            )
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlim(0, max(1.1, panel.get_xlim()[1]))
        pictures.frame(panel, hidden=("top", "right", "left"))
    for panel in panels[2:]:
        panel.axvline(1, color="#bd4400", linewidth=1, zorder=1)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    pictures.legend_below(figure, panels[0])
    figure.savefig(path)


def _median_ratio(seconds: Sequence[float], plain: Sequence[float]) -> float:
    return float(np.median(np.divide(seconds, plain)))
