"""Programs of a step: a schedule with backwards, or forwards alone, compiled for given stages.

In: the layers of each stage. Out: `StepTables`, tables and the execution for which they are made.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from dualpipe_jax._predict import TRANSFER, Costs, compile_for, decide
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.execution import Execution
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
    costs: Costs | None


class StepProgram(Protocol):
    """Compiles to tables, once the layers of each stage are known."""

    @property
    def num_stages(self) -> int:
        """The stages of a direction."""
        ...

    def compiled(self, layers_of_stage: tuple[int, ...]) -> StepTables:
        """Compiles for stages of so many layers, `num_stages` numbers."""
        ...


@dataclass(frozen=True, kw_only=True)
class Training:
    """Compiles a schedule, with its actions placed in ticks by their costs.

    Attributes:
      schedule: The schedule.
      execution: The user's choices; the open ones are decided by simulation.
      costs: The costs of actions.
      recomputes: Whether blocks are rematerialised.

    Raises:
      ValueError: If the schedule cannot run, or cannot be aligned although execution asks for it.
    """

    schedule: Schedule
    execution: Execution
    costs: Costs
    recomputes: bool

    def __post_init__(self) -> None:
        overlap = self.execution.overlap
        self.schedule.compiled(overlap=False if overlap is None else overlap)  # or raises

    @property
    def num_stages(self) -> int:
        """The stages of the schedule."""
        return self.schedule.num_stages

    def compiled(self, layers_of_stage: tuple[int, ...]) -> StepTables:
        """Decides the execution and compiles the schedule, as `simulate` does with these costs."""
        transfer = TRANSFER * self.costs.forward
        execution = decide(
            self.schedule,
            self.execution,
            costs=self.costs,
            transfer=transfer,
            layers_of_stage=layers_of_stage,
            recomputes=self.recomputes,
        )
        tables, _ = compile_for(
            self.schedule,
            execution,
            costs=self.costs,
            transfer=transfer,
            layers_of_stage=layers_of_stage,
        )
        return StepTables(tables=tables, execution=execution, costs=self.costs)


@dataclass(frozen=True, kw_only=True)
class ForwardOnly:
    """Compiles forwards alone, from both ends.

    Attributes:
      num_ranks: The ranks, each with one stage of each direction.
      num_microbatches: The microbatches, over both directions.
    """

    num_ranks: int
    num_microbatches: int

    @property
    def num_stages(self) -> int:
        """The stages of a direction."""
        return self.num_ranks

    def compiled(self, layers_of_stage: tuple[int, ...]) -> StepTables:
        """Compiles the forwards; the layers of stages make no difference."""
        del layers_of_stage
        return self._compiled

    @cached_property
    def _compiled(self) -> StepTables:
        sizes = {"num_ranks": self.num_ranks, "num_microbatches": self.num_microbatches}
        return StepTables(
            tables=compile_program(forward_only(**sizes)).tables,
            execution=Execution(overlap=False, split_backward=True, deferred="store"),
            costs=None,
        )
