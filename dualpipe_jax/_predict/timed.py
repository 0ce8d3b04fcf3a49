"""Schedule, execution and costs -> when each action of each rank runs in the replay, and waits."""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._costs import Costs, StageLayers
from dualpipe_jax._predict.simulation import compile_for
from dualpipe_jax._predict.waits import NEXT, RECEIVER, TRANSFER, Wait, explain_waits
from dualpipe_jax._schedule.actions import COTANGENT, EFFECTS, IDLE, Opcode, X, letter_of
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule

_ROUNDING = 1e-9  # of the makespan: shorter waits are sums in another order
# The (rank, tick) of each action, in order.
_Cells = list[tuple[int, int]]


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
      source: The place, among all actions, of the one on another rank that makes the x or the
        cotangent that it reads; None if it reads none of another rank.
      waits: The waits of its rank since the action before. Outside of the steady phase they are
        those of `explain_waits`, and add up to the time in between. In the steady phase and in
        lazy tables they are those for the value that it reads, and for the receiver of the value
        made before; a rest of the time is without a reason.
    """

    rank: int
    tick: int
    opcode: Opcode
    stage: int
    microbatch: int
    direction: int
    start: float
    end: float
    source: int | None
    waits: tuple[Wait, ...]

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
    cells: _Cells = [(rank, tick) for rank, tick in np.argwhere(tables.opcode.T != IDLE).tolist()]
    sources = _sources(tables, cells)
    waits = _waits(tables, work, cells, sources, transfer=transfer, rendezvous=rendezvous)
    found = []
    for (rank, tick), source, of_action in zip(cells, sources, waits, strict=True):
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
                source=source,
                waits=tuple(of_action),
            )
        )
    return found


def _sources(tables: Tables, cells: _Cells) -> list[int | None]:
    """Finds for each action the one on another rank that makes the value that it reads."""
    made: dict[tuple[str, int, int], int] = {}
    for place, (rank, tick) in enumerate(cells):
        value = EFFECTS[Opcode(tables.opcode[tick, rank])].makes
        if value in (X, COTANGENT):
            reader = int(tables.stage[tick, rank]) + (1 if value == X else -1)
            made[value, reader, int(tables.microbatch[tick, rank])] = place
    sources = []
    for rank, tick in cells:
        value = EFFECTS[Opcode(tables.opcode[tick, rank])].takes
        source = made.get(
            (value, int(tables.stage[tick, rank]), int(tables.microbatch[tick, rank]))
        )
        sources.append(None if source is None or cells[source][0] == rank else source)
    return sources


def _waits(
    tables: Tables,
    work: np.ndarray,
    cells: _Cells,
    sources: list[int | None],
    *,
    transfer: float,
    rendezvous: bool,
) -> list[list[Wait]]:
    """Lists for each action the waits of its rank since the action before."""
    waits: list[list[Wait]] = [[] for _ in cells]
    if not tables.is_lazy:
        explained = explain_waits(tables, work, transfer=transfer, rendezvous=rendezvous)
        for of_tick in explained.ticks:
            for wait in of_tick.waits:
                place = bisect_right(cells, (wait.rank, of_tick.number))
                if place < len(cells) and cells[place][0] == wait.rank:
                    waits[place].append(wait)
    # The rest of the time is charged first to the value that the action reads.
    end = replay(tables, work, transfer=transfer, rendezvous=rendezvous)
    reader_of = {source: place for place, source in enumerate(sources) if source is not None}
    steady = range(0) if tables.steady is None else range(tables.num_ticks)[tables.steady.ticks]
    for place, (rank, tick) in enumerate(cells):
        until = sum(wait.time for wait in waits[place])
        # (reason, the other rank, when it lets the rank go on, when the rank reads its value)
        moments: list[tuple[str, int, float, int | None]] = []
        source = sources[place]
        if source is not None:
            other, made_in = cells[source]
            made = float(end[made_in, other])
            moments = [(NEXT, other, made, tick), (TRANSFER, other, made + transfer, tick)]
        if place and cells[place - 1][0] == rank:
            before = cells[place - 1][1]
            until += float(end[before, rank])
            reader = reader_of.get(place - 1)
            if rendezvous and reader is not None and before in steady:
                other = cells[reader][0]
                moments.append((RECEIVER, other, float(end[before, other]), None))
        start = float(end[tick, rank] - work[tick, rank])
        for reason, other, moment, read_in in moments:
            time = min(moment, start) - until
            if time > _ROUNDING * float(end[-1].max()):
                waits[place].append(
                    Wait(rank=rank, other=other, reason=reason, time=time, read_in=read_in)
                )
                until += time
    return waits
