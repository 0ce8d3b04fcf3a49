"""Timeline -> Timeline: places actions again, by how long they take.

A permute is a rendezvous, so a value is sent when both ranks are between two actions. When all
actions take a tick, these moments coincide. When they do not, a rank that sends every value as soon
as it has made it waits for the end of its receiver's action, though the value need only come before
it is read. So ranks are walked through the program by the clock, and a value is sent whenever both
ranks happen to be between two actions. A rank that goes on meanwhile keeps the value in a slot and
sends it in a later tick (`Timeline.sent_in`); idle ticks cost no time.

A rank about to begin an action may also wait until a neighbour's action ends, to exchange a value
then. It considers this for a value that the receiver reads right after its present action (or after
the one that it is about to begin). It waits if otherwise the neighbour would wait for it more than
`patience` times as long.

No rule is the best at all costs and sizes, so `compile` tries some and replays each.

Two ranks, forwards that take three. `1I1` is made at 11, while rank 0 is in `0F2` until 12, which
it may begin without. So rank 1 goes on with `1W1`, and sends it after that, in tick 5, at 12:

>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> shortest = place_shortest(GENERATORS["zb-h1"](num_ranks=2, num_microbatches=3))
>>> units = shortest.program.units
>>> took = np.array([0.0, 3, 1, 1])[units.opcode]
>>> placed, _ = place_by_clock(
...     shortest, None, took=took, after_steady=np.zeros(2), transfer=0.0, patience=np.inf
... )
>>> for row in zip(*placed.actions, strict=True):
...     print(*(action or "..." for action in row))
0F0 0F1 ... 0I0 0W0 0F2 0I1 0W1 0I2 0W2
... 1F0 1I0 1F1 1I1 1W1 1F2 1I2 1W2 1W0
>>> for action in np.flatnonzero(placed.sent_in > placed.tick_of):
...     print(units.name(action), placed.tick_of[action], placed.sent_in[action])
1I1 4 5
"""

import heapq
import math
from dataclasses import replace

import numpy as np

from dualpipe_jax._schedule.dependencies import build_timeline, find_dependencies
from dualpipe_jax._schedule.find_steady import SteadyPhase
from dualpipe_jax._schedule.ir import Timeline

# Instants that differ by less than this share of the longest action are one: sums in different
# orders differ in their last bits.
_SAME_INSTANT = 1e-9
_NEVER = math.inf


def place_by_clock(
    timeline: Timeline,
    steady: SteadyPhase | None,
    *,
    took: np.ndarray,
    after_steady: np.ndarray,
    transfer: float,
    patience: float,
) -> tuple[Timeline, SteadyPhase | None]:
    """Places the actions before the steady phase and those after it, which itself stays as it is.

    Args:
        timeline: A timeline.
        steady: Its steady phase.
        took: float64[num_actions], how long each takes.
        after_steady: float64[num_ranks], when each rank is free after the steady phase.
        transfer: How long a value travels to a neighbour.
        patience: A rank waits if a neighbour's wait would be longer than its own by this factor.
    """
    tick_of, start = timeline.tick_of, 0
    bounds = [(0, timeline.num_ticks)]
    if steady is not None:
        bounds = [(0, steady.first_tick), (steady.stop, timeline.num_ticks)]
    placed, sent_in = tick_of.copy(), tick_of.copy()
    for number, (first, stop) in enumerate(bounds):
        here = (tick_of >= first) & (tick_of < stop)
        walk = _Walk(timeline, here, took, transfer=transfer, patience=patience)
        acts, sends = walk.run(after_steady if number else np.zeros(timeline.num_ranks))
        placed[here], sent_in[here] = start + acts[here], start + sends[here]
        start += int(sends[here].max(initial=-1)) + 1
        if steady is not None and number == 0:
            in_steady = (tick_of >= steady.first_tick) & (tick_of < steady.stop)
            placed[in_steady] += start - steady.first_tick
            sent_in[in_steady] = placed[in_steady]
            num_ticks = steady.stop - steady.first_tick
            steady, start = replace(steady, first_tick=start), start + num_ticks
    placed_timeline = build_timeline(
        timeline.program, placed, sent_in=sent_in, timetable=timeline.timetable
    )
    return placed_timeline, steady


class _Walk:
    """Walks ranks through some of a program's actions, by the clock.

    A rank runs an action or is between two; then it is free from an instant on, up to which it
    takes part in a transfer. It sends the values that it has made for other ranks when they meet.
    Ticks are found on the way: the earliest ones in which each transfer meets the same actions.
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
        num_ranks = timeline.num_ranks
        # For each action the rank to which its value is sent, -1 for none.
        receiver = np.full(len(units), -1)
        reads = np.flatnonzero(needs.payload >= 0)
        receiver[needs.payload[reads]] = units.rank[reads]
        receiver[receiver == units.rank] = -1
        self.receiver = receiver.tolist()
        self.took, self.transfer, self.patience = took.tolist(), transfer, patience
        self.payload = needs.payload.tolist()
        self.neighbours = [{(r - 1) % num_ranks, (r + 1) % num_ranks} for r in range(num_ranks)]
        self.same = _SAME_INSTANT * float(took.max(initial=0.0))
        # Whether an action's value is where it is read; one entry more, for "needs nothing".
        is_over = timeline.tick_of < timeline.tick_of[here].min(initial=timeline.num_ticks)
        self.is_there = [*is_over.tolist(), True]
        self.rows = [np.flatnonzero(here & (units.rank == r)).tolist() for r in range(num_ranks)]
        self.next = [0] * num_ranks
        self.ends = [_NEVER] * num_ranks  # when the action ends that a rank runs, if it does
        # The actions whose values a rank has to send, the latest one first.
        self.made: list[list[int]] = [[] for _ in range(num_ranks)]
        # The tick of each action, and that in which its value is sent.
        self.acts, self.sends = [0] * len(units), [0] * len(units)
        # The latest action of each rank, its tick, and that of the latest transfer or action.
        self.latest, self.tick, self.last_tick = ([-1] * num_ranks for _ in range(3))
        # The tick in which each rank sent last, and whether it was in a transfer since its action.
        self.sent, self.has_met = [-1] * num_ranks, [False] * num_ranks

    def run(self, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Walks, from the instants on at which ranks are free.

        Returns:
            For each action that was walked its tick, from 0 on, and that in which its value is
            sent: int64[num_actions] both.
        """
        self.free, ends = free.tolist(), self.ends
        events = [(instant, rank) for rank, instant in enumerate(self.free)]
        heapq.heapify(events)
        while events:
            now, ranks = events[0][0], set()
            until = now + self.same
            while events and events[0][0] <= until:
                rank = heapq.heappop(events)[1]
                if ends[rank] <= until:
                    self._end(rank, now)
                ranks.update(self.neighbours[rank], (rank,))
            near = sorted(ranks)
            for rank in self._hand_over(near, now):
                heapq.heappush(events, (self.free[rank], rank))
            for rank in near:
                if self.free[rank] <= until and self._begins(rank, now):
                    heapq.heappush(events, (ends[rank], rank))
        num_left = sum(map(len, self.rows)) - sum(self.next) + sum(map(len, self.made))
        assert not num_left, "a legal program runs to its end"
        return np.array(self.acts, np.int64), np.array(self.sends, np.int64)

    def _end(self, rank: int, now: float) -> None:
        """Ends the action that a rank runs, in the tick after its latest transfer."""
        action = self.rows[rank][self.next[rank]]
        self.next[rank] += 1
        self.ends[rank], self.free[rank] = _NEVER, now
        self.last_tick[rank] = self.tick[rank] = tick = self.last_tick[rank] + 1
        self.acts[action] = self.sends[action] = tick
        self.latest[rank], self.has_met[rank] = action, False
        if self.receiver[action] < 0:
            self.is_there[action] = True
        else:
            self.made[rank].insert(0, action)

    def _hand_over(self, near: list[int], now: float) -> set[int]:
        """Sends values between ranks that are between two actions, one of a rank at a time.

        Returns:
            The ranks that took part.
        """
        made, receiver, free = self.made, self.receiver, self.free
        met: set[int] = set()
        senders, until = [rank for rank in near if made[rank]], now + self.same
        while True:
            moves = []
            for rank in senders:
                if free[rank] <= until:
                    for value in made[rank]:
                        other = receiver[value]
                        if free[other] <= until:
                            moves.append((value, rank, other))
                            break
            if not moves:
                return met
            self._send(moves)
            for _, *both in moves:
                met.update(both)
            for rank in met:
                free[rank] = now + self.transfer

    def _send(self, moves: list[tuple[int, int, int]]) -> None:
        """Sends values at one instant, each between ranks: (value, sender, receiver).

        A value is sent not before the latest actions of both ranks, and after the one that the
        sender sent last. It is sent in the tick in which it was made if its rank has done nothing
        since: then its action may have to move to a later tick, and so others of the same instant.
        """
        tick, sent = self.tick, self.sent
        is_settled = False
        on_time = [m for m in moves if self.latest[m[1]] == m[0] and not self.has_met[m[1]]]
        while not is_settled:
            is_settled = True
            for value, sender, receiver in on_time:
                soonest = max(tick[receiver], sent[sender] + 1)
                if soonest > tick[sender]:
                    tick[sender] = self.acts[value] = soonest
                    is_settled = False
        for value, sender, receiver in moves:
            then = max(tick[sender], tick[receiver], sent[sender] + 1)
            self.sends[value] = sent[sender] = then
            self.made[sender].remove(value)
            self.is_there[value] = True
            for rank in (sender, receiver):
                self.has_met[rank] = True
                self.last_tick[rank] = max(self.last_tick[rank], then)

    def _begins(self, rank: int, now: float) -> bool:
        """Begins the next action of a free rank, if it has all values and need not wait."""
        ends, receiver = self.ends, self.receiver
        row, following = self.rows[rank], self.next[rank]
        if following == len(row) or not self.is_there[self.payload[row[following]]]:
            return False
        end = now + self.took[row[following]]
        for value in self.made[rank]:
            # A neighbour that takes part in a transfer is between two actions right after it.
            other = receiver[value]
            if ends[other] == _NEVER or self._is_worth_waiting(value, other, now, end):
                return False
        for other in self.neighbours[rank]:
            if ends[other] < _NEVER:
                value = self.rows[other][self.next[other]]
                is_mine = receiver[value] == rank
                if is_mine and self._is_worth_waiting(value, other, now, end):
                    return False
        ends[rank], self.free[rank] = end, _NEVER
        return True

    def _is_worth_waiting(self, value: int, other: int, now: float, end: float) -> bool:
        """Whether to wait for the end of another rank's action before one that lasts until `end`.

        The value is to be sent between the two ranks, and is needed right after the action that the
        receiver runs, or is about to begin.
        """
        comes, receiver = self.ends[other], self.receiver[value]
        if comes >= end - self.same:
            return False
        row, following = self.rows[receiver], self.next[receiver] + 1
        if following >= len(row) or self.payload[row[following]] != value:
            return False
        return end - comes > self.patience * (comes - now) + self.same
