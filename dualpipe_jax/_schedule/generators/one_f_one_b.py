"""1F1B (Narayanan et al. 2019, PipeDream; 2021, Megatron-LM, arXiv:2104.04473).

Rank r runs P - r - 1 forwards ahead, then a forward and a backward in turn: as many activations
live at once as there are ranks below, however many microbatches there are.
"""

from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Action, Program, Row


def one_f_one_b(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes 1F1B (arXiv:2104.04473): a forward and a backward in turn.

    >>> print(one_f_one_b(num_ranks=2, num_microbatches=3).to_csv(), end="")
    0F0,0F1,0B0,0F2,0B1,0B2
    1F0,1B0,1F1,1B1,1F2,1B2

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("1f1b", num_ranks, num_ranks, num_microbatches, rows)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> Row:
    num_ahead = min(num_ranks - rank - 1, num_microbatches)
    forwards = [Action("F", rank, m) for m in range(num_microbatches)]
    backwards = [Action("B", rank, m) for m in range(num_microbatches)]
    row = forwards[:num_ahead]
    num_pairs = num_microbatches - num_ahead
    for forward, backward in zip(forwards[num_ahead:], backwards[:num_pairs], strict=True):
        row += [forward, backward]
    return tuple(row + backwards[num_pairs:])
