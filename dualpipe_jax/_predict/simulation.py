"""Schedule, execution and costs -> makespan, idle time, live activations: replays its tables."""

from dataclasses import dataclass, replace

from dualpipe_jax._costs import TRANSFER, Costs, StageLayers
from dualpipe_jax._predict.published import published_bubble
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.durations import Durations
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.replay import replay, replay_dependencies
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """Tells how long a replayed step takes, how long ranks idle, and how many values they hold.

    Attributes:
      schedule: The schedule's name.
      num_ranks: The ranks.
      num_microbatches: The microbatches of a step.
      execution: How the order becomes a program, all decided but `unroll`, which changes nothing
        here.
      rendezvous: Whether senders were taken to wait for their receivers.
      makespan: From the first action's start to the last one's end, as the program waits.
      dependency_makespan: The same if ranks waited for stored values only: without false waits.
      work: For each rank the time in which it acts.
      recomputed: The part of it in which deferred weight grads recompute, the mean over ranks.
      copied: The part of it in which actions wait for copies to the host's memory and back, which
        take longer than the compute beside them, the mean over ranks.
      idle_share: The share of `num_ranks * makespan` in which ranks do not act.
      bubble: The idle time of a rank, the mean over ranks.
      published_bubble: The idle time by the schedule's paper; None where it gives none.
      peak_activations: The most (stage, microbatch)s of a rank between their F and their I.
      peak_weight_activations: The most between their F and their W, which reads a part of them.
      stage_share: A stage's mean size, as a share of num_layers / num_ranks.
      parameter_copies: Layers whose parameters a rank holds, as a share of num_layers / num_ranks.
      num_transfers: Values that a rank stores from a neighbour, over all ranks.
    """

    schedule: str
    num_ranks: int
    num_microbatches: int
    execution: Execution
    rendezvous: bool
    makespan: float
    dependency_makespan: float
    work: tuple[float, ...]
    recomputed: float
    copied: float
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
    layers: StageLayers | None = None,
    full_backward: bool = False,
    slots_on_device: int | str | None = None,
) -> Durations:
    """Spreads costs over a schedule's stages, as its compiler takes them to place actions.

    Args:
      schedule: The schedule.
      costs: How long actions take.
      transfer: How long a value travels to a neighbour.
      layers: The layers of the stages; None if they are alike, and have two equal halves.
      full_backward: Whether W runs with the I that it follows, where it follows one.
      slots_on_device: As of `Execution`.
    """
    return costs.durations(
        layers or StageLayers.cut((2,) * schedule.num_stages),
        num_ranks=schedule.num_ranks,
        transfer=transfer,
        full_backward=full_backward,
        forward_only=schedule.program.forward_only,
        slots_on_device=slots_on_device,
    )


def compile_for(
    schedule: Schedule,
    execution: Execution,
    *,
    costs: Costs,
    transfer: float,
    layers: StageLayers | None,
    placed_by: Costs | None = None,
) -> tuple[Compiled, Durations]:
    """Compiles a schedule as for a step with these costs; gives that and the durations of actions.

    Args:
      schedule: The schedule.
      execution: How it becomes a program, all decided but `unroll`.
      costs: As `simulate`.
      transfer: As `simulate`.
      layers: As `durations_of`.
      placed_by: As `simulate`.
    """

    def spread(costs: Costs, transfer: float) -> Durations:
        if execution.deferred == "store":
            costs = replace(costs, recompute=0.0)
        return durations_of(
            schedule,
            costs,
            transfer=transfer,
            layers=layers,
            full_backward=not execution.split_backward,
            slots_on_device=execution.slots_on_device,
        )

    sizes = () if layers is None else layers.sizes
    durations = placed = spread(costs, transfer)
    if placed_by is not None:
        placed = spread(placed_by, TRANSFER * placed_by.forward)
    compiled = compile_program(
        schedule.program,
        timetable=execution.timetable,
        # Where no other weight grad stashes, deferred ones keep their operands in separate slots.
        stash_deferred=execution.deferred == "store" and bool(execution.split_backward),
        full_backward=not execution.split_backward,
        whole_stages=frozenset(s for s, size in enumerate(sizes) if size <= 1),
        durations=placed,
    )
    return compiled, durations


def replay_schedule(
    schedule: Schedule,
    execution: Execution,
    *,
    costs: Costs,
    transfer: float,
    layers: StageLayers | None,
    rendezvous: bool,
    placed_by: Costs | None,
) -> Simulation:
    """Replays a schedule whose execution is decided.

    The arguments are those of `compile_for` and `simulate`.
    """
    num_ranks, num_stages = schedule.num_ranks, schedule.num_stages
    made, durations = compile_for(
        schedule,
        execution,
        costs=costs,
        transfer=transfer,
        layers=layers,
        placed_by=placed_by,
    )
    tables, timeline = made.tables, made.timeline
    work, recomputed = durations.work(tables), durations.recomputed(tables)
    makespan = float(replay(tables, work, transfer=transfer, rendezvous=rendezvous).max())
    # Where nobody idles, sums in different orders differ in their last bit.
    bubble = max(0.0, makespan - float(work.sum()) / num_ranks)
    has_more = costs.embed or costs.head or recomputed.any() or tables.forward_only
    is_even = layers is None or layers.are_alike
    return Simulation(
        schedule=schedule.name,
        num_ranks=num_ranks,
        num_microbatches=schedule.num_microbatches,
        execution=execution,
        rendezvous=rendezvous,
        makespan=makespan,
        dependency_makespan=float(replay_dependencies(timeline, work, transfer=transfer).max()),
        work=tuple(work.sum(axis=0).tolist()),
        recomputed=float(recomputed.sum()) / num_ranks,
        copied=float(durations.copied(tables).sum()) / num_ranks,
        idle_share=bubble / makespan,
        bubble=bubble,
        published_bubble=published_bubble(schedule, costs) if is_even and not has_more else None,
        peak_activations=tables.num_slots["residual"],
        peak_weight_activations=tables.num_slots["weight_residual"],
        stage_share=num_ranks / num_stages,
        parameter_copies=tables.num_chunks * num_ranks / num_stages,
        num_transfers=int((tables.from_left >= 0).sum() + (tables.from_right >= 0).sum()),
    )
