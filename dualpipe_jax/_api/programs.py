"""What a step runs, and how: tables and execution for a number of layers, trained or forward."""

from dataclasses import dataclass
from functools import cached_property

from dualpipe_jax import _scopes
from dualpipe_jax._predict import TRANSFER, Costs, compile_for, decide
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.generators.forward_only import forward_only
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Training:
    """A schedule whose actions are placed by their costs.

    Attributes:
      schedule: The schedule.
      execution: What is given of how it becomes a program.
      costs: How long actions take.
      recomputes: Whether blocks are rematerialised.

    Raises:
      ValueError: if the schedule cannot run, or not be aligned where that is asked for.
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

    def decided(self, layers_of_stage: tuple[int, ...]) -> Execution:
        """Decides what is left open of the execution, but `unroll`."""
        return decide(
            self.schedule,
            self.execution,
            costs=self.costs,
            transfer=TRANSFER * self.costs.forward,
            layers_of_stage=layers_of_stage,
            recomputes=self.recomputes,
        )

    def tables(self, execution: Execution, layers_of_stage: tuple[int, ...]) -> Tables:
        """Compiles the schedule, as `simulate` does with these costs."""
        tables, _ = compile_for(
            self.schedule,
            execution,
            costs=self.costs,
            transfer=TRANSFER * self.costs.forward,
            layers_of_stage=layers_of_stage,
        )
        return tables

    def name_of(self, execution: Execution, layers_of_stage: tuple[int, ...]) -> str:
        """Names costs, stages and execution for who reads the compiled program."""
        return _scopes.of_placement(
            tuple(vars(self.costs).values()), layers_of_stage, tuple(vars(execution).values())
        )


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Forwards alone, from both ends.

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

    def decided(self, layers_of_stage: tuple[int, ...]) -> Execution:
        """Gives that of a program without backwards."""
        del layers_of_stage
        return Execution(overlap=False, split_backward=True, deferred="store")

    @cached_property
    def _tables(self) -> Tables:
        sizes = {"num_ranks": self.num_ranks, "num_microbatches": self.num_microbatches}
        return compile_program(forward_only(**sizes)).tables

    def tables(self, execution: Execution, layers_of_stage: tuple[int, ...]) -> Tables:
        """Gives the tables, the same for all."""
        del execution, layers_of_stage
        return self._tables

    def name_of(self, execution: Execution, layers_of_stage: tuple[int, ...]) -> str:
        """Names nothing."""
        del execution, layers_of_stage
        return ""
