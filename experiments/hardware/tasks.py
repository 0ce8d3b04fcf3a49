"""The messages between the command and its workers: tasks there, figures back."""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model and its batches.

    Attributes:
      family: The block, one of `experiments.compiled.models.FAMILIES`.
      width: The size of the residual stream.
      layers: Layers of a rank.
      tokens: Tokens of a microbatch.
      microbatches: Microbatches of a step, for each rank.
      rounds: Measured steps of each program.
    """

    family: str
    width: int
    layers: int
    tokens: int
    microbatches: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """One part for a process to measure.

    Attributes:
      part: One of `hardware.PARTS`, or `machine`.
      devices: How many.
      sizes: The model and its batches.
      schedule: The schedule of the parts over all devices; "" for the other parts.
      commands: The set of command buffers, one of `programs.COMMANDS`; "" for the default.
      costs: The seconds of F, I and W of a rank's layers, if they were measured before.
      asks_preflight: Whether preflight is asked for a predicted time.
      output: The file to which figures are written.
    """

    part: str
    devices: int
    sizes: Sizes
    schedule: str = ""
    commands: str = ""
    costs: tuple[float, float, float] | None = None
    asks_preflight: bool = True
    output: str

    @property
    def name(self) -> str:
        """The task's name in files and messages."""
        words = (self.part, self.schedule, self.commands.replace(", ", "-"))
        return "-".join(word for word in words if word)

    @classmethod
    def from_dict(cls, task: dict[str, Any]) -> "Task":
        """Undoes `dataclasses.asdict`."""
        attributes: dict[str, Any] = {**task, "sizes": Sizes(**task["sizes"])}
        return cls(**attributes)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A quantity that was measured or looked up: one cell of a table.

    Attributes:
      table: The table, one of those that `report.to_page` writes.
      row: The row's name.
      column: The column's name.
      samples: The values, one for each round, or a single one; none if there is a `note` instead.
      note: Why there is no value, or a value in words.
      is_failure: Whether the note tells of a mistake, and not of a figure that does not exist.
    """

    table: str
    row: str
    column: str
    samples: tuple[float, ...] = ()
    note: str = ""
    is_failure: bool = False

    @property
    def median(self) -> float | None:
        """The median of the samples; None without."""
        return statistics.median(self.samples) if self.samples else None

    def to_dict(self) -> dict[str, Any]:
        """Gives the fields, as JSON takes them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, figure: dict[str, Any]) -> "Figure":
        """Undoes `to_dict`."""
        attributes: dict[str, Any] = {**figure, "samples": tuple(figure["samples"])}
        return cls(**attributes)
