"""DualPipeV (DeepSeek; github.com/deepseek-ai/DualPipe, `dualpipev.py`, `step()`).

DualPipe cut in half: every microbatch enters at rank 0, goes down the ranks and comes up again
through twice as many stages of half the size, so that one copy of the parameters is enough. Rank r
holds stages r (near) and 2P-1-r (far); the last rank is where a microbatch turns.
"""

from dualpipe_jax._schedule.generators.dualpipe_phases import published_row
from dualpipe_jax._schedule.generators.list_schedule import list_schedule
from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Program


def dualpipev(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes DualPipeV (github.com/deepseek-ai/DualPipe): down the ranks and up again.

    The published order from `2 * num_ranks` microbatches on; fewer are ordered by the same rules
    (`list_schedule`).

    >>> for row in dualpipev(num_ranks=2, num_microbatches=4).to_csv().splitlines():
    ...     print(*row.split(","))
    0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1)OVERLAP_F_B (3F2;0B0)OVERLAP_F_B 3B2
        (3F3;0B1)OVERLAP_F_B 3B3 0I2 0W2 0I3 0W3
    1F0 2F0 1F1 2F1 1F2 2B0 (2F2;1B0)OVERLAP_F_B (1F3;2B1)OVERLAP_F_B (2F3;1B1)OVERLAP_F_B
        2B2 1B2 2I3 1I3 2W3 1W3

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    num_stages = 2 * num_ranks
    microbatches = range(num_microbatches)
    if num_microbatches >= 2 * num_ranks:
        rows = tuple(
            published_row(
                [(rank, microbatches), (num_stages - 1 - rank, microbatches)],
                h=rank,
                half=num_ranks,
                num_microbatches=num_microbatches,
            )
            for rank in range(num_ranks)
        )
    else:
        rows = list_schedule(
            num_ranks=num_ranks,
            routes=[[*range(num_ranks), *reversed(range(num_ranks))]],
            microbatches=[microbatches],
            # Together at most 2P + 1 on a rank, and half as many weight grads, as published.
            limits=[range(num_stages, 0, -1)],
            max_deferred=num_ranks,
        )
    return Program("dualpipev", num_ranks, num_stages, num_microbatches, rows)
