"""Schedules, costs and bytes -> choices, in order: those that fit by step time, then the others."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from dualpipe_jax._costs import Costs, StageLayers, format_bytes, require_cost
from dualpipe_jax._predict.balance import balance
from dualpipe_jax._predict.decide import has_pairs, has_steady_state, replay_decided
from dualpipe_jax._predict.memory import MemoryTerm
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

# The share of the memory that is left to the compiler: the terms are within 5 % of the peak that a
# TPU's compiler finds (experiments/compiled); fragmentation, and the optimizer's own temporaries,
# are in neither.
HEADROOM = 0.1


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


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Holds one schedule in one execution, with its predicted time and memory.

    Attributes:
      made: The schedule.
      layers_per_stage: As for `value_and_grad`.
      simulation: The replay of its step.
      remat: As for `value_and_grad`.
      terms: The memory of the fullest rank.
      limit: The memory of a device; in bytes, as all sizes.
      headroom: The share of it that is left to the compiler's own temporaries.
      costs: The costs by which actions are to be placed.
      is_one_of_several: Whether choices differ in their number of microbatches.
    """

    made: Schedule
    layers_per_stage: tuple[int, ...] | None
    simulation: Simulation
    remat: Any
    terms: tuple[MemoryTerm, ...]
    limit: float
    headroom: float
    costs: Costs
    is_one_of_several: bool = False

    @property
    def schedule(self) -> str:
        """Gives the schedule's name."""
        return self.simulation.schedule

    @property
    def execution(self) -> Execution:
        """Gives how its order becomes a program, all decided but `unroll`."""
        return self.simulation.execution

    @property
    def arguments(self) -> dict[str, Any]:
        """Gives the arguments of `value_and_grad` in which choices differ, as this one has them."""
        number = self.simulation.num_microbatches
        found = {
            "num_microbatches": number if self.is_one_of_several else None,
            "schedule": self.schedule if self.made.is_named else self.made,
            "layers_per_stage": self.layers_per_stage,
            "remat": self.remat,
            "execution": self.execution,
            "costs": self.costs,
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def num_bytes(self) -> float:
        """Sums up all terms."""
        return sum(term.num_bytes for term in self.terms)

    @property
    def fits(self) -> bool:
        """Whether the memory is enough, with the headroom."""
        return self.num_bytes <= self.limit * (1 - self.headroom)

    @property
    def is_tight(self) -> bool:
        """Whether the memory is enough for the terms, but not with the headroom."""
        return not self.fits and self.num_bytes <= self.limit

    @property
    def losses(self) -> dict[str, float]:
        """Divides up the share of `num_ranks * makespan` that does not go into the work itself.

        `recomputed`: for deferred weight grads. `uneven`: ranks have less work than the busiest.
        `bubble`: the busiest waits for values that it needs. `false_waits`: it waits for values
        that it does not need yet, or never. All but the first are idle time.
        """
        made = self.simulation
        mean, most = sum(made.work) / made.num_ranks, max(made.work)
        parts = {
            "recomputed": made.recomputed,
            "uneven": most - mean,
            "bubble": made.dependency_makespan - most,
            "false_waits": made.makespan - made.dependency_makespan,
        }
        # Sums in different orders differ in their last bits.
        return {name: max(0.0, part) / made.makespan for name, part in parts.items()}

    @property
    def why(self) -> str:
        """Writes in one line where its time goes beside the work, or why it does not fit."""
        if self.is_tight:
            left = format_bytes(self.limit - self.num_bytes)
            return (
                f"tight: leaves {left} of {format_bytes(self.limit)} to the compiler's own "
                f"temporaries, less than {self.headroom:.0%}"
            )
        if not self.fits:
            most = max(self.terms, key=lambda term: term.num_bytes)
            excess, size = format_bytes(self.num_bytes - self.limit), format_bytes(most.num_bytes)
            return f"{excess} too large: most of it is {most.name}, {size} ({most.why})"
        return ", ".join(
            f"{share:.1%} {name.replace('_', ' ')}"
            for name, share in self.losses.items()
            if share >= 0.0005
        )


class TermsOf(Protocol):
    """Gives the memory of the fullest rank."""

    def __call__(
        self, tables: Tables, execution: Execution, *, sizes: tuple[int, ...]
    ) -> tuple[MemoryTerm, ...]:
        """Lists its terms, for stages of these sizes."""
        ...


def choices_of(
    candidate: Candidate,
    *,
    terms_of: TermsOf,
    limit: float,
    headroom: float = 0.0,
) -> list[Choice]:
    """Predicts time and memory of a schedule, with a steady phase and without, if it can have one.

    With full backwards and without, the slower is left out unless it takes less memory. Where
    layers are balanced, the largest stage becomes smaller until some choice fits.

    Args:
      candidate: The schedule, the layers and their costs.
      terms_of: Gives the memory of the fullest rank.
      limit: The memory of a device, in bytes.
      headroom: The share of it that is left to the compiler's own temporaries.

    Raises:
      ValueError: as `simulate`.
    """
    choices: list[Choice] = []
    for layers in candidate.splits():
        choices = _choices_of_split(
            candidate, layers, terms_of=terms_of, limit=limit, headroom=headroom
        )
        if any(choice.fits for choice in choices):
            break
    return choices


def _choices_of_split(
    candidate: Candidate,
    layers: StageLayers,
    *,
    terms_of: TermsOf,
    limit: float,
    headroom: float,
) -> list[Choice]:
    """Predicts time and memory of a schedule for one split of the layers over its stages."""
    schedule = candidate.schedule
    even = spread_evenly(candidate.num_layers, schedule.num_stages)
    overlaps = (False, True) if has_pairs(schedule) and has_steady_state(schedule) else (False,)
    deferred = "recompute" if candidate.recomputes else "store"
    choices = []
    for overlap in overlaps:
        found = []
        for is_split in (True, False):
            execution = Execution(overlap=overlap, split_backward=is_split, deferred=deferred)
            simulation = candidate.simulate(layers, execution)
            execution = simulation.execution
            tables = candidate.tables(layers, execution)
            choice = Choice(
                made=schedule,
                layers_per_stage=None if layers.sizes == even else layers.sizes,
                simulation=simulation,
                remat=candidate.remat,
                terms=terms_of(tables, execution, sizes=layers.sizes),
                limit=limit,
                headroom=headroom,
                costs=candidate.costs,
            )
            found.append(choice)
        first, *others = sorted(found, key=_time_and_memory)
        choices += [first, *(c for c in others if c.num_bytes < first.num_bytes)]
    return choices


def rank(
    cases: Iterable[tuple[str, Callable[[], list[Choice]]]], *, is_one_of_several: bool
) -> tuple[list[Choice], dict[str, ValueError]]:
    """Collects the choices of all schedules that can run, in order, and why the others cannot.

    Args:
      cases: The name of each schedule, and a function that predicts its choices or raises.
      is_one_of_several: Whether choices differ in their number of microbatches.

    Raises:
      ValueError: if none can run: that of the first.
    """
    choices: list[Choice] = []
    errors: dict[str, ValueError] = {}
    for name, predict in cases:
        try:
            choices += predict()
        except ValueError as error:
            errors[name] = error
    if not choices:
        raise next(iter(errors.values()))
    choices = [replace(choice, is_one_of_several=is_one_of_several) for choice in choices]
    return in_order(choices), errors


def in_order(choices: Iterable[Choice]) -> list[Choice]:
    """Sorts choices: those that fit, the fastest first; then tight ones, then others, likewise.

    The one with less memory comes first where two are equally fast.
    """
    return sorted(choices, key=_place)


def _place(choice: Choice) -> tuple[bool, bool, float, float]:
    return not choice.fits, not choice.is_tight, *_time_and_memory(choice)


def _time_and_memory(choice: Choice) -> tuple[float, float]:
    # Sums in different orders differ in their last bits.
    return float(f"{choice.simulation.makespan:.9g}"), choice.num_bytes
