"""Schedule and costs -> the `Execution` that is predicted to be the fastest, where it is left open.

Steps, simulations and choices all decide it here, on every platform.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

from dualpipe_jax._costs import Costs, StageLayers, of_transformer
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._predict.simulation import Simulation, replay_schedule
from dualpipe_jax._schedule.compile import place_program
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax.schedules import Schedule

# The attention's share of a transformer's forward, where the context is as long as the model is
# wide: 2 of 12 + 2.
_ATTENTION = 1 / 7


def usual_costs(*, recomputes: bool) -> Costs:
    """Gives the costs of a transformer, for a model without given costs.

    Args:
      recomputes: Whether an input grad, and a deferred weight grad, runs the blocks forward again.
    """
    return of_transformer(attention=_ATTENTION, recomputes=recomputes)


@lru_cache(maxsize=256)
def decide(
    schedule: Schedule,
    execution: Execution,
    *,
    costs: Costs,
    transfer: float,
    layers: StageLayers | None,
    recomputes: bool,
    rendezvous: bool = True,
    placed_by: Costs | None = None,
) -> Execution:
    """Decides all that an execution leaves open, but for `unroll`, which takes the same time here.

    The aligned timetable may have more ticks, but its steady phase hides the transfers; so it pays
    from some number of microbatches on. Full backwards stash nothing for a whole stage, but the
    neighbour gets its cotangent later. A steady phase keeps input grads and weight grads split:
    around it a full backward gains less than its loop may lose (up to 3 % of the loop's cycles,
    experiments/compiled).

    >>> from dualpipe_jax import schedules
    >>> costs = usual_costs(recomputes=False)
    >>> options = dict(costs=costs, transfer=0.1, layers=None, recomputes=False)
    >>> for name, num_microbatches in ("dualpipe", 5), ("dualpipe", 32), ("1f1b", 16):
    ...     made = schedules.make(name, num_ranks=4, num_microbatches=num_microbatches)
    ...     print(name, num_microbatches, decide(made, Execution(), **options))
    dualpipe 5 no overlap, split backwards, deferred weight grads store
    dualpipe 32 overlap, split backwards, deferred weight grads store
    1f1b 16 no overlap, full backwards, deferred weight grads store

    Args:
      schedule: The schedule.
      execution: The execution as given.
      costs: As `simulate`.
      transfer: As `simulate`.
      layers: The layers of the stages; None if they are alike, and have two equal halves.
      recomputes: Whether a deferred weight grad has anything to recompute.
      rendezvous: As `simulate`.
      placed_by: As `simulate`.

    Returns:
      The execution, whose `overlap` is True only if there is a steady phase. Among equally fast
      ones the one without it, and with split input grads and weight grads.

    Raises:
      ValueError: if the schedule cannot run, or not be aligned where that is asked for.
    """

    def seconds(execution: Execution) -> float:
        return replay_schedule(
            schedule,
            execution,
            costs=costs,
            transfer=transfer,
            layers=layers,
            # In the two-tick timetable, for GPUs, senders do not wait.
            rendezvous=rendezvous and execution.overlap != "two-tick",
            placed_by=placed_by,
        ).makespan

    def is_faster(execution: Execution, other: Execution) -> bool:
        time, other_time = seconds(execution), seconds(other)
        # Equal sums in different orders may differ in their last bits.
        return time < other_time and not math.isclose(time, other_time, rel_tol=1e-9)

    if not recomputes:
        execution = replace(execution, deferred="store")
    elif execution.deferred is None:
        execution = replace(execution, deferred="recompute")
    is_split = execution.split_backward is not False
    if execution.overlap is None and has_pairs(schedule):
        plain = replace(execution, overlap=False, split_backward=is_split)
        try:
            overlaps = is_faster(replace(plain, overlap=True), plain)
        except ScheduleError:
            overlaps = False
        execution = replace(execution, overlap=overlaps)
    if execution.overlap in (None, True):
        execution = replace(
            execution, overlap=bool(execution.overlap) and has_steady_state(schedule)
        )
    if execution.split_backward is None:
        split = replace(execution, split_backward=True)
        full = replace(execution, split_backward=False)
        is_full = execution.overlap is not True and is_faster(full, split)
        execution = full if is_full else split
    return execution


def replay_decided(
    schedule: Schedule,
    execution: Execution,
    *,
    costs: Costs,
    transfer: float = 0.0,
    layers: StageLayers | None = None,
    rendezvous: bool = True,
    placed_by: Costs | None = None,
    recomputes: bool | None = None,
) -> Simulation:
    """Decides all that an execution leaves open, and replays the schedule in it.

    Arguments are as for `decide`; `recomputes` is by default as the costs say.
    """
    if recomputes is None:
        recomputes = (placed_by or costs).recompute > 0
    options: dict[str, Any] = {
        "costs": costs,
        "transfer": transfer,
        "layers": layers,
        "rendezvous": rendezvous,
        "placed_by": placed_by,
    }
    decided = decide(schedule, execution, recomputes=recomputes, **options)
    return replay_schedule(schedule, decided, **options)


def has_pairs(schedule: Schedule) -> bool:
    """Whether a schedule has pairs of a forward and a backward, which can be aligned."""
    return bool((schedule.program.units.pair >= 0).any())


def has_steady_state(schedule: Schedule) -> bool:
    """Whether the pairs of a schedule, aligned, have a steady phase.

    Raises:
      ValueError: if they cannot be aligned.
    """
    _, steady = place_program(schedule.program, timetable="aligned")
    return steady is not None
