"""Schedule and costs -> makespan, idle time, live activations: replays its tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.durations import Durations
from dualpipe_jax._schedule.replay import replay, replay_dependencies
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._simulate.costs import TRANSFER, Costs
from dualpipe_jax._simulate.published import published_bubble
from dualpipe_jax._stage_sizes import (
    first_half,
    require_sum,
    spread_evenly,
    stage_sizes,
)
from dualpipe_jax.schedules import Schedule

# Whichever of the timetables has the smaller makespan.
FASTEST = "fastest"


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Tells what a replay of a schedule took.

    Attributes:
      schedule: The schedule's name.
      num_ranks: The ranks.
      num_microbatches: The microbatches of a step.
      timetable: The timetable that was replayed: for `"fastest"` the faster one.
      rendezvous: Whether senders were taken to wait for their receivers.
      makespan: From the first action's start to the last one's end, as the program waits.
      dependency_makespan: The same if ranks waited for stored values only: without false waits.
      work: For each rank the time in which it acts.
      recomputed: Of it, what deferred weight grads recompute, the mean over ranks.
      idle_share: The share of `num_ranks * makespan` in which ranks do not act.
      bubble: The idle time of a rank, the mean over ranks.
      published_bubble: What the schedule's paper says of it; None where it says nothing.
      peak_activations: The most (stage, microbatch)s of a rank between their F and their I.
      peak_weight_activations: The most between their F and their W: what W reads is kept as long.
      stage_share: A stage's mean size, in shares of the layers that a rank has.
      parameter_copies: Parameters that a rank holds, in shares of the layers that a rank has.
      num_transfers: Values that a rank stores from a neighbour, over all ranks.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    timetable: str
    rendezvous: bool
    makespan: float
    dependency_makespan: float
    work: tuple[float, ...]
    recomputed: float
    idle_share: float
    bubble: float
    published_bubble: float | None
    peak_activations: int
    peak_weight_activations: int
    stage_share: float
    parameter_copies: float
    num_transfers: int


def durations_of(
    schedule: Schedule,
    costs: Costs,
    *,
    transfer: float,
    layers_of_stage: Sequence[int] | None = None,
    full_backward: bool = False,
) -> Durations:
    """Spreads costs over a schedule's stages, as its compiler takes them to place actions.

    Args:
      schedule: The schedule.
      costs: How long actions take.
      transfer: How long a value travels to a neighbour.
      layers_of_stage: The layers of each stage; None if they are alike, and have two equal halves.
      full_backward: As `simulate`.
    """
    layers = np.ones(schedule.num_stages, int) if layers_of_stage is None else layers_of_stage
    layers = np.array(layers)
    last_layers = np.full(schedule.num_stages, 0.5)
    if layers_of_stage is not None:
        last_layers = first_half(layers) / layers
    return costs.durations(
        num_ranks=schedule.num_ranks,
        layers_of_stage=layers,
        last_layers=last_layers,
        transfer=transfer,
        full_backward=full_backward,
        forward_only=schedule.program.forward_only,
    )


def compile_for(
    schedule: Schedule,
    *,
    costs: Costs,
    transfer: float,
    layers_of_stage: tuple[int, ...] | None,
    timetable: str,
    full_backward: bool,
    placed_by: Costs | None = None,
) -> tuple[Tables, Durations]:
    """Compiles a schedule as a step with these costs would be, and says how long its actions take.

    Arguments are those of `simulate`, and the layers of each stage as for `durations_of`.
    """

    def spread(costs: Costs, transfer: float) -> Durations:
        return durations_of(
            schedule,
            costs,
            transfer=transfer,
            layers_of_stage=layers_of_stage,
            full_backward=full_backward,
        )

    durations = placed = spread(costs, transfer)
    if placed_by is not None:
        placed = spread(placed_by, TRANSFER * placed_by.forward)
    layers = layers_of_stage or ()
    compiled = compile_program(
        schedule.program,
        timetable=timetable,
        # As a step with them has it.
        stash_deferred=not (placed_by or costs).recompute and not full_backward,
        full_backward=full_backward,
        whole_stages=frozenset(stage for stage, size in enumerate(layers) if size == 1),
        durations=placed,
    )
    return compiled.tables, durations


def _require_types(**arguments: Any) -> None:
    """Requires the types that `simulate` states."""
    costs = (Costs, type(None)), "a dualpipe_jax.Costs, or None"
    wanted: dict[str, tuple[tuple[Any, ...], str]] = {
        "schedule": ((Schedule,), "a dualpipe_jax.Schedule"),
        "costs": costs,
        "transfer": ((SupportsFloat,), "a number"),
        "num_layers": ((int, np.integer, type(None)), "an integer, or None"),
        "full_backward": ((bool,), "True or False"),
        "rendezvous": ((bool,), "True or False"),
        "placed_by": costs,
    }
    for name, value in arguments.items():
        types, must = wanted[name]
        if isinstance(value, types):
            continue
        fix = ""
        if isinstance(value, str) and name == "schedule":
            fix = f": dualpipe_jax.schedules.make({value!r}, num_ranks=, num_microbatches=) is one"
        raise TypeError(f"{name}={repr(value)[:80]}: must be {must}{fix}")


def simulate(
    schedule: Schedule,
    *,
    costs: Costs | None = None,
    transfer: float = 0.0,
    num_layers: int | None = None,
    layers_per_stage: Sequence[int] | None = None,
    timetable: str = FASTEST,
    full_backward: bool = False,
    rendezvous: bool = True,
    placed_by: Costs | None = None,
) -> Simulation:
    """Replays the tables of a schedule.

    >>> from dualpipe_jax import schedules
    >>> schedule = schedules.make("zb-h1", num_ranks=2, num_microbatches=3)
    >>> simulation = simulate(schedule, costs=Costs(forward=3))
    >>> simulation.makespan, simulation.dependency_makespan, simulation.published_bubble
    (18.0, 18.0, 3.0)

    Args:
      schedule: The schedule.
      costs: How long actions take; by default 1 each.
      transfer: How long a value travels to a neighbour, whatever the size of a stage.
      num_layers: The layers of the model, of which the first stages get one more if they do not
        divide; by default all stages are equal.
      layers_per_stage: The layers of each stage, in model order, as for `value_and_grad`.
      timetable: As `Schedule.timeline`; or `"fastest"`, whichever of `"shortest"` and `"aligned"`
        is faster at these costs, the shortest if they are equally fast or the schedule cannot be
        aligned.
      full_backward: As for `value_and_grad`: whether a weight grad runs with the input grad that it
        follows, so that the neighbour waits for both. Stages of a number of layers that is not
        given have two halves alike.
      rendezvous: Whether a sender waits for its receiver, as on CPUs and TPUs; not on GPUs.
      placed_by: The costs by which the step's actions were placed in ticks, if not these: those of
        `value_and_grad(costs=)`, with a transfer of a tenth of the forward as there. (Steps of more
        than 20,000 actions, and in the two-tick timetable, are not placed by any.)

    Raises:
      ValueError: if the schedule cannot run or be aligned, there is no such timetable, `transfer`
        is negative or not finite, there are fewer layers than stages, or layers_per_stage does not
        fit.
      TypeError: if an argument has a wrong type.
    """
    _require_types(
        schedule=schedule,
        costs=costs,
        transfer=transfer,
        num_layers=num_layers,
        full_backward=full_backward,
        rendezvous=rendezvous,
        placed_by=placed_by,
    )
    if timetable == FASTEST:
        options = {
            "costs": costs,
            "transfer": transfer,
            "num_layers": num_layers,
            "layers_per_stage": layers_per_stage,
            "full_backward": full_backward,
            "rendezvous": rendezvous,
            "placed_by": placed_by,
        }
        made = simulate(schedule, timetable="shortest", **options)
        if not (schedule.program.units.pair >= 0).any():
            return made
        try:
            aligned = simulate(schedule, timetable="aligned", **options)
        except ScheduleError:
            return made
        # Equal sums in different orders may differ in their last bits.
        is_equal = math.isclose(aligned.makespan, made.makespan, rel_tol=1e-9)
        return aligned if aligned.makespan < made.makespan and not is_equal else made
    costs = costs or Costs()
    if not 0 <= transfer < math.inf:
        raise ValueError(f"transfer={transfer!r}: a cost must be a finite number, 0 or more")
    num_ranks, num_stages = schedule.num_ranks, schedule.num_stages
    sizes = stage_sizes(
        layers_per_stage,
        num_stages=num_stages,
        where=f" of schedule {schedule.name!r} on {num_ranks} ranks",
    )
    # Stages of which nothing is said are as large as one likes.
    is_any_size = num_layers is None and sizes is None
    if num_layers is None:
        num_layers = num_stages if sizes is None else sum(sizes)
    require_sum(sizes, num_layers)
    if num_layers < num_stages:
        raise ValueError(
            f"num_layers={num_layers}: must be at least the {num_stages} stages of schedule "
            f"{schedule.name!r} on {num_ranks} ranks"
        )
    layers_of_stage = sizes or spread_evenly(num_layers, num_stages)
    tables, durations = compile_for(
        schedule,
        costs=costs,
        transfer=transfer,
        layers_of_stage=None if is_any_size else layers_of_stage,
        timetable=timetable,
        full_backward=full_backward,
        placed_by=placed_by,
    )
    work, recomputed = durations.work(tables), durations.recomputed(tables)
    makespan = float(replay(tables, work, transfer=transfer, rendezvous=rendezvous).max())
    # Where nobody idles, sums in different orders differ in their last bit.
    bubble = max(0.0, makespan - float(work.sum()) / num_ranks)
    has_ends = costs.embed or costs.head or costs.recompute
    is_even = np.ptp(layers_of_stage) == 0 and not has_ends and not tables.forward_only
    return Simulation(
        schedule=schedule.name,
        num_ranks=num_ranks,
        num_microbatches=schedule.num_microbatches,
        timetable=timetable,
        rendezvous=rendezvous,
        makespan=makespan,
        dependency_makespan=float(replay_dependencies(tables, work, transfer=transfer).max()),
        work=tuple(work.sum(axis=0).tolist()),
        recomputed=float(recomputed.sum()) / num_ranks,
        idle_share=bubble / makespan,
        bubble=bubble,
        published_bubble=published_bubble(schedule, costs) if is_even else None,
        peak_activations=tables.num_slots["residual"],
        peak_weight_activations=tables.num_slots["weight_residual"],
        stage_share=num_ranks / num_stages,
        parameter_copies=tables.num_chunks * num_ranks / num_stages,
        num_transfers=int((tables.from_left >= 0).sum() + (tables.from_right >= 0).sum()),
    )
