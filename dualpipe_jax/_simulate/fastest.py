"""Schedule -> in which timetable, and with which backwards, it is predicted to run faster."""

from functools import lru_cache

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import IDLE, TIMETABLES, Program
from dualpipe_jax._simulate.costs import of_transformer
from dualpipe_jax._simulate.replay import replay
from dualpipe_jax._simulate.simulation import simulate
from dualpipe_jax.schedules import Schedule

# At a width of 1024 or more an activation takes up to about a tenth of a stage's forward to reach a
# neighbour over today's links. (Without transfers no alignment would pay: what it buys is that they
# run behind the beats' own compute.) In units of one transfer, so that equal times compare equal.
TRANSFER, TICK = 1.0, 10.0
# Of a transformer's forward, where the context is as long as the model is wide: 2 of 12 + 2.
_ATTENTION = 1 / 7


def fastest_timetable(schedule: Schedule, *, stash_deferred: bool = True) -> str:
    """Predicts which timetable is the faster if F, I and W of a stage cost the same.

    The aligned one may have more ticks, but its run of beats hides the transfers, which take a
    tenth of a tick each; so it pays from some number of microbatches on.

    >>> from dualpipe_jax import schedules
    >>> for num_microbatches in (6, 32):
    ...     made = schedules.dualpipe(num_ranks=4, num_microbatches=num_microbatches)
    ...     print(num_microbatches, fastest_timetable(made))
    6 shortest
    32 aligned

    Args:
      schedule: The schedule.
      stash_deferred: As `compile_program`; without effect on the answer, but what was compiled for
        it need not be compiled again.

    Returns:
      One of `schedules.timetables()`; `"shortest"` if they are equally fast, or if the schedule
      cannot be aligned.

    Raises:
      ValueError: if the schedule cannot run.
    """
    return _fastest(schedule.program, stash_deferred)


@lru_cache(maxsize=64)
def _fastest(program: Program, stash_deferred: bool) -> str:
    shortest, aligned = TIMETABLES
    if not (program.units.pair >= 0).any():
        return shortest
    before = _predict(program, shortest, stash_deferred)
    try:
        after = _predict(program, aligned, stash_deferred)
    except ScheduleError:
        return shortest
    return aligned if after < before else shortest


def _predict(program: Program, timetable: str, stash_deferred: bool) -> float:
    """Replays a timetable; in transfers."""
    compiled = compile_program(program, timetable=timetable, stash_deferred=stash_deferred)
    work = np.where(compiled.tables.opcode == IDLE, 0.0, TICK)
    return float(replay(compiled.tables, work, transfer=TRANSFER).max())


@lru_cache(maxsize=64)
def prefers_full_backward(
    schedule: Schedule,
    *,
    timetable: str,
    recomputes: bool,
    stash_deferred: bool = True,
    num_layers: int | None = None,
    layers_per_stage: tuple[int, ...] | None = None,
) -> bool:
    """Predicts whether full backwards are faster, at the costs of a transformer.

    For them speaks that nothing is stashed for a whole stage, and that the two halves take as long
    as each other; against them, that the neighbour gets its cotangent later. A timetable with a run
    of beats keeps input grads and weight grads apart: outside of the run a full backward gains
    less than what the run's loop may lose (up to 3 % of its cycles, experiments/full_backward).

    >>> from dualpipe_jax import schedules
    >>> for name in ("1f1b", "chimera"):
    ...     made = schedules.make(name, num_ranks=4, num_microbatches=16)
    ...     print(name, prefers_full_backward(made, timetable="shortest", recomputes=False))
    1f1b True
    chimera False

    Args:
      schedule: The schedule.
      timetable: One of `schedules.timetables()`.
      recomputes: Whether an input grad runs the blocks forward again.
      stash_deferred: As `compile_program`, of halves apart.
      num_layers: As `simulate`.
      layers_per_stage: As `simulate`.

    Raises:
      ValueError: if the schedule cannot run, or the layers do not fit.
    """
    apart = compile_program(schedule.program, timetable=timetable, stash_deferred=stash_deferred)
    if apart.tables.steady is not None:
        return False
    costs = of_transformer(
        attention=_ATTENTION, recomputes=recomputes, stash_deferred=stash_deferred
    )

    def makespan(*, full_backward: bool) -> float:
        return simulate(
            schedule,
            costs=costs,
            transfer=TRANSFER / TICK,
            num_layers=num_layers,
            layers_per_stage=layers_per_stage,
            timetable=timetable,
            full_backward=full_backward,
        ).makespan

    return makespan(full_backward=True) < makespan(full_backward=False)
