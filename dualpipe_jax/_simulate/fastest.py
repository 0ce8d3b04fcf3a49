"""Schedule -> in which timetable, and with which backwards, it is predicted to run faster."""

import math
from functools import lru_cache

from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import lag_of
from dualpipe_jax._simulate.costs import TRANSFER, Costs, of_transformer
from dualpipe_jax._simulate.simulation import simulate
from dualpipe_jax.schedules import Schedule

# Of a transformer's forward, where the context is as long as the model is wide: 2 of 12 + 2.
_ATTENTION = 1 / 7


def usual_costs(*, recomputes: bool, stash_deferred: bool = True) -> Costs:
    """Gives the costs of a transformer, for a model of which nothing is said.

    Args:
      recomputes: Whether an input grad runs the blocks forward again.
      stash_deferred: Whether a deferred weight grad does not.
    """
    return of_transformer(
        attention=_ATTENTION, recomputes=recomputes, stash_deferred=stash_deferred
    )


@lru_cache(maxsize=64)
def fastest_timetable(
    schedule: Schedule, *, costs: Costs, layers_per_stage: tuple[int, ...] | None = None
) -> str:
    """Predicts which timetable is the faster.

    The aligned one may have more ticks, but its run of beats hides the transfers, which take a
    tenth of a rank's forward each; so it pays from some number of microbatches on.

    >>> from dualpipe_jax import schedules
    >>> for num_microbatches in (5, 32):
    ...     made = schedules.dualpipe(num_ranks=4, num_microbatches=num_microbatches)
    ...     print(num_microbatches, fastest_timetable(made, costs=usual_costs(recomputes=False)))
    5 shortest
    32 aligned

    Args:
      schedule: The schedule.
      costs: How long actions take.
      layers_per_stage: As `simulate`.

    Returns:
      `"aligned"`; or `"shortest"` also if the two are equally fast, or the schedule cannot be
      aligned.

    Raises:
      ValueError: if the schedule cannot run.
    """
    return simulate(
        schedule,
        costs=costs,
        transfer=TRANSFER * costs.forward,
        layers_per_stage=layers_per_stage,
    ).timetable


@lru_cache(maxsize=64)
def prefers_full_backward(
    schedule: Schedule,
    *,
    timetable: str,
    costs: Costs,
    num_layers: int | None = None,
    layers_per_stage: tuple[int, ...] | None = None,
) -> bool:
    """Predicts whether full backwards are faster.

    For them speaks that nothing is stashed for a whole stage, and that the two halves take as long
    as each other; against them, that the neighbour gets its cotangent later. A timetable with a run
    of beats keeps input grads and weight grads apart: outside of the run a full backward gains
    less than what the run's loop may lose (up to 3 % of its cycles, experiments/full_backward).

    >>> from dualpipe_jax import schedules
    >>> costs = usual_costs(recomputes=False)
    >>> for name in ("1f1b", "chimera"):
    ...     made = schedules.make(name, num_ranks=4, num_microbatches=16)
    ...     print(name, prefers_full_backward(made, timetable="shortest", costs=costs))
    1f1b True
    chimera False

    Args:
      schedule: The schedule.
      timetable: One of `schedules.timetables()`.
      costs: How long actions take.
      num_layers: As `simulate`.
      layers_per_stage: As `simulate`.

    Raises:
      ValueError: if the schedule cannot run, or the layers do not fit.
    """
    if compile_program(schedule.program, timetable=timetable).tables.steady is not None:
        return False

    def makespan(*, full_backward: bool) -> float:
        return simulate(
            schedule,
            costs=costs,
            transfer=TRANSFER * costs.forward,
            num_layers=num_layers,
            layers_per_stage=layers_per_stage,
            timetable=timetable,
            full_backward=full_backward,
            # The two-tick one is for GPUs, where senders do not wait.
            rendezvous=lag_of(timetable) == 1,
        ).makespan

    full, split = makespan(full_backward=True), makespan(full_backward=False)
    # Equal sums in different orders may differ in their last bits.
    return full < split and not math.isclose(full, split, rel_tol=1e-9)
