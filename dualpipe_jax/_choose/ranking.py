"""Schedules, costs and bytes -> choices: those that fit by step time, then those that do not."""

from collections.abc import Iterable
from dataclasses import dataclass

from dualpipe_jax._choose.memory import (
    LayerBytes,
    ParameterBytes,
    Term,
    format_bytes,
    memory_of,
)
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._simulate import Costs, Simulation, durations_of, simulate
from dualpipe_jax._stage_sizes import spread_evenly, stages_of_one_layer
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One schedule in one timetable.

    Attributes:
      simulation: What its replay took.
      full_backward: As for `value_and_grad`: whether a weight grad runs with the input grad that it
        follows, layer by layer.
      terms: The memory of the fullest rank.
      limit: The memory that there is; in bytes, as all.
      headroom: The share of it that is left to the compiler's own temporaries.
    """

    simulation: Simulation
    full_backward: bool
    terms: tuple[Term, ...]
    limit: float
    headroom: float = 0.0

    @property
    def num_bytes(self) -> float:
        """The sum of all terms."""
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
        """Shares of `num_ranks * makespan` that do not go into the work itself.

        `recomputed`: for deferred weight grads. `uneven`: ranks have less work than the busiest.
        `bubble`: that one waits for what it needs. `false_waits`: and for what it does not need
        yet, or never. All but the first are idle time.
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
        """Says in one line what it loses, or why it does not fit."""
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


def choices_of(
    schedule: Schedule,
    *,
    num_layers: int,
    costs: Costs,
    transfer: float,
    layer: LayerBytes,
    parameters: ParameterBytes,
    limit: float,
    headroom: float = 0.0,
    stash_deferred: bool = True,
) -> list[Choice]:
    """Predicts time and memory of a schedule, in both timetables if they differ.

    Of one with full backwards and without, the slower is left out unless it takes less memory.

    Args:
      schedule: The schedule.
      num_layers: The layers of the model.
      costs: How long actions take.
      transfer: How long a value travels to a neighbour.
      layer: What a layer keeps of a microbatch.
      parameters: The parameters.
      limit: The memory of a rank, in bytes.
      headroom: The share of it that is left to the compiler's own temporaries.
      stash_deferred: As in `value_and_grad`: whether a deferred weight grad keeps all it needs.

    Raises:
      ValueError: as `simulate`.
    """
    whole_stages = stages_of_one_layer(num_layers, schedule.num_stages, None)

    def choice(timetable: str, full_backward: bool) -> Choice:
        simulation = simulate(
            schedule,
            costs=costs,
            transfer=transfer,
            num_layers=num_layers,
            timetable=timetable,
            full_backward=full_backward,
        )
        tables = compile_program(
            schedule.program,
            timetable=timetable,
            stash_deferred=stash_deferred and not full_backward,
            full_backward=full_backward,
            whole_stages=whole_stages,
            durations=durations_of(
                schedule,
                costs,
                transfer=transfer,
                layers_of_stage=spread_evenly(num_layers, schedule.num_stages),
                full_backward=full_backward,
            ),
        ).tables
        return Choice(
            simulation=simulation,
            full_backward=full_backward,
            terms=memory_of(
                tables,
                num_layers=num_layers,
                layer=layer,
                parameters=parameters,
                full_backward=full_backward,
                stash_deferred=stash_deferred,
            ),
            limit=limit,
            headroom=headroom,
        )

    choices = []
    for timetable in ("shortest", "aligned"):
        if timetable != "shortest" and not _has_run(schedule):
            continue
        made = [choice(timetable, is_full) for is_full in (False, True)]
        first, *others = sorted(made, key=_time_and_memory)
        choices += [first, *(c for c in others if c.num_bytes < first.num_bytes)]
    return choices


def _has_run(schedule: Schedule) -> bool:
    """Whether the aligned timetable differs from the shortest one: has a run of beats."""
    if not (schedule.program.units.pair >= 0).any():
        return False
    return compile_program(schedule.program, timetable="aligned").tables.steady is not None


def in_order(choices: Iterable[Choice]) -> list[Choice]:
    """Sorts choices: those that fit, the fastest first; then tight ones, then others, likewise.

    Of two that are equally fast, the one with less memory comes first.
    """
    return sorted(choices, key=_place)


def _place(choice: Choice) -> tuple[bool, bool, float, float]:
    return not choice.fits, not choice.is_tight, *_time_and_memory(choice)


def _time_and_memory(choice: Choice) -> tuple[float, float]:
    # Sums in different orders differ in their last bits.
    return float(f"{choice.simulation.makespan:.9g}"), choice.num_bytes
