"""Schedule, execution and costs -> when each action of each rank starts and ends in the replay."""

from dataclasses import dataclass

import numpy as np

from dualpipe_jax._costs import Costs, StageLayers
from dualpipe_jax._predict.simulation import compile_for
from dualpipe_jax._schedule.actions import IDLE, Opcode, letter_of
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class TimedAction:
    """Tells when a rank runs an action.

    Attributes:
      rank: The rank.
      tick: The tick of the tables.
      opcode: The action.
      stage: Its stage.
      microbatch: Its microbatch.
      direction: The direction of the microbatch.
      start: When it starts, in the unit of the costs.
      end: When it ends.
    """

    rank: int
    tick: int
    opcode: Opcode
    stage: int
    microbatch: int
    direction: int
    start: float
    end: float

    @property
    def name(self) -> str:
        """The action as the text form of a timetable writes it: F3, or f3 in direction 1."""
        letter = letter_of(self.opcode)
        return f"{letter if self.direction % 2 == 0 else letter.lower()}{self.microbatch}"


def timed_actions(
    schedule: Schedule,
    execution: Execution,
    *,
    costs: Costs,
    transfer: float = 0.0,
    layers: StageLayers | None = None,
    rendezvous: bool = True,
    placed_by: Costs | None = None,
) -> list[TimedAction]:
    """Lists the actions of a schedule, rank by rank in order of time.

    >>> from dualpipe_jax import schedules
    >>> schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=1)
    >>> execution = Execution(overlap=False, split_backward=True, deferred="store")
    >>> for action in timed_actions(schedule, execution, costs=Costs(forward=2)):
    ...     print(action.rank, action.name, action.start, action.end)
    0 F0 0.0 2.0
    0 I0 5.0 6.0
    0 W0 6.0 7.0
    1 F0 2.0 4.0
    1 I0 4.0 5.0
    1 W0 5.0 6.0

    Args:
      schedule: The schedule.
      execution: How it becomes a program, all decided but `unroll`.
      costs: How long actions take.
      transfer: How long a value travels to a neighbour.
      layers: The layers of the stages; None if they are alike.
      rendezvous: Whether a sender waits for its receiver.
      placed_by: As `simulate`.
    """
    made, durations = compile_for(
        schedule,
        execution,
        costs=costs,
        transfer=transfer,
        layers=layers,
        placed_by=placed_by,
    )
    tables, work = made.tables, durations.work(made.tables)
    end = replay(tables, work, transfer=transfer, rendezvous=rendezvous)
    found = []
    for rank, tick in np.argwhere(tables.opcode.T != IDLE).tolist():
        microbatch = int(tables.microbatch[tick, rank])
        found.append(
            TimedAction(
                rank=rank,
                tick=tick,
                opcode=Opcode(tables.opcode[tick, rank]),
                stage=int(tables.stage[tick, rank]),
                microbatch=microbatch,
                direction=int(schedule.program.direction_of[microbatch]),
                start=float(end[tick, rank] - work[tick, rank]),
                end=float(end[tick, rank]),
            )
        )
    return found
