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

from dualpipe_jax._schedule.actions import DEFERRED, FORWARD, IDLE, opcodes_with
from dualpipe_jax._schedule.find_steady import SteadyPhase
from dualpipe_jax._schedule.ir import Allocation, LiveRanges, Timeline
from dualpipe_jax._schedule.tables import Steady, Tables


def emit(timeline: Timeline, allocation: Allocation, steady: SteadyPhase | None = None) -> Tables:
    """Emits the tables of an allocated timeline, its steady phase among them.

    With a steady phase, each rank's chunks are numbered by their roles in it: chunk 0 runs forward
    in even beats.
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
        chunk = chunk ^ steady.first_chunk[units.rank]
        stage_of = np.where(steady.first_chunk, stage_of[::-1], stage_of)
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
        acts = np.flatnonzero(np.isin(units.opcode, opcodes_with(name)))
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
    """Finds the slots of the values that the steady phase's last beat sends."""
    units, tick_of = timeline.program.units, timeline.tick_of
    live, slot = allocation.live_ranges["received"], allocation.slot_of["received"]
    of_x, of_cotangent = (np.full(timeline.num_ranks, -1, np.int32) for _ in range(2))
    is_last = (tick_of[live.producer] == steady.last_tick) | (
        tick_of[live.producer] == steady.last_tick + 1
    )
    is_x = units.opcode[live.consumer] == FORWARD
    of_x[live.rank[is_last & is_x]] = slot[is_last & is_x]
    of_cotangent[live.rank[is_last & ~is_x]] = slot[is_last & ~is_x]
    idle = [
        name
        for name in ("stash", DEFERRED)
        if name in allocation.live_ranges and _is_idle(allocation.live_ranges[name], steady)
    ]
    return Steady(
        first_tick=steady.first_tick,
        num_beats=steady.num_beats,
        x_pairs=steady.x_pairs,
        cotangent_pairs=steady.cotangent_pairs,
        x_slot=of_x,
        cotangent_slot=of_cotangent,
        idle=tuple(idle),
    )


def _is_idle(live: LiveRanges, steady: SteadyPhase) -> bool:
    """Whether no value lives both in the steady phase and outside of it."""
    edges = steady.first_tick, steady.stop
    return not any(((live.start < edge) & (live.end >= edge)).any() for edge in edges)
