"""Schedule and costs -> makespan, idle time, live activations: replays its tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import WEIGHT_GRAD
from dualpipe_jax._simulate.costs import Costs
from dualpipe_jax._simulate.published import published_bubble
from dualpipe_jax._simulate.replay import as_full_backwards, replay, replay_dependencies
from dualpipe_jax._stage_sizes import (
    first_half,
    require_sum,
    spread_evenly,
    stage_sizes,
    stages_of_one_layer,
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
) -> Simulation:
    """Replays the tables of a schedule.

    >>> from dualpipe_jax import schedules
    >>> schedule = schedules.make("zb-h1", num_ranks=2, num_microbatches=3)
    >>> simulation = simulate(schedule, costs=Costs(forward=3))
    >>> simulation.makespan, simulation.dependency_makespan, simulation.published_bubble
    (20.0, 18.0, 3.0)

    Args:
      schedule: The schedule.
      costs: How long actions take; by default 1 each.
      transfer: How long a value travels to a neighbour, whatever the size of a stage.
      num_layers: The layers of the model, of which the first stages get one more if they do not
        divide; by default all stages are equal.
      layers_per_stage: The layers of each stage, in model order, as for `value_and_grad`.
      timetable: As `Schedule.timeline`; or `"fastest"`, whichever is faster at these costs, the
        shortest if they are equally fast or the schedule cannot be aligned.
      full_backward: As for `value_and_grad`: whether a weight grad runs with the input grad that it
        follows, so that the neighbour waits for both. Stages of a number of layers that is not
        given have two halves alike.
      rendezvous: Whether a sender waits for its receiver, as on CPUs and TPUs; not on GPUs.

    Raises:
      ValueError: if the schedule cannot run or be aligned, there is no such timetable, `transfer`
        is negative or not finite, there are fewer layers than stages, or layers_per_stage does not
        fit.
      TypeError: if layers_per_stage is no sequence of integers.
    """
    if timetable == FASTEST:
        options = {
            "costs": costs,
            "transfer": transfer,
            "num_layers": num_layers,
            "layers_per_stage": layers_per_stage,
            "full_backward": full_backward,
            "rendezvous": rendezvous,
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
    tables = compile_program(
        schedule.program,
        timetable=timetable,
        stash_deferred=not costs.recompute,
        full_backward=full_backward,
        whole_stages=frozenset()
        if is_any_size
        else stages_of_one_layer(num_layers, num_stages, sizes),
    ).tables
    layers_of_stage = np.array(sizes or spread_evenly(num_layers, num_stages))
    cost = costs.of_stages(
        num_ranks=num_ranks,
        layers_of_stage=layers_of_stage,
        forward_only=tables.forward_only,
    )
    work = cost[tables.opcode, tables.stage]  # an idle tick has stage -1, and costs 0 there too
    share = layers_of_stage * (num_ranks / num_layers)
    is_deferred = (tables.opcode == WEIGHT_GRAD) & (tables.deferred >= 0)
    recomputed = is_deferred * costs.recompute * share[tables.stage]
    work = work + recomputed
    if full_backward:
        last_layers = (
            np.full(num_stages, 0.5)
            if is_any_size
            else first_half(layers_of_stage) / layers_of_stage
        )
        work = as_full_backwards(
            tables,
            work,
            last_layers=last_layers,
            cost=costs.full_backward_share,
            embed_grad=costs.embed_grad,
        )
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
