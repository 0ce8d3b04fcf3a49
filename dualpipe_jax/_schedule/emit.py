"""Timeline and Allocation -> Tables: writes down the action of each tick and rank, and its slots.

Two ranks, one microbatch. Rank 1 stores x on arrival, keeps the head's cotangent, and rank 0
stores the cotangent that comes back from its right:

>>> from dualpipe_jax._schedule.allocate import allocate
>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> timeline = place_shortest(GENERATORS["1f1b"](num_ranks=2, num_microbatches=1))
>>> tables = emit(timeline, allocate(timeline))
>>> for column in ("opcode", "from_left", "from_right", "read", "keep"):
...     print(f"{column:10}", *(f"{row}" for row in getattr(tables, column).T.tolist()))
opcode     [1, 0, 0, 2, 3] [0, 1, 2, 3, 0]
from_left  [-1, -1, -1, -1, -1] [-1, 0, -1, -1, -1]
from_right [-1, -1, -1, 0, -1] [-1, -1, -1, -1, -1]
read       [-1, -1, -1, 0, -1] [-1, 0, 0, -1, -1]
keep       [-1, -1, -1, -1, -1] [-1, 0, -1, -1, -1]
"""

from typing import Any

import numpy as np

from dualpipe_jax._schedule.actions import DEFERRED, FORWARD, IDLE, is_one_of, opcodes_with
from dualpipe_jax._schedule.find_steady import SteadyPhase
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT, Allocation, LiveRanges, Timeline
from dualpipe_jax._schedule.tables import Steady, Tables


def emit(timeline: Timeline, allocation: Allocation, steady: SteadyPhase | None = None) -> Tables:
    """Emits the tables of an allocated timeline, its steady phase among them.

    With a steady phase, each rank's chunks are numbered by their roles in it: chunk 0 runs forward
    in the first beat of a period.
    """
    program = timeline.program
    units, tick_of, num_ranks = program.units, timeline.tick_of, program.num_ranks
    direction = program.direction_of[units.microbatch]
    columns: dict[str, Any] = {
        name: np.full(timeline.index.shape, -1, np.int32) for name in Tables.columns()
    }
    here = tick_of, units.rank
    columns["opcode"][:] = timeline.grid(units.opcode, idle=IDLE)
    chunk, stage_of = program.chunk_of[direction, units.stage], program.stage_of
    if steady is not None:
        chunk = steady.role_of[chunk, units.rank]
        stage_of = np.take_along_axis(stage_of, np.argsort(steady.role_of, axis=0), axis=0)
    columns["chunk"][here] = chunk
    columns["stage"][here] = units.stage
    columns["microbatch"][here] = units.microbatch

    live, slot = allocation.live_ranges["received"], allocation.slot_of["received"]
    sender = units.rank[live.producer]
    # A value is where it is read, or, until after it is sent, where it was made.
    is_read = units.rank[live.consumer] == live.rank
    columns["read"][live.end[is_read], live.rank[is_read]] = slot[is_read]
    columns["send"][live.end[~is_read] - 1, live.rank[~is_read]] = slot[~is_read]
    kept = sender == live.rank
    columns["keep"][live.start[kept] - 1, live.rank[kept]] = slot[kept]
    # Two ranks alone are neighbours on both sides; they send without wrapping.
    from_left = sender == live.rank - 1
    from_right = sender == live.rank + 1
    wraps = ~(kept | from_left | from_right)
    from_left |= wraps & (live.rank == 0)
    from_right |= wraps & (live.rank == num_ranks - 1)
    for name, arrives in (("from_left", from_left), ("from_right", from_right)):
        columns[name][live.start[arrives], live.rank[arrives]] = slot[arrives]

    # An action names a slot of each buffer in which it reads, writes or frees a value.
    for name, slot in allocation.slot_of.items():
        if name == "received":
            continue
        consumer = allocation.live_ranges[name].consumer
        slots = np.full((program.num_stages, program.num_microbatches), -1)
        slots[units.stage[consumer], units.microbatch[consumer]] = slot
        acts = np.flatnonzero(is_one_of(units.opcode, opcodes_with(name)))
        of_acts = slots[units.stage[acts], units.microbatch[acts]]
        columns[name][tick_of[acts], units.rank[acts]] = of_acts

    return Tables(
        **columns,
        num_ranks=num_ranks,
        num_stages=program.num_stages,
        num_microbatches=program.num_microbatches,
        num_chunks=len(stage_of),
        stage_of=stage_of,
        num_slots=allocation.num_slots,
        forward_only=program.forward_only,
        wraps=bool(wraps.any()),
        is_lazy=timeline.lag > 1,
        steady=None if steady is None else _steady(timeline, allocation, steady),
    )


def _steady(timeline: Timeline, allocation: Allocation, steady: SteadyPhase) -> Steady:
    """Finds the slots of the values that are on their way, or wait, after the last beat."""
    units, tick_of = timeline.program.units, timeline.tick_of
    live, slot = allocation.live_ranges["received"], allocation.slot_of["received"]
    made_in = (tick_of[live.producer] - steady.first_tick) // TICKS_PER_BEAT
    is_upcoming = (made_in >= 0) & (made_in < steady.num_beats)
    is_upcoming &= tick_of[live.consumer] >= steady.stop
    is_x = units.opcode[live.consumer] == FORWARD
    from_head = ~is_x & (units.opcode[live.producer] == FORWARD)

    def slots(mask: np.ndarray, wait: np.ndarray) -> np.ndarray:
        found = np.full((1 + wait.max(), timeline.num_ranks), -1, np.int32)
        here = np.flatnonzero(mask & is_upcoming)
        rank = live.rank[here]
        waits = np.where(from_head[here], 0, wait[rank])
        found[waits - (steady.num_beats - 1 - made_in[here]), rank] = slot[here]
        return found

    idle = [
        name
        for name in ("stash", DEFERRED)
        if name in allocation.live_ranges and _is_idle(allocation.live_ranges[name], steady)
    ]
    return Steady(
        first_tick=steady.first_tick,
        num_beats=steady.num_beats,
        backward=steady.backward,
        x_pairs=steady.x_pairs,
        cotangent_pairs=steady.cotangent_pairs,
        x_wait=steady.x_wait.astype(np.int32),
        cotangent_wait=steady.cotangent_wait.astype(np.int32),
        x_slot=slots(is_x, steady.x_wait),
        cotangent_slot=slots(~is_x, steady.cotangent_wait),
        idle=tuple(idle),
    )


def _is_idle(live: LiveRanges, steady: SteadyPhase) -> bool:
    """Whether no value lives both in the steady phase and outside of it."""
    edges = steady.first_tick, steady.stop
    return not any(((live.start < edge) & (live.end >= edge)).any() for edge in edges)
