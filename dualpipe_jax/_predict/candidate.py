"""`Candidate`: a schedule for a model, with each split of the layers over its stages."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dualpipe_jax._costs import Costs, StageLayers, require_cost
from dualpipe_jax._predict.balance import balance
from dualpipe_jax._predict.decide import replay_decided
from dualpipe_jax._predict.simulation import Simulation, compile_for
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import (
    BALANCED,
    require_layers,
    require_sum,
    spread_evenly,
)
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Holds a schedule for a model, before its split and its execution are chosen.

    Attributes:
      schedule: The schedule.
      num_layers: The layers of the model.
      layer_weights: The relative cost of every layer, in model order; None if all cost the same.
      layers_per_stage: As for `value_and_grad`.
      remat: As for `value_and_grad`.
      costs: How long actions take, and by which they are placed.
      transfer: How long a value travels to a neighbour.
    """

    schedule: Schedule
    num_layers: int
    layer_weights: tuple[float, ...] | None = None
    layers_per_stage: tuple[int, ...] | Literal["balanced"] | None = None
    remat: Any
    costs: Costs
    transfer: float

    def __post_init__(self) -> None:
        """Requires a layer for each stage, unless their sizes are given, and a cost."""
        require_cost("transfer", self.transfer)
        if isinstance(self.layers_per_stage, tuple):
            require_sum(self.layers_per_stage, self.num_layers)
        else:
            schedule = self.schedule
            where = f" of schedule {schedule.name!r} on {schedule.num_ranks} ranks"
            require_layers(self.num_layers, num_stages=schedule.num_stages, where=where)

    @property
    def recomputes(self) -> bool:
        """Whether blocks are rematerialised."""
        return self.remat != "none"

    def splits(self) -> Iterator[StageLayers]:
        """Yields splits of the layers over stages, each with smaller stages than the one before."""
        even = spread_evenly(self.num_layers, self.schedule.num_stages)
        if self.layers_per_stage != BALANCED:
            yield StageLayers.cut(self.layers_per_stage or even, self.layer_weights)
            return
        most = self.num_layers
        while True:
            sizes = balance(
                self.schedule,
                costs=self.costs,
                transfer=self.transfer,
                num_layers=self.num_layers,
                layer_weights=self.layer_weights,
                most=most,
            )
            yield StageLayers.cut(sizes, self.layer_weights)
            if max(sizes) == max(even):
                return
            most = max(sizes) - 1

    def simulate(self, layers: StageLayers, execution: Execution) -> Simulation:
        """Replays the schedule with this split, in an execution."""
        return replay_decided(
            self.schedule,
            execution,
            recomputes=self.recomputes,
            layers=layers,
            costs=self.costs,
            transfer=self.transfer,
        )

    def tables(self, layers: StageLayers, execution: Execution) -> Tables:
        """Compiles the schedule for this split, in a decided execution."""
        made, _ = compile_for(
            self.schedule, execution, layers=layers, costs=self.costs, transfer=self.transfer
        )
        return made.tables
