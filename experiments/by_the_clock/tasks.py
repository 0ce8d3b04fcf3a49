"""Schedules and ranks -> the programs to run and how long their actions sleep -> predictions.

The driver gives a Task to its workers and gets a Measured for each program and costs. No JAX.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dualpipe_jax as dpj

MICROBATCHES_A_RANK = 4
# Schedules with two stages a rank get one layer a stage, the others two.
LAYERS_A_RANK = 2
CSV = ".csv"
ACTIONS = ("forward", "input_grad", "weight_grad")
# Seconds of a rank's whole share of the layers. A transformer's attention, two matmuls of
# activations, has no weight grad and twice the input grad: so I is longer than F, and W shorter.
# Under rematerialisation I runs most of the forward again.
COSTS = {
    "with remat": dpj.Costs(forward=0.05, input_grad=0.104, weight_grad=0.042),
    "without remat": dpj.Costs(forward=0.05, input_grad=0.058, weight_grad=0.042),
}
# The costs of a program's first steps, which compile it and tell how long it takes by itself.
NO_SLEEPS = "no sleeps"
# A step of 4P microbatches has twice the work of one over half the ranks: from here on, half each.
_MANY_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Program:
    """A schedule, with the steady phase that overlaps its pairs or without.

    The schedule is a name, or the path of a CSV.
    """

    schedule: str
    overlap: bool

    def __str__(self) -> str:
        """Names it."""
        name = self.schedule.removesuffix(CSV).rpartition("/")[2]
        return f"{name} (overlap)" if self.overlap else name


@dataclass(frozen=True, kw_only=True)
class Task:
    """All that the workers of one number of ranks run, in this order.

    Attributes:
      num_ranks: Processes, each with one device.
      programs: Each is compiled for each costs, by which its actions are placed. The first step of
        a program does not sleep; with the first costs another such step is measured.
      sleeps: For each costs the seconds that F, I and W of one layer sleep.
      repeats: Measured steps with each costs.
    """

    num_ranks: int
    programs: tuple[Program, ...]
    sleeps: dict[str, dict[str, float]]
    repeats: int

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Task":
        """Reads the fields that `to_dict` gives, from JSON."""
        return cls(
            num_ranks=fields["num_ranks"],
            programs=tuple(Program(**program) for program in fields["programs"]),
            sleeps=fields["sleeps"],
            repeats=fields["repeats"],
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The seconds of each measured step of a program with some costs."""

    schedule: str
    overlap: bool
    costs: str
    seconds: list[float]


def to_dict(record: Task | Measured) -> dict[str, Any]:
    """Writes a record for JSON."""
    return dataclasses.asdict(record)


def make_task(schedules: Sequence[str], *, num_ranks: int, scale: float, repeats: int) -> Task:
    """Makes the task of a number of ranks: its programs, and the sleeps of each costs."""
    return Task(
        num_ranks=num_ranks,
        programs=tuple(
            Program(schedule=name, overlap=overlap)
            for name in schedules
            for overlap in _overlaps(name, num_ranks=num_ranks)
        ),
        sleeps={
            name: {
                action: getattr(scaled_costs(name, num_ranks=num_ranks, scale=scale), action)
                / LAYERS_A_RANK
                for action in ACTIONS
            }
            for name in COSTS
        },
        repeats=repeats,
    )


def scaled_costs(name: str, *, num_ranks: int, scale: float) -> dpj.Costs:
    """Gives the seconds of a rank's whole share of the layers, as they are slept."""
    if num_ranks >= _MANY_RANKS:
        scale /= 2
    return dpj.Costs(**{action: scale * getattr(COSTS[name], action) for action in ACTIONS})


def predict(program: Program, costs: dpj.Costs, *, num_ranks: int) -> dpj.Simulation:
    """Replays the program, placed by these costs; a neighbour's value arrives at once.

    Returns:
      The faster replay of two: with split backwards, and with full ones.
    """
    replays = [
        dpj.simulate(
            make_schedule(program.schedule, num_ranks=num_ranks),
            costs=costs,
            transfer=0.0,
            num_layers=LAYERS_A_RANK * num_ranks,
            execution=dpj.Execution(overlap=program.overlap, split_backward=is_split),
            placed_by=costs,
        )
        for is_split in (True, False)
    ]
    return min(replays, key=lambda replay: replay.makespan)


def _overlaps(name: str, *, num_ranks: int) -> tuple[bool, ...]:
    """Lists those that differ: without a steady phase nothing overlaps."""
    has_beats = len(make_schedule(name, num_ranks=num_ranks).timeline(overlap=True).beats) > 0
    return (False, True) if has_beats else (False,)


def make_schedule(name: str, *, num_ranks: int) -> dpj.Schedule:
    """Makes the schedule of a name, or reads the one whose path the name is.

    Raises:
      ValueError: If a file has no schedule of these sizes.
    """
    num_microbatches = MICROBATCHES_A_RANK * num_ranks
    if not name.endswith(CSV):
        return dpj.schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    path = Path(name)
    schedule = dpj.Schedule.from_csv(path.read_text(), path.stem)
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
        raise ValueError(
            f"--csv {name}: has {schedule.num_ranks} ranks and {schedule.num_microbatches} "
            f"microbatches, must have {num_ranks} and {num_microbatches}"
        )
    return schedule
