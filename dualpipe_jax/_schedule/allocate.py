"""Timeline -> Allocation: gives each value the lowest slot that is free while it lives.

Live ranges are intervals, so the lowest free slot in order of start never takes more slots than
there are values alive at once: register allocation of straight-line code. The directions share
one pool of slots per buffer and rank.

Two ranks, two microbatches of 1f1b. Rank 0 holds two activations at once, rank 1 one at a time:

>>> from dualpipe_jax._schedule.generators import GENERATORS
>>> from dualpipe_jax._schedule.place import place_shortest
>>> timeline = place_shortest(GENERATORS["1f1b"](num_ranks=2, num_microbatches=2))
>>> allocation = allocate(timeline)
>>> live, slot_of = allocation.live_ranges["residual"], allocation.slot_of["residual"]
>>> for rank, start, end, slot in zip(live.rank, live.start, live.end, slot_of, strict=True):
...     print(f"rank {rank}, ticks {start}-{end}: slot {slot}")
rank 0, ticks 0-3: slot 0
rank 0, ticks 1-6: slot 1
rank 1, ticks 1-2: slot 0
rank 1, ticks 4-5: slot 0
"""

from heapq import heappop, heappush

import numpy as np

from dualpipe_jax._schedule.dependencies import find_live_ranges
from dualpipe_jax._schedule.ir import Allocation, LiveRanges, Timeline


def allocate(timeline: Timeline, other: Allocation | None = None) -> Allocation:
    """Allocates a slot to every value of a timeline.

    Args:
        timeline: The timeline.
        other: The allocation of the same program in other ticks. Values that stay on their rank
            have the same slots there, as the order of its actions is the same.
    """
    live_ranges = find_live_ranges(timeline.program, timeline.tick_of, timeline.sent_in)
    slot_of = {
        buffer: other.slot_of[buffer]
        if other is not None and buffer != "received"
        else _lowest_free_slots(live, num_ranks=timeline.num_ranks)
        for buffer, live in live_ranges.items()
    }
    num_slots = {buffer: int(slots.max(initial=-1)) + 1 for buffer, slots in slot_of.items()}
    return Allocation(live_ranges, slot_of, num_slots)


def _lowest_free_slots(live: LiveRanges, *, num_ranks: int) -> np.ndarray:
    """Gives the values of each rank their slots in the order in which they start."""
    slot_of = np.empty(len(live.rank), np.int64)
    in_use: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]  # (end, slot)
    free: list[list[int]] = [[] for _ in range(num_ranks)]
    num_slots = [0] * num_ranks
    ranks, starts, ends = live.rank.tolist(), live.start.tolist(), live.end.tolist()
    for value in np.argsort(live.start, kind="stable").tolist():
        rank, start = ranks[value], starts[value]
        of_rank, freed = in_use[rank], free[rank]
        while of_rank and of_rank[0][0] < start:
            heappush(freed, heappop(of_rank)[1])
        if not freed:
            freed.append(num_slots[rank])
            num_slots[rank] += 1
        slot_of[value] = slot = heappop(freed)
        heappush(of_rank, (ends[value], slot))
    return slot_of
