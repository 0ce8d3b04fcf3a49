"""Timeline -> its longest steady phase: beats that are the same straight-line code on all ranks.

Beats repeat after as many as a rank has chunks: each chunk runs forwards in one of them. Its number
in this order is its role, and in each beat all ranks run the same role backwards. All that the
beats send is read in the very next one, or waits a number of beats more that is the same for all
values of one rank: as from the last rank to the first one of `interleaved-paired`, which waits for
its next chunk's turn. Then roles, and who sends to whom, are the same in every period. Beats at
the edges of the aligned part, which read earlier values or make values that are read later, are
left out.

DualPipe on two ranks: rank 0 runs microbatches forward that enter there (direction 0) in the beats
in which rank 1 runs forward those that enter at rank 1; so they swap values, and change roles.

>>> from dualpipe_jax._schedule.align import align
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> timeline = align(place_shortest(GENERATORS["dualpipe"](num_ranks=2, num_microbatches=8)))
>>> steady = find_steady(timeline)
>>> for tick in steady.first_tick, steady.first_tick + 3, steady.first_tick + 6:
...     print([action[:2] for action in timeline.actions[tick]])
['1F', '1F']
['0F', '0F']
['1F', '1F']
>>> steady.num_beats, steady.x_pairs, steady.backward
(4, ((), ((0, 1), (1, 0))), (1, 0))
>>> steady.role_of.tolist()  # of chunks 0 and 1, on the two ranks
[[1, 0], [0, 1]]

Four ranks with two stages each. In the beats in which rank 3 runs its first stage forwards, it
sends to rank 0, which reads the value after a beat for its first stage:

>>> sizes = {"num_ranks": 4, "num_microbatches": 16}
>>> timeline = align(place_shortest(GENERATORS["interleaved-paired"](**sizes)))
>>> steady = find_steady(timeline)
>>> steady.x_pairs, steady.x_wait.tolist()
((((0, 1), (1, 2), (2, 3)), ((0, 1), (1, 2), (2, 3), (3, 0))), [1, 0, 0, 0])
"""

from dataclasses import dataclass

import numpy as np

from dualpipe_jax._schedule.dependencies import find_dependencies
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT, Timeline
from dualpipe_jax._schedule.tables import Pairs


@dataclass(frozen=True, eq=False)
class SteadyPhase:
    """Describes the beats of `tables.Steady`, before these have slots and chunks by their roles.

    Attributes:
      first_tick, num_beats, backward: As in `tables.Steady`; and so are the pairs and the waits.
      role_of: int64[num_chunks, num_ranks], the role of each chunk.
    """

    first_tick: int
    num_beats: int
    backward: tuple[int, ...]
    x_pairs: tuple[Pairs, ...]
    cotangent_pairs: tuple[Pairs, ...]
    x_wait: np.ndarray
    cotangent_wait: np.ndarray
    role_of: np.ndarray

    @property
    def last_tick(self) -> int:
        """The first tick of the last beat."""
        return self.first_tick + TICKS_PER_BEAT * (self.num_beats - 1)

    @property
    def stop(self) -> int:
        """The tick after the steady phase."""
        return self.last_tick + TICKS_PER_BEAT


def find_steady(timeline: Timeline) -> SteadyPhase | None:
    """Finds the longest one; None where beats do not repeat, or each rank has a single chunk."""
    num_chunks = len(timeline.program.stage_of)
    ends = np.flatnonzero(np.diff(timeline.beats) != TICKS_PER_BEAT) + 1
    if num_chunks < 2:
        return None
    longest: SteadyPhase | None = None
    for beats in np.split(timeline.beats, ends):
        if len(beats) < num_chunks:
            continue
        found = _Run(timeline, int(beats[0]), len(beats)).longest()
        if found and (longest is None or found.num_beats > longest.num_beats):
            longest = found
    return longest


class _Run:
    """Holds beats, one after the other, among which a steady phase is searched.

    Beats are counted from the first one; a negative one is before it. Arrays are
    int64[2, num_beats, num_ranks], of the beats' F's, then of their I's.
    """

    def __init__(self, timeline: Timeline, first_tick: int, num_beats: int):
        self.timeline, self.first_tick, self.num_beats = timeline, first_tick, num_beats
        program = timeline.program
        units, payload = program.units, find_dependencies(program).payload
        self.period = len(program.stage_of)
        ticks = first_tick + TICKS_PER_BEAT * np.arange(num_beats)
        self.actions = np.stack([timeline.index[ticks], timeline.index[ticks + 1]])
        chunk_of = program.chunk_of[program.direction_of[units.microbatch], units.stage]
        self.chunk = chunk_of[self.actions]
        consumer = np.full(len(units), -1)
        reads = np.flatnonzero(payload >= 0)
        consumer[payload[reads]] = reads
        self.consumer = consumer[self.actions]
        # The cotangent that the head gives, which an I reads from an F, does not travel.
        self.travels = units.opcode[self.actions] == units.opcode[self.consumer]
        self.travels &= self.consumer >= 0
        self.made = payload[self.actions]
        of_other = units.opcode[self.made] != units.opcode[self.actions]
        self.is_from_head = (self.made >= 0) & of_other
        self.made_in = self._beat_of(self.made)
        self.wait = self._waits()

    def _beat_of(self, action: np.ndarray) -> np.ndarray:
        return (self.timeline.tick_of[action] - self.first_tick) // TICKS_PER_BEAT

    def _waits(self) -> np.ndarray:
        """Finds how long most values that travel wait on each rank: int64[2, num_ranks]."""
        beats = np.arange(self.num_beats)[None, :, None]
        waits = beats - 1 - self.made_in
        is_counted = (self.made >= 0) & ~self.is_from_head & (self.made_in >= 0) & (waits >= 0)
        found = np.zeros((2, waits.shape[2]), np.int64)
        for kind, rank in np.ndindex(*found.shape):
            of_rank = waits[kind, is_counted[kind, :, rank], rank]
            if of_rank.size:
                found[kind, rank] = np.bincount(of_rank).argmax()
        return found

    def longest(self) -> SteadyPhase | None:
        """Finds the longest steady phase, the first of several."""
        begins, best = self._begins(), (0, 0)
        for stop in range(1, self.num_beats + 1):
            start = int(begins[stop])
            count = (stop - start) // self.period * self.period
            if count > best[1]:
                best = start, count
        start, count = best
        if not count:
            return None
        forward, backward = self.chunk[:, start : start + self.period]
        role_of = np.argsort(forward, axis=0)
        roles = np.take_along_axis(role_of, backward, axis=0)
        if (roles != roles[:, :1]).any():
            return None
        of_period = range(start, start + self.period)
        return SteadyPhase(
            first_tick=self.first_tick + TICKS_PER_BEAT * start,
            num_beats=count,
            backward=tuple(roles[:, 0].tolist()),
            x_pairs=tuple(self._pairs(0, beat) for beat in of_period),
            cotangent_pairs=tuple(self._pairs(1, beat) for beat in of_period),
            x_wait=self.wait[0],
            cotangent_wait=self.wait[1],
            role_of=role_of,
        )

    def _begins(self) -> np.ndarray:
        """Finds the first beat of the longest phase that ends before each: int64[num_beats + 1]."""
        # A phase that has beat b begins at `of_beat[b]` or later, one that ends before b at
        # `of_stop[b]` or later.
        of_beat = np.zeros(self.num_beats, np.int64)
        of_stop = np.zeros(self.num_beats + 1, np.int64)
        beats = np.arange(self.num_beats)
        for back in range(1, self.period + 1):
            # Chunks repeat after a period, those that are forward no sooner.
            same = self.chunk[:, back:] == self.chunk[:, : self.num_beats - back]
            wrong = ~same.all(axis=(0, 2)) if back == self.period else same[0].any(axis=1)
            late = beats[back:][wrong]
            of_beat[late] = np.maximum(of_beat[late], late - back + 1)
        wait = np.where(self.is_from_head, 0, self.wait[:, None])
        beat = np.broadcast_to(beats[None, :, None], self.made.shape)
        wrong = (self.made >= 0) & (self.made_in != beat - 1 - wait)
        made_in, read_in, waited = self.made_in[wrong], beat[wrong], wait[wrong]
        np.maximum.at(of_beat, read_in, np.maximum(read_in - waited, made_in + 1))
        return self._with_late_reads(of_beat, of_stop)

    def _with_late_reads(self, of_beat: np.ndarray, of_stop: np.ndarray) -> np.ndarray:
        """Adds that values are not read later than after their wait, unless the phase is over."""
        num_beats = self.num_beats
        kind, beat, rank = np.nonzero(self.consumer >= 0)
        consumer = self.consumer[kind, beat, rank]
        reader = self.timeline.program.units.rank[consumer]
        wait = np.where(self.travels[kind, beat, rank], self.wait[kind, reader], 0)
        due, read_in = beat + 1 + wait, self._beat_of(consumer)
        wrong = (read_in != due) & (due < num_beats)
        np.maximum.at(of_stop, due[wrong] + 1, beat[wrong] + 1)
        of_stop[1:] = np.maximum(of_stop[1:], of_beat)
        return np.maximum.accumulate(of_stop)

    def _pairs(self, kind: int, beat: int) -> Pairs:
        rank = self.timeline.program.units.rank
        sources = np.flatnonzero(self.travels[kind, beat])
        targets = rank[self.consumer[kind, beat, sources]]
        return tuple(sorted(zip(sources.tolist(), targets.tolist(), strict=True)))
