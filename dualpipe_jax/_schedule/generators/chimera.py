"""Chimera (Li & Hoefler 2021, arXiv:2107.06925): two 1F1B pipelines in opposite directions.

A basic unit is P microbatches, half of them down the ranks and half up; at F = B = 1 the two meet
in no tick, and idle P - 2. Larger steps concatenate units, the next one's forwards filling the
bubbles at the end of the one before (section 3.5, direct concatenation, no forward doubling).
"""

from dualpipe_jax._schedule.generators.list_schedule import list_schedule
from dualpipe_jax._schedule.generators.sizes import (
    both_directions,
    check_sizes,
    split_microbatches,
)
from dualpipe_jax._schedule.ir import Action, Program, Row


def chimera(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes Chimera (arXiv:2107.06925): two 1F1B pipelines in opposite directions.

    For an even `num_ranks` and a multiple of it of microbatches the published order; for other
    sizes one made by simulation (`list_schedule`).

    >>> print(chimera(num_ranks=2, num_microbatches=4).to_csv(), end="")
    0F0,1F2,1B2,0B0,0F1,1F3,1B3,0B1
    0F2,1F0,1B0,0B2,0F3,1F1,1B1,0B3

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    if num_ranks % 2 == 0 and num_microbatches % num_ranks == 0:
        rows = tuple(_published_row(r, num_ranks, num_microbatches) for r in range(num_ranks))
    else:
        rows = _unpublished_rows(num_ranks, num_microbatches)
    return Program("chimera", num_ranks, num_ranks, num_microbatches, rows)


def _published_row(rank: int, num_ranks: int, num_microbatches: int) -> Row:
    """Sorts a rank's actions by their ticks in the published picture, where F and B take one."""
    stages = rank, num_ranks - 1 - rank
    tick_of = {}
    for stage, microbatches in zip(stages, split_microbatches(num_microbatches), strict=True):
        for i, microbatch in enumerate(microbatches):
            unit, place = divmod(i, num_ranks // 2)
            # Every second tick a microbatch enters, down or up; all P of a unit take 2P ticks.
            enters = 2 * num_ranks * unit + 2 * place
            tick_of[Action("F", stage, microbatch)] = enters + stage
            tick_of[Action("B", stage, microbatch)] = enters + 2 * num_ranks - 1 - stage
    return tuple(sorted(tick_of, key=tick_of.__getitem__))


def _unpublished_rows(num_ranks: int, num_microbatches: int) -> tuple[Row, ...]:
    routes, microbatches = both_directions(num_ranks, num_microbatches)
    return list_schedule(
        num_ranks=num_ranks,
        routes=routes,
        microbatches=microbatches,
        # As in 1F1B for each direction: one more than the published order holds, P + 1 a rank.
        limits=[range(num_ranks, 0, -1)] * len(routes),
        max_deferred=1,
        pairs=False,
    )
