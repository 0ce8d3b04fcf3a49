"""Seconds of steps and their predictions -> rows -> a CSV and tables."""

import csv
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from experiments import cells
from experiments.by_the_clock.tasks import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The seconds a step of one program with some costs.

    Attributes:
      ranks: The processes of the pipeline.
      costs: A name of `tasks.COSTS`.
      schedule: Its name.
      overlap: Whether its pairs overlap in a run of beats.
      full_backward: Whether its input grads and weight grads run as one.
      clock: Measured, the median.
      predicted: By the replay, waiting as the program waits.
      ideal: By the replay, each rank waiting for nothing but the values that it reads.
      work: That a rank sleeps.
      without_sleeps: Measured, with no sleep: callbacks, transfers and all else of the program.
    """

    ranks: int
    costs: str
    schedule: str
    overlap: bool
    full_backward: bool
    clock: float
    predicted: float
    ideal: float
    work: float
    without_sleeps: float

    @property
    def program(self) -> Program:
        """What was measured."""
        return Program(schedule=self.schedule, overlap=self.overlap)

    @property
    def over_predicted(self) -> float:
        """The clock's seconds over the predicted ones."""
        return self.clock / self.predicted

    @property
    def over_ideal(self) -> float:
        """The clock's seconds over the ideal ones."""
        return self.clock / self.ideal

    @property
    def over_work(self) -> float:
        """The clock's seconds over those of the work."""
        return self.clock / self.work


# The table's columns, and the side to which they are set; a terminal shows those in _SHORT.
COLUMNS: dict[str, tuple[Callable[[Row], str], str]] = {
    "schedule": (lambda row: row.schedule, "left"),
    "overlap": (lambda row: cells.yes_or_no(row.overlap), "left"),
    "backward": (lambda row: "full" if row.full_backward else "split", "left"),
    "P": (lambda row: str(row.ranks), "right"),
    "costs": (lambda row: row.costs, "left"),
    "clock, s": (lambda row: f"{row.clock:.3f}", "right"),
    "predicted, s": (lambda row: f"{row.predicted:.3f}", "right"),
    "ideal, s": (lambda row: f"{row.ideal:.3f}", "right"),
    "clock / predicted": (lambda row: f"{row.over_predicted:.3f}", "right"),
    "clock / ideal": (lambda row: f"{row.over_ideal:.3f}", "right"),
    "clock / work": (lambda row: f"{row.over_work:.3f}", "right"),
}
_SHORT = (
    "schedule",
    "overlap",
    "clock, s",
    "predicted, s",
    "clock / predicted",
    "clock / ideal",
    "clock / work",
)


def groups(rows: Sequence[Row]) -> Iterator[tuple[int, str, list[Row]]]:
    """Gives the rows by number of ranks and costs."""
    for ranks, costs in dict.fromkeys((row.ranks, row.costs) for row in rows):
        yield ranks, costs, [row for row in rows if (row.ranks, row.costs) == (ranks, costs)]


def faster(rows: Sequence[Row]) -> list[Row]:
    """Keeps for each schedule, number of ranks and costs the program that the clock prefers."""
    best: dict[tuple[int, str, str], Row] = {}
    for row in rows:
        key = row.ranks, row.costs, row.schedule
        if key not in best or row.clock < best[key].clock:
            best[key] = row
    return list(best.values())


def describe_faster(rows: Sequence[Row]) -> str:
    """Says in a line what steps take over their work, of rows with the same ranks and costs."""
    listed = ", ".join(f"{row.program} {row.over_work:.2f}" for row in faster(rows))
    return f"{rows[0].ranks} ranks, {rows[0].costs}: clock / work: {listed}"


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes a line a row; seconds to the tenth of a millisecond."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Row))
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow(cells.write(value, form=".4f") for value in values)


def read_csv(path: Path) -> list[Row]:
    """Reads a file of `write_csv`."""
    kinds: dict[str, Any] = {"ranks": int, "costs": str, "schedule": str}
    kinds |= {"overlap": cells.is_yes, "full_backward": cells.is_yes}
    with path.open(newline="") as file:
        return [
            Row(**{name: kinds.get(name, float)(value) for name, value in line.items()})
            for line in csv.DictReader(file)
        ]


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Writes the table of the README."""
    rules = ["---" if side == "left" else "---:" for _, side in COLUMNS.values()]
    lines = [COLUMNS, rules, *([cell(row) for cell, _ in COLUMNS.values()] for row in rows)]
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def to_rich(rows: Sequence[Row]) -> Table:
    """Makes the table of a terminal, of rows with the same ranks and costs."""
    table = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=f"{rows[0].ranks} ranks, {rows[0].costs}",
    )
    for title in _SHORT:
        is_name = COLUMNS[title][1] == "left"
        table.add_column(title, justify="left" if is_name else "right", no_wrap=is_name)
    for row in rows:
        table.add_row(*(COLUMNS[title][0](row) for title in _SHORT))
    return table
