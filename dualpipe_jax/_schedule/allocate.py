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

import numpy as np

from dualpipe_jax._schedule.dependencies import find_live_ranges
from dualpipe_jax._schedule.ir import Allocation, LiveRanges, Timeline


def allocate(timeline: Timeline) -> Allocation:
    """Allocates a slot to every value of a timeline."""
    live_ranges = find_live_ranges(timeline.program, timeline.tick_of, timeline.sent_in)
    slot_of = {
        buffer: _lowest_free_slots(
            live,
            num_slots=timeline.num_slots[buffer],
            num_ranks=timeline.num_ranks,
            num_ticks=timeline.num_ticks,
        )
        for buffer, live in live_ranges.items()
    }
    num_slots = {buffer: int(slots.max(initial=-1)) + 1 for buffer, slots in slot_of.items()}
    return Allocation(live_ranges, slot_of, num_slots)


def _lowest_free_slots(
    live: LiveRanges, *, num_slots: int, num_ranks: int, num_ticks: int
) -> np.ndarray:
    """Walks the ticks, all ranks at once: first ends free their slots, then starts take some."""
    slot_of = np.empty(len(live.rank), np.int64)
    # Up to three values start on a rank in one tick (from left, from right, kept). Each goes into
    # a wave of its own, so that a rank occurs once a wave and indexing by rank is safe.
    by_start = np.lexsort((live.rank, live.start))
    rank_tick = live.start[by_start] * num_ranks + live.rank[by_start]
    wave = np.arange(len(by_start)) - np.searchsorted(rank_tick, rank_tick)
    waves = [by_start[wave == w] for w in range(wave.max(initial=-1) + 1)]
    by_end = np.argsort(live.end, kind="stable")

    ticks = np.arange(num_ticks + 1)
    first_ending = np.searchsorted(live.end[by_end], ticks)
    first_starting = [np.searchsorted(live.start[order], ticks) for order in waves]
    free = np.ones((num_ranks, num_slots), bool)
    for tick in range(num_ticks):
        if tick:
            ended = by_end[first_ending[tick - 1] : first_ending[tick]]
            free[live.rank[ended], slot_of[ended]] = True
        for order, first in zip(waves, first_starting, strict=True):
            started = order[first[tick] : first[tick + 1]]
            rank = live.rank[started]
            slot_of[started] = slot = free[rank].argmax(axis=1)
            free[rank, slot] = False
    return slot_of
