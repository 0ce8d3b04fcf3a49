"""Aligned Timeline -> Timeline: takes back the ticks that aligning cost outside the steady phase.

Only the steady phase is straight-line code, and so only its pairs need to be aligned: actions after
it run as soon as they can. DualPipe then takes 3N + P/2 - 1 ticks, no more than the shortest
timetable, and P/2 - 1 fewer than with all pairs aligned (F = I = W = 1, even sizes, N >= 2P). A
longer steady phase could gain little: it has N - 2P beats at least, and none has more than
N - 2P + 2, since the values on their way at its ends take 3P/2 - 1 forwards of a rank before it and
P/2 - 1 after it.

Rank 0 of four, with eight microbatches, from the end of the steady phase in tick 14 on. Aligned, it
waits a tick for the turn of its next pair, F7 with I1:

>>> from dualpipe_jax._schedule.align import align
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> from dualpipe_jax._schedule.find_steady import find_steady
>>> aligned = align(place_shortest(GENERATORS["dualpipe"](num_ranks=4, num_microbatches=8)))
>>> steady = find_steady(aligned)
>>> released = release(aligned, steady)
>>> steady.first_tick, steady.num_beats, aligned.num_ticks, released.num_ticks
(8, 2, 26, 25)
>>> for timeline in aligned, released:
...     print(*(row[0][1:] if row[0] else ".." for row in timeline.actions[14:]))
I6 W6 .. F7 I1 W1 I7 W7 I2 W2 I3 W3
I6 W6 F7 I1 W1 I7 W7 I2 W2 I3 W3
"""

import numpy as np

from dualpipe_jax._schedule.dependencies import build_timeline, find_dependencies, run_in_order
from dualpipe_jax._schedule.find_steady import SteadyPhase
from dualpipe_jax._schedule.ir import Program, Timeline


def release(
    timeline: Timeline, steady: SteadyPhase | None, program: Program | None = None
) -> Timeline:
    """Runs all actions after the steady phase as soon as they can; without one, all of them.

    Args:
        timeline: An aligned timeline.
        steady: Its steady phase; ticks up to its end are kept.
        program: The timeline's program with refined opcodes; None to leave them as they are.
    """
    program = timeline.program if program is None else program
    is_kept = timeline.tick_of < (0 if steady is None else steady.stop)
    tick_of = run_in_order(
        program, find_dependencies(program), earliest=np.where(is_kept, timeline.tick_of, 0)
    )
    return build_timeline(program, tick_of, timetable=timeline.timetable)
