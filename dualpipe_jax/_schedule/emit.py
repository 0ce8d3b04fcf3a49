"""Timeline and Allocation -> Tables: writes down, per tick and rank, what an executor does.

Two ranks, one microbatch. Rank 1 stores x on arrival, keeps the head's cotangent, and rank 0
stores what comes back from its right:

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

import numpy as np

from dualpipe_jax._schedule.dependencies import find_dependencies
from dualpipe_jax._schedule.ir import Allocation, Tables, Timeline


def emit(timeline: Timeline, allocation: Allocation) -> Tables:
    """Emits the tables of an allocated timeline."""
    program = timeline.program
    units, tick_of, num_ranks = program.units, timeline.tick_of, program.num_ranks
    direction = program.direction_of[units.microbatch]
    columns = {name: np.full(timeline.index.shape, -1, np.int32) for name in Tables.columns()}
    here = tick_of, units.rank
    columns["opcode"][:] = timeline.opcode
    columns["chunk"][here] = program.chunk_of[direction, units.stage]
    columns["stage"][here] = units.stage
    columns["microbatch"][here] = units.microbatch

    live, slot = allocation.live_ranges["received"], allocation.slot_of["received"]
    sender = units.rank[live.producer]
    columns["read"][live.end, live.rank] = slot
    kept = sender == live.rank
    columns["keep"][live.start[kept] - 1, live.rank[kept]] = slot[kept]
    # Between two ranks both ways round the ring are one; they talk without wrapping.
    from_left = sender == live.rank - 1
    from_right = sender == live.rank + 1
    wraps = ~(kept | from_left | from_right)
    from_left |= wraps & (live.rank == 0)
    from_right |= wraps & (live.rank == num_ranks - 1)
    for name, arrives in (("from_left", from_left), ("from_right", from_right)):
        columns[name][live.start[arrives], live.rank[arrives]] = slot[arrives]

    for name, slot in allocation.slot_of.items():
        if name == "received":
            continue
        live = allocation.live_ranges[name]
        columns[name][live.start, live.rank] = slot
        columns[name][live.end, live.rank] = slot
    # I reads what F saved for W too: a value that both need is stored only once.
    live, slot = allocation.live_ranges["weight_residual"], allocation.slot_of["weight_residual"]
    input_grads = find_dependencies(program).own[live.consumer]
    columns["weight_residual"][tick_of[input_grads], live.rank] = slot

    return Tables(
        **columns,
        num_ranks=num_ranks,
        num_stages=program.num_stages,
        num_microbatches=program.num_microbatches,
        num_chunks=len(program.stage_of),
        stage_of=program.stage_of,
        num_slots=allocation.num_slots,
        forward_only=program.forward_only,
        wraps=bool(wraps.any()),
    )
