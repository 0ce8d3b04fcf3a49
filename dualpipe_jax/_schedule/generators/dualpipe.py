"""DualPipe (DeepSeek-V3, arXiv:2412.19437; github.com/deepseek-ai/DualPipe, `step()`).

Microbatches enter at both ends, so that nearly always a rank has a forward of one direction and a
backward of the other at hand, and runs them as a pair.
"""

from dualpipe_jax._schedule.generators.dualpipe_phases import published_row
from dualpipe_jax._schedule.generators.list_schedule import list_schedule
from dualpipe_jax._schedule.generators.sizes import (
    both_directions,
    check_sizes,
    split_microbatches,
)
from dualpipe_jax._schedule.ir import Program, Row


def dualpipe(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes DualPipe (arXiv:2412.19437): microbatches enter at both ends.

    For even sizes and `num_microbatches` at least `2 * num_ranks` the published order; for other
    sizes one made by the same rules (`list_schedule`).

    >>> print(dualpipe(num_ranks=2, num_microbatches=4).to_csv(), end="")
    0F0,1F2,0F1,1B2,(1F3;0B0)OVERLAP_F_B,1B3,0I1,0W1
    0F2,1F0,0F3,1B0,(1F1;0B2)OVERLAP_F_B,1B1,0I3,0W3

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    if num_ranks % 2 == num_microbatches % 2 == 0 and num_microbatches >= 2 * num_ranks:
        rows = tuple(_published_row(r, num_ranks, num_microbatches) for r in range(num_ranks))
    else:
        rows = _unpublished_rows(num_ranks, num_microbatches)
    return Program("dualpipe", num_ranks, num_ranks, num_microbatches, rows)


def _unpublished_rows(num_ranks: int, num_microbatches: int) -> tuple[Row, ...]:
    routes, microbatches = both_directions(num_ranks, num_microbatches)
    return list_schedule(
        num_ranks=num_ranks,
        routes=routes,
        microbatches=microbatches,
        # Together at most P + 1 on a rank, and half as many weight grads, as in the published one.
        limits=[range(num_ranks, 0, -1)] * len(routes),
        max_deferred=(num_ranks + 1) // 2,
    )


def _published_row(rank: int, num_ranks: int, num_microbatches: int) -> Row:
    mirror = num_ranks - 1 - rank
    directions = list(zip((rank, mirror), split_microbatches(num_microbatches), strict=True))
    return published_row(
        directions if rank < mirror else directions[::-1],
        h=min(rank, mirror),
        half=num_ranks // 2,
        num_microbatches=num_microbatches // 2,
    )
