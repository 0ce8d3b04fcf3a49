"""Programs of a step: a schedule with backwards, or forwards alone, compiled for given stages.

In: the layers of each stage. Out: `StepTables`, tables and the execution for which they are made.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from dualpipe_jax._predict import (
    TRANSFER,
    Costs,
    StageLayers,
    compile_for,
    decide,
    usual_costs,
)
from dualpipe_jax._schedule.compile import compile_program, place_program
from dualpipe_jax._schedule.execution import Execution, timetable_of
from dualpipe_jax._schedule.generators.forward_only import forward_only
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class StepTables:
    """Holds a compiled program.

    Attributes:
      tables: The tables, `[ticks, ranks]`.
      execution: The execution, all of it decided but `unroll`.
      costs: The costs by which actions were placed in ticks; None if none were needed.
    """

    tables: Tables
    execution: Execution
    costs: Costs | None = None


class StepProgram(Protocol):
    """Compiles to tables, once the layers of each stage are known."""

    @property
    def schedule(self) -> Schedule:
        """The schedule, or that of forwards alone."""
        ...

    @property
    def execution(self) -> Execution:
        """The user's choices of an execution."""
        ...

    @property
    def costs(self) -> Costs | None:
        """The user's costs of actions; None if there are none."""
        ...

    def usual_costs(self) -> Costs:
        """Gives the costs of a transformer."""
        ...

    def compiled(self, layers: StageLayers, costs: Costs) -> StepTables:
        """Compiles for stages of these layers, at these costs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """Compiles a schedule, with its actions placed in ticks by their costs.

    Attributes:
      schedule: The schedule.
      execution: The user's choices; the open ones are decided by simulation.
      costs: The costs of actions, where they are given.
      recomputes: Whether blocks are rematerialised.

    Raises:
      ValueError: If the schedule cannot run, or cannot be aligned although execution asks for it.
    """

    schedule: Schedule
    execution: Execution
    costs: Costs | None
    recomputes: bool

    def __post_init__(self) -> None:
        overlap = self.execution.overlap
        timetable = timetable_of(False if overlap is None else overlap)
        place_program(self.schedule.program, timetable=timetable)  # or raises

    def usual_costs(self) -> Costs:
        """Gives the costs of a transformer, with those of recomputing where blocks do."""
        return usual_costs(recomputes=self.recomputes)

    def compiled(self, layers: StageLayers, costs: Costs) -> StepTables:
        """Decides the execution and compiles the schedule, as `simulate` does with these costs."""
        # The costs of kinds are in the layers' weights, and bytes decide nothing here.
        costs = Costs.of(costs.numbers)
        options: dict[str, Any] = {
            "costs": costs,
            "transfer": TRANSFER * costs.forward,
            "layers": layers,
        }
        execution = decide(self.schedule, self.execution, recomputes=self.recomputes, **options)
        made, _ = compile_for(self.schedule, execution, **options)
        return StepTables(tables=made.tables, execution=execution, costs=costs)


@dataclass(frozen=True, kw_only=True)
class ForwardOnly:
    """Compiles forwards alone, from both ends.

    Attributes:
      num_ranks: The ranks, each with one stage of each direction.
      num_microbatches: The microbatches, over both directions.
    """

    num_ranks: int
    num_microbatches: int
    execution = Execution(overlap=False, split_backward=True, deferred="store")
    costs = None

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule."""
        return Schedule(
            forward_only(num_ranks=self.num_ranks, num_microbatches=self.num_microbatches)
        )

    def usual_costs(self) -> Costs:
        """Gives the costs of a transformer."""
        return usual_costs(recomputes=False)

    def compiled(self, layers: StageLayers, costs: Costs) -> StepTables:
        """Compiles the forwards; layers and costs make no difference."""
        del layers, costs
        tables = compile_program(self.schedule.program).tables
        return StepTables(tables=tables, execution=self.execution)
