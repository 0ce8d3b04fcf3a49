"""Interleaved 1F1B (Narayanan et al. 2021, Megatron-LM, arXiv:2104.04473, section 2.2).

A microbatch goes round the ring of ranks v times, through v * P stages of a v-th of the size: the
ramps take as many ticks as those of 1F1B, but ticks that are v times as short.
"""

from itertools import pairwise

from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Action, Program, Row


def interleaved_one_f_one_b(
    *, num_ranks: int, num_microbatches: int, num_stages_per_rank: int = 2
) -> Program:
    """Makes interleaved 1F1B (arXiv:2104.04473): microbatches go round the ranks several times.

    1F1B's idle time divided by `num_stages_per_rank`, for as many times the transfers and for more
    live activations. `make("interleaved-1f1b", ...)` is the one with 2.

    Rank r holds the stages r, P + r, 2P + r and so on. The microbatches go in groups of P, each
    through all stages of a rank in turn. Published for multiples of P only; others make groups of
    more than P, as equal as can be, larger ones first (Megatron-LM's microbatch groups), and fewer
    than P make one group.

    >>> print(interleaved_one_f_one_b(num_ranks=2, num_microbatches=2).to_csv(), end="")
    0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
    1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1

    Raises:
        ValueError: if a size is not a positive integer.
    """
    num_ranks, num_microbatches, num_stages_per_rank = check_sizes(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_stages_per_rank=num_stages_per_rank,
    )
    groups = _split_groups(num_ranks, num_microbatches)
    rows = tuple(_row(rank, num_ranks, groups, num_stages_per_rank) for rank in range(num_ranks))
    num_stages = num_ranks * num_stages_per_rank
    return Program("interleaved-1f1b", num_ranks, num_stages, num_microbatches, rows)


def _split_groups(num_ranks: int, num_microbatches: int) -> list[range]:
    num_groups = max(1, num_microbatches // num_ranks)
    size, num_larger = divmod(num_microbatches, num_groups)
    starts = [i * size + min(i, num_larger) for i in range(num_groups + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _row(rank: int, num_ranks: int, groups: list[range], num_stages_per_rank: int) -> Row:
    stages = range(rank, num_ranks * num_stages_per_rank, num_ranks)
    forwards = [Action("F", stage, m) for group in groups for stage in stages for m in group]
    backwards = [Action("B", stage, m) for group in groups for stage in stages[::-1] for m in group]
    # A forward of the last stage comes when the first group has been through all the others; each
    # rank below takes two ticks, there and back.
    num_ahead = (num_stages_per_rank - 1) * len(groups[0]) + 2 * (num_ranks - rank - 1)
    if num_stages_per_rank == 1:  # plain 1F1B, which waits for the way back
        num_ahead = num_ranks - rank - 1
    num_ahead = min(num_ahead, len(forwards))

    # Warm-up: F
    row = forwards[:num_ahead]
    # Steady state: F B
    num_pairs = len(forwards) - num_ahead
    for forward, backward in zip(forwards[num_ahead:], backwards[:num_pairs], strict=True):
        row += [forward, backward]
    # Cool-down: B
    return tuple(row + backwards[num_pairs:])
