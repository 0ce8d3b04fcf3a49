"""Schedules, costs and bytes -> choices, in order: those that fit by step time, then the others."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Protocol

from dualpipe_jax._costs import Costs, StageLayers, format_bytes
from dualpipe_jax._predict.candidate import Candidate
from dualpipe_jax._predict.decide import has_pairs, has_steady_state
from dualpipe_jax._predict.memory import MemoryTerm
from dualpipe_jax._predict.simulation import Simulation
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import spread_evenly
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule

# The share of the memory that is left to the compiler: the terms are within 5 % of the peak that a
# TPU's compiler finds (experiments/compiled); fragmentation, and the optimizer's own temporaries,
# are in neither.
HEADROOM = 0.1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Holds one schedule in one execution, with its predicted time and memory.

    Attributes:
      made: The schedule.
      layers_per_stage: As for `value_and_grad`.
      simulation: The replay of its step.
      remat: As for `value_and_grad`.
      terms: The memory of the fullest rank, on its device.
      host_bytes: The bytes of its activations in the host's memory.
      limit: The memory of a device; in bytes, as all sizes.
      headroom: The share of it that is left to the compiler's own temporaries.
      costs: The costs by which actions are to be placed.
      host_memory: The host's memory for a device; 0 if the caller gave none, and there is no limit.
      without_host: The same with all slots on the device, where this one has slots on the host.
      is_one_of_several: Whether choices differ in their number of microbatches.
    """

    made: Schedule
    layers_per_stage: tuple[int, ...] | None
    simulation: Simulation
    remat: Any
    terms: tuple[MemoryTerm, ...]
    host_bytes: float
    limit: float
    headroom: float
    costs: Costs
    host_memory: float = 0.0
    without_host: "Choice | None" = None
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
        """Whether both memories are enough, the device's with the headroom."""
        return self.fits_device and self.fits_host

    @property
    def fits_device(self) -> bool:
        """Whether the device's memory is enough, with the headroom."""
        return self.num_bytes <= self.limit * (1 - self.headroom)

    @property
    def fits_host(self) -> bool:
        """Whether the host's memory is enough, where a limit is given."""
        return not self.host_memory or self.host_bytes <= self.host_memory

    @property
    def is_tight(self) -> bool:
        """Whether the device's memory is enough for the terms, but not with the headroom."""
        return not self.fits_device and self.num_bytes <= self.limit and self.fits_host

    @property
    def losses(self) -> dict[str, float]:
        """Divides up the share of `num_ranks * makespan` that does not go into the work itself.

        `recomputed`: for deferred weight grads. `uneven`: ranks have less work than the busiest.
        `bubble`: the busiest waits for values that it needs. `false_waits`: it waits for values
        that it does not need yet, or never. These three are idle time. With slots on the host also
        `copies`: actions wait for those to the host and back.
        """
        made = self.simulation
        mean, most = sum(made.work) / made.num_ranks, max(made.work)
        parts = {
            "recomputed": made.recomputed,
            "uneven": most - mean,
            "bubble": made.dependency_makespan - most,
            "false_waits": made.makespan - made.dependency_makespan,
        }
        if self.without_host is not None:
            parts["copies"] = made.copied
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
        if not self.fits_host:
            size, limit = format_bytes(self.host_bytes), format_bytes(self.host_memory)
            return f"too large for the host: {size} of its {limit}"
        if not self.fits:
            most = max(self.terms, key=lambda term: term.num_bytes)
            excess, size = format_bytes(self.num_bytes - self.limit), format_bytes(most.num_bytes)
            return f"{excess} too large: most of it is {most.name}, {size} ({most.why})"
        losses = ", ".join(
            f"{share:.1%} {name.replace('_', ' ')}"
            for name, share in self.losses.items()
            if share >= 0.0005
        )
        if self.without_host is None:
            return losses
        fewer = format_bytes(self.without_host.num_bytes - self.num_bytes)
        return (
            f"{self.execution.slots_on_device} of {self.simulation.peak_weight_activations} slots "
            f"on the device: {fewer} fewer there, {format_bytes(self.host_bytes)} on the host; "
            f"{losses}"
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
    host_memory: float = 0.0,
) -> list[Choice]:
    """Predicts time and memory of a schedule, with a steady phase and without, if it can have one.

    With full backwards and without, the slower is left out unless it takes less memory. Where
    layers are balanced, the largest stage becomes smaller until some choice fits. With memory of
    the host, those that do not fit are tried with slots there too, whatever the largest stage.

    Args:
      candidate: The schedule, the layers and their costs.
      terms_of: Gives the memory of the fullest rank.
      limit: The memory of a device, in bytes.
      headroom: The share of it that is left to the compiler's own temporaries.
      host_memory: The memory of the host for each device; with 0 no slots wait there.

    Raises:
      ValueError: as `simulate`.
    """
    even = spread_evenly(candidate.num_layers, candidate.schedule.num_stages)

    def predict(layers: StageLayers, execution: Execution) -> Choice:
        simulation = candidate.simulate(layers, execution)
        tables = candidate.tables(layers, simulation.execution)
        terms = terms_of(tables, simulation.execution, sizes=layers.sizes)
        return Choice(
            made=candidate.schedule,
            layers_per_stage=None if layers.sizes == even else layers.sizes,
            simulation=simulation,
            remat=candidate.remat,
            terms=tuple(term for term in terms if term.where == "device"),
            host_bytes=sum(term.num_bytes for term in terms if term.where == "host"),
            limit=limit,
            headroom=headroom,
            costs=candidate.costs,
            host_memory=host_memory,
        )

    choices: list[Choice] = []
    with_host: list[Choice] = []
    for layers in candidate.splits():
        predict_split = partial(predict, layers)
        choices = _choices_of_split(candidate, predict_split)
        if host_memory:
            tried = (_with_host(choice, predict_split) for choice in choices)
            with_host += [choice for choice in tried if choice is not None]
        if any(choice.fits for choice in choices):
            break
    return [*choices, *_fastest(with_host, choices)]


def _choices_of_split(candidate: Candidate, predict: Callable[[Execution], Choice]) -> list[Choice]:
    """Predicts time and memory of a schedule for one split of the layers over its stages."""
    schedule = candidate.schedule
    overlaps = (False, True) if has_pairs(schedule) and has_steady_state(schedule) else (False,)
    deferred = "recompute" if candidate.recomputes else "store"
    choices = []
    for overlap in overlaps:
        found = [
            predict(Execution(overlap=overlap, split_backward=is_split, deferred=deferred))
            for is_split in (True, False)
        ]
        first, *others = sorted(found, key=_time_and_memory)
        choices += [first, *(c for c in others if c.num_bytes < first.num_bytes)]
    return choices


def _with_host(choice: Choice, predict: Callable[[Execution], Choice]) -> Choice | None:
    """Leaves as many slots on the device as fit there; None if all do, or the host has no room."""
    if choice.fits_device:
        return None

    @cache
    def attempt(number: int) -> Choice | None:
        try:
            return predict(replace(choice.execution, slots_on_device=number))
        except ValueError:  # values that may not leave the device take more
            return None

    def is_too_large(number: int) -> bool:
        tried = attempt(number)
        return tried is not None and not tried.fits_device

    numbers = range(1, choice.simulation.peak_weight_activations)
    most = bisect_left(numbers, True, key=is_too_large)
    found = attempt(most) if most else None
    if found is None or not found.fits_host:  # with fewer slots here there are more there
        return None
    host_bytes = found.host_bytes

    def leaves_no_more(number: int) -> bool:
        tried = attempt(number)
        return tried is not None and tried.host_bytes <= host_bytes

    # Values leave whole, in all slots: the fewest that make the same program say how much leaves.
    fewest = attempt(1 + bisect_left(numbers[:most], True, key=leaves_no_more))
    assert fewest is not None
    return replace(fewest if fewest.fits_device else found, without_host=choice)


def _fastest(with_host: Iterable[Choice], choices: Iterable[Choice]) -> list[Choice]:
    """Keeps the fastest in each execution, unless one that fits without the host is as fast."""
    fastest: dict[tuple[Any, ...], Choice] = {}
    for choice in sorted(with_host, key=_time_and_memory):
        fastest.setdefault(_variant(choice), choice)
    for choice in choices:
        other = fastest.get(_variant(choice))
        if choice.fits and other is not None and _time(choice) <= _time(other):
            del fastest[_variant(choice)]
    return list(fastest.values())


def _variant(choice: Choice) -> tuple[Any, ...]:
    """Tells the choices that a schedule has for one split apart."""
    return choice.execution.overlap, choice.execution.split_backward


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
    return _time(choice), choice.num_bytes


def _time(choice: Choice) -> float:
    # Sums in different orders differ in their last bits.
    return float(f"{choice.simulation.makespan:.9g}")
