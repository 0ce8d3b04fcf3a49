"""Timeline -> its longest steady phase: beats that are the same straight-line code on all ranks.

A beat follows another if every rank runs the chunk backwards that it ran forwards, and the other
way round, and all that the beats send each other is read in the very next one. Then the roles of a
rank's two chunks, and who sends to whom, are the same in every second beat. Beats at the edges of
the aligned part, which read earlier values or make values that are read later, are left out.

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
>>> steady.num_beats, steady.x_pairs, steady.first_chunk.tolist()
(4, ((), ((0, 1), (1, 0))), [1, 0])
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
      first_tick, num_beats, x_pairs, cotangent_pairs: As in `tables.Steady`.
      first_chunk: int64[num_ranks], the chunk that each rank runs forward in even beats.
    """

    first_tick: int
    num_beats: int
    x_pairs: tuple[Pairs, Pairs]
    cotangent_pairs: tuple[Pairs, Pairs]
    first_chunk: np.ndarray

    @property
    def last_tick(self) -> int:
        """The first tick of the last beat."""
        return self.first_tick + TICKS_PER_BEAT * (self.num_beats - 1)

    @property
    def stop(self) -> int:
        """The tick after the steady phase."""
        return self.last_tick + TICKS_PER_BEAT


def find_steady(timeline: Timeline) -> SteadyPhase | None:
    """Finds the longest run; None where no two beats follow each other."""
    program = timeline.program
    if len(program.stage_of) != 2:
        return None
    units, payload = program.units, find_dependencies(program).payload
    chunk_of = program.chunk_of[program.direction_of[units.microbatch], units.stage]
    consumer = np.full(len(units), -1)
    reads = np.flatnonzero(payload >= 0)
    consumer[payload[reads]] = reads

    def actions(beat: int) -> np.ndarray:
        """Finds the F's of all ranks, then their I's: int64[2, num_ranks]."""
        return timeline.index[beat : beat + 2]

    def can_begin(beat: int) -> bool:
        made_at = timeline.tick_of[payload[actions(beat)]]
        return bool((made_at[payload[actions(beat)] >= 0] < beat).all())

    def follows(beat: int, after: int) -> bool:
        made, read = actions(beat), actions(after)
        if after - beat != TICKS_PER_BEAT or (chunk_of[made] != chunk_of[read][::-1]).any():
            return False
        sent, needed = consumer[made], payload[read]
        return set(sent[sent >= 0]) <= set(read.flat) and set(needed[needed >= 0]) <= set(made.flat)

    def travel(made: np.ndarray) -> Pairs:
        made = made[consumer[made] >= 0]
        # The cotangent that the head gives, which an I reads from an F, does not travel.
        made = made[units.opcode[made] == units.opcode[consumer[made]]]
        ranks = zip(units.rank[made].tolist(), units.rank[consumer[made]].tolist(), strict=True)
        return tuple(sorted(ranks))

    longest: list[int] = []
    run: list[int] = []
    for beat in timeline.beats.tolist():
        run = [*run, beat] if run and follows(run[-1], beat) else [beat] * can_begin(beat)
        longest = max(longest, run[: len(run) // 2 * 2], key=len)
    if not longest:
        return None
    even, odd = (actions(beat) for beat in longest[:2])
    return SteadyPhase(
        first_tick=longest[0],
        num_beats=len(longest),
        x_pairs=(travel(even[0]), travel(odd[0])),
        cotangent_pairs=(travel(even[1]), travel(odd[1])),
        first_chunk=chunk_of[even[0]],
    )
