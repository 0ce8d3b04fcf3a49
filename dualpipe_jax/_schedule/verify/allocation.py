"""Verifies an Allocation before tables are emitted from it."""

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.excerpt import show_timeline
from dualpipe_jax._schedule.ir import Allocation, LiveRanges, Timeline


def verify_allocation(timeline: Timeline, allocation: Allocation) -> None:
    """Checks that no value is overwritten and no slot wasted.

    - Every value has a slot among those that its buffer has.
    - Two values of one slot never live in the same tick.
    - Each rank uses as many slots of a buffer as values of it live at once; the buffer has as many
      as the fullest rank uses.

    Raises:
        ScheduleError: naming action, rank and tick, and showing the ticks around.
    """
    for buffer, live in allocation.live_ranges.items():
        slot_of = allocation.slot_of[buffer]
        num_slots = allocation.num_slots[buffer]
        _check_overlaps(timeline, buffer, live, slot_of)
        peak = _count_peaks(live, timeline.num_ticks, timeline.num_ranks)
        used = np.zeros(timeline.num_ranks, np.int64)
        np.maximum.at(used, live.rank, slot_of + 1)
        if slot_of.min(initial=0) < 0 or (used != peak).any() or used.max() != num_slots:
            raise ScheduleError(
                f"schedule {timeline.program.name!r}: the {num_slots} {buffer} slots must be as "
                f"many as live at once; the ranks use {used.tolist()}, alive are {peak.tolist()}"
            )


def _check_overlaps(timeline: Timeline, buffer: str, live: LiveRanges, slot_of: np.ndarray) -> None:
    order = np.lexsort((live.start, slot_of, live.rank))
    rank, slot = live.rank[order], slot_of[order]
    same_slot = (rank[1:] == rank[:-1]) & (slot[1:] == slot[:-1])
    overlaps = same_slot & (live.start[order][1:] <= live.end[order][:-1])
    for i in np.flatnonzero(overlaps).tolist():
        first, second = order[i], order[i + 1]
        name, tick = timeline.program.units.name, int(live.start[second])
        excerpt = show_timeline(timeline, tick=tick, rank=int(rank[i]))
        raise ScheduleError(
            f"schedule {timeline.program.name!r}: {buffer} slot {slot[i]} of rank {rank[i]} gets a "
            f"value of {name(live.producer[second])} in tick {tick}, while that of "
            f"{name(live.producer[first])} lives until tick {live.end[first]}{excerpt}"
        )


def _count_peaks(live: LiveRanges, num_ticks: int, num_ranks: int) -> np.ndarray:
    """Counts the most values alive in one tick, for each rank."""
    change = np.zeros((num_ticks + 1, num_ranks), np.int64)
    np.add.at(change, (live.start, live.rank), 1)
    np.add.at(change, (live.end + 1, live.rank), -1)
    return change.cumsum(axis=0).max(axis=0)
