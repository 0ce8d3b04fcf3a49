"""Timeline -> Timeline: places actions again, by how long they take.

A rank that sends waits for its receiver, and so each rank stands still at the ends of its
neighbours' actions. When all actions take a tick, these coincide. When they do not, a receiver that
is in a long action keeps its sender waiting, or waits itself, though all that matters is that the
value comes before it is read. In which tick a rank acts decides between which two actions its
neighbours receive; an idle tick costs no time. So ranks are walked through the program by the
clock: whoever has made a value hands it over as soon as its receiver is between two actions. A rank
about to begin an action during which a neighbour will have made something for it may wait for that:
it begins if its neighbour then waits at most `patience` times as long as the rank itself would.

No rule is the best at all costs and sizes, so `compile` tries some and replays each. (Interleaved
1F1B, 4 ranks, 16 microbatches, rematerialised: 1.23 of the time without false waits as soon as
possible, 1.02 by the clock, in 123 ticks for 102.)

Two ranks, forwards that take three. `1I1` is made while rank 0 is in `0F2`, which it may begin
without; in a tick with `0F2` and not before it, rank 0 does not wait for it from 9 to 11:

>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> shortest = place_shortest(GENERATORS["zb-h1"](num_ranks=2, num_microbatches=3))
>>> took = np.array([0.0, 3, 1, 1])[shortest.program.units.opcode]
>>> placed, _ = place_by_clock(
...     shortest, None, took=took, after_run=np.zeros(2), transfer=0.0, patience=np.inf
... )
>>> for timeline in shortest, placed:
...     for row in zip(*timeline.actions, strict=True):
...         print(*(action or "..." for action in row))
0F0 0F1 ... 0I0 0W0 0F2 0I1 0W1 0I2 0W2
... 1F0 1I0 1F1 1I1 1W1 1F2 1I2 1W2 1W0
0F0 0F1 ... 0I0 0W0 0F2 0I1 0W1 ... 0I2 0W2
... 1F0 1I0 1F1 ... 1I1 1W1 1F2 1I2 1W2 1W0
"""

import heapq
import itertools
import math
from dataclasses import replace

import numpy as np

from dualpipe_jax._schedule.dependencies import build_timeline, find_dependencies
from dualpipe_jax._schedule.ir import Timeline
from dualpipe_jax._schedule.steady import Run

# Instants that differ by less than this share of the longest action are one: sums in different
# orders differ in their last bits.
_SAME_INSTANT = 1e-9


def place_by_clock(
    timeline: Timeline,
    run: Run | None,
    *,
    took: np.ndarray,
    after_run: np.ndarray,
    transfer: float,
    patience: float,
) -> tuple[Timeline, Run | None]:
    """Places what is before the run of beats, and what is after it; the run stays as it is.

    Args:
        timeline: A timeline.
        run: Its run of beats.
        took: float64[num_actions], how long each takes.
        after_run: float64[num_ranks], when each rank is free after the run.
        transfer: How long a value travels to a neighbour.
        patience: For how much of its own wait a rank takes a wait of its neighbour.
    """
    tick_of, start = timeline.tick_of, 0
    bounds = [(0, timeline.num_ticks)]
    if run is not None:
        bounds = [(0, run.first_tick), (run.stop, timeline.num_ticks)]
    placed = tick_of.copy()
    for number, (first, stop) in enumerate(bounds):
        here = (tick_of >= first) & (tick_of < stop)
        walk = _Walk(timeline, here, took, transfer=transfer, patience=patience)
        ticks = walk.run(after_run if number else np.zeros(timeline.num_ranks))
        placed[here] = start + ticks[here]
        start += int(ticks[here].max(initial=-1)) + 1
        if run is not None and number == 0:
            in_run = (tick_of >= run.first_tick) & (tick_of < run.stop)
            placed[in_run] += start - run.first_tick
            run, start = replace(run, first_tick=start), start + run.stop - run.first_tick
    return build_timeline(timeline.program, placed, timetable=timeline.timetable), run


class _Walk:
    """Walks ranks through some of a program's actions, by the clock.

    A rank runs an action, is held by a value that it has made and not handed over, or is between
    two actions; it is free at an instant, up to which it takes part in a transfer.
    """

    def __init__(
        self,
        timeline: Timeline,
        here: np.ndarray,
        took: np.ndarray,
        *,
        transfer: float,
        patience: float,
    ):
        program = timeline.program
        units, needs = program.units, find_dependencies(program)
        num_actions = len(units)
        # For each action the rank that is handed its value, -1 for none.
        receiver = np.full(num_actions + 1, -1)
        reads = np.flatnonzero(needs.payload >= 0)
        receiver[needs.payload[reads]] = units.rank[reads]
        receiver[:-1][receiver[:-1] == units.rank] = -1
        self.receiver = receiver.tolist()
        self.took, self.transfer, self.patience = took.tolist(), transfer, patience
        self.payload = needs.payload.tolist()
        self.num_ranks = timeline.num_ranks
        self.same = _SAME_INSTANT * float(took.max(initial=0.0))
        # Whether what an action makes is where it is read; one entry more, for "needs nothing".
        is_over = timeline.tick_of < timeline.tick_of[here].min(initial=timeline.num_ticks)
        self.is_there = [*is_over.tolist(), True]
        self.rows = [
            np.flatnonzero(here & (units.rank == r)).tolist() for r in range(self.num_ranks)
        ]
        self.next = [0] * self.num_ranks
        self.ends = [math.inf] * self.num_ranks  # when the action ends that a rank runs, if it does
        self.held: list[int | None] = [None] * self.num_ranks  # the action whose value holds it
        # The actions in the order of their ends, and for each that is handed over before which
        # action of its receiver, and after which, -1 for none.
        self.order: list[int] = []
        self.handed: dict[int, tuple[int, int]] = {}

    def run(self, free: np.ndarray) -> np.ndarray:
        """Walks, from the instants on at which ranks are free.

        Returns:
            int64[num_actions], the ticks of the actions that were walked, from 0 on.
        """
        self.free = free.tolist()
        events = [(instant, rank) for rank, instant in enumerate(self.free)]
        heapq.heapify(events)
        while events:
            now, ranks = events[0][0], set()
            while events and events[0][0] <= now + self.same:
                ranks.add(heapq.heappop(events)[1])
            for rank in ranks:
                self._end(rank, now)
            for rank in self._find_meeting():
                for who in self._hand_over(rank, now):
                    heapq.heappush(events, (self.free[who], who))
            for rank in sorted(ranks):
                if self._begins(rank, now):
                    heapq.heappush(events, (self.ends[rank], rank))
        assert len(self.order) == sum(map(len, self.rows)), "a legal program runs to its end"
        return self._find_ticks()

    def _end(self, rank: int, now: float) -> None:
        """Ends the action that a rank runs, if its time has come."""
        if self.ends[rank] > now + self.same:
            return
        action = self.rows[rank][self.next[rank]]
        self.next[rank] += 1
        self.ends[rank] = math.inf
        self.free[rank] = now
        self.order.append(action)
        if self.receiver[action] < 0:
            self.is_there[action] = True
        else:
            self.held[rank] = action

    def _find_meeting(self) -> list[int]:
        """Finds the ranks that may hand over: to one between two actions, and not held itself.

        Or held no longer, as it hands over too: so a value is never handed over before one that its
        receiver has made earlier, and in no earlier tick.
        """
        receiver = {r: self.receiver[a] for r, a in enumerate(self.held) if a is not None}
        if not receiver:
            return []
        meeting = {r for r, other in receiver.items() if self.ends[other] == math.inf}
        while late := {r for r in meeting if receiver[r] in receiver.keys() - meeting}:
            meeting -= late
        return sorted(meeting)

    def _hand_over(self, rank: int, now: float) -> tuple[int, int]:
        """Hands over what holds a rank, and says who takes part."""
        action, self.held[rank] = self.held[rank], None
        assert action is not None, "it is held by a value"
        receiver = self.receiver[action]
        self.is_there[action] = True
        row, following = self.rows[receiver], self.next[receiver]
        self.handed[action] = (
            row[following - 1] if following else -1,
            row[following] if following < len(row) else -1,
        )
        for who in (rank, receiver):
            self.free[who] = max(self.free[who], now + self.transfer)
        return rank, receiver

    def _begins(self, rank: int, now: float) -> bool:
        """Begins a rank's next action, if it is free and has what it reads, and need not wait."""
        is_busy = self.ends[rank] < math.inf or self.held[rank] is not None
        if is_busy or self.free[rank] > now + self.same or self.next[rank] == len(self.rows[rank]):
            return False
        action = self.rows[rank][self.next[rank]]
        if not self.is_there[self.payload[action]]:
            return False
        end = now + self.took[action]
        for neighbour in ((rank - 1) % self.num_ranks, (rank + 1) % self.num_ranks):
            comes = self.ends[neighbour]
            if comes >= end - self.same:
                continue
            makes = self.rows[neighbour][self.next[neighbour]]
            is_for_me = self.receiver[makes] == rank
            if is_for_me and end - comes > self.patience * (comes - now) + self.same:
                return False
        self.ends[rank] = end
        return True

    def _find_ticks(self) -> np.ndarray:
        """Finds the earliest ticks in which whatever is handed over meets the same actions.

        A value is handed over in its producer's tick: not before its receiver's last action, and
        before its next one. (In the same tick as the last one, if both hand something over.)
        """
        after: dict[int, list[tuple[int, int]]] = {action: [] for action in self.order}
        for row in self.rows:
            for action, following in itertools.pairwise(row):
                after[following].append((action, 1))
        for action, (last, following) in self.handed.items():
            if last >= 0:
                after[action].append((last, 0))
            if following >= 0:
                after[following].append((action, 1))
        ticks = [0] * (len(self.receiver) - 1)
        # A sweep settles at least one action more, and mostly all, as these stand in time's order.
        for _ in self.order:
            is_settled = True
            for action in self.order:
                tick = 0
                for first, gap in after[action]:
                    tick = max(tick, ticks[first] + gap)
                if tick != ticks[action]:
                    ticks[action], is_settled = tick, False
            if is_settled:
                return np.array(ticks)
        raise AssertionError("actions that are walked in time are in some order")
