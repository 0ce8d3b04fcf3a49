"""Aligned Timeline -> Timeline: gives back the ticks that aligning cost outside the run of beats.

Only the run is straight-line code, and so only its pairs need to be aligned: what comes after it
runs as soon as it can. So DualPipe has its run in 3N + P/2 - 1 ticks, no more than the shortest
timetable takes, P/2 - 1 fewer than with all pairs aligned (F = I = W = 1, even sizes, N >= 2P).
What a longer run could gain is little: it has N - 2P beats at least, and none has more than
N - 2P + 2, since what is on its way at its ends takes 3P/2 - 1 forwards of a rank before it and
P/2 - 1 after it.

Rank 0 of four, with eight microbatches, from the end of the run in tick 14 on. Aligned, it waits a
tick for the turn of its next pair, F7 with I1:

>>> from dualpipe_jax._schedule.align import align
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> from dualpipe_jax._schedule.steady import find_run
>>> aligned = align(place_shortest(GENERATORS["dualpipe"](num_ranks=4, num_microbatches=8)))
>>> run = find_run(aligned)
>>> released = release(aligned, run)
>>> run.first_tick, run.num_beats, aligned.num_ticks, released.num_ticks
(8, 2, 26, 25)
>>> for timeline in aligned, released:
...     print(*(row[0][1:] if row[0] else ".." for row in timeline.actions[14:]))
I6 W6 .. F7 I1 W1 I7 W7 I2 W2 I3 W3
I6 W6 F7 I1 W1 I7 W7 I2 W2 I3 W3
"""

import numpy as np

from dualpipe_jax._schedule.dependencies import build_timeline, find_dependencies, run_in_order
from dualpipe_jax._schedule.ir import Program, Timeline
from dualpipe_jax._schedule.steady import Run


def release(timeline: Timeline, run: Run | None, program: Program | None = None) -> Timeline:
    """Runs what comes after the run as soon as it can; all of it, if there is no run.

    Args:
        timeline: An aligned timeline.
        run: Its run of beats, up to whose end ticks are kept.
        program: The timeline's program with refined opcodes; None to leave them as they are.
    """
    program = timeline.program if program is None else program
    is_kept = timeline.tick_of < (0 if run is None else run.stop)
    tick_of = run_in_order(
        program, find_dependencies(program), earliest=np.where(is_kept, timeline.tick_of, 0)
    )
    return build_timeline(program, tick_of, timetable=timeline.timetable)
