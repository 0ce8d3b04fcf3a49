"""Seconds of steps and their predictions -> rows -> a CSV and tables."""

import dataclasses
from collections.abc import Iterator, Sequence

from rich.table import Table

from experiments import tables
from experiments.by_the_clock.tasks import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The seconds a step of one program with some costs.

    Attributes:
      ranks: The processes of the pipeline.
      costs: A name of `tasks.COSTS`.
      schedule: Its name.
      overlap: Whether its pairs overlap in a steady phase.
      full_backward: Whether its backwards are full ones.
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
        """The program that was measured."""
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


# The table's columns; a terminal shows those that are not in _LONG.
COLUMNS: dict[str, tables.Cell] = {
    "schedule": lambda row: row.schedule,
    "overlap": lambda row: tables.yes_or_no(row.overlap),
    "backward": lambda row: "full" if row.full_backward else "split",
    "P": lambda row: row.ranks,
    "costs": lambda row: row.costs,
    "clock, s": lambda row: f"{row.clock:.3f}",
    "predicted, s": lambda row: f"{row.predicted:.3f}",
    "ideal, s": lambda row: f"{row.ideal:.3f}",
    "clock / predicted": lambda row: f"{row.over_predicted:.3f}",
    "clock / ideal": lambda row: f"{row.over_ideal:.3f}",
    "clock / work": lambda row: f"{row.over_work:.3f}",
}
_WORDS = ("schedule", "overlap", "backward", "costs")
_LONG = ("backward", "P", "costs", "ideal, s")


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
    """Says in a line how long steps take over their work, for rows of one size and costs."""
    listed = ", ".join(f"{row.program} {row.over_work:.2f}" for row in faster(rows))
    return f"{rows[0].ranks} ranks, {rows[0].costs}: clock / work: {listed}"


def to_markdown(rows: Sequence[Row]) -> str:
    """Makes the table of the README."""
    return tables.markdown(COLUMNS, rows, words=_WORDS)


def to_terminal(rows: Sequence[Row]) -> Table:
    """Makes the table of a terminal, of rows with the same ranks and costs."""
    short = {title: cell for title, cell in COLUMNS.items() if title not in _LONG}
    title = f"{rows[0].ranks} ranks, {rows[0].costs}"
    return tables.terminal(short, rows, words=_WORDS, title=title)
