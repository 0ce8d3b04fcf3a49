"""GPipe (Huang et al. 2019, arXiv:1811.06965): all forwards, then all backwards."""

from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Action, Program


def gpipe(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes GPipe (arXiv:1811.06965): all forwards, then all backwards.

    The activations of every microbatch are alive at once.

    >>> print(gpipe(num_ranks=2, num_microbatches=2).to_csv(), end="")
    0F0,0F1,0B0,0B1
    1F0,1F1,1B0,1B1

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    rows = tuple(
        tuple(Action(kind, rank, m) for kind in "FB" for m in range(num_microbatches))
        for rank in range(num_ranks)
    )
    return Program("gpipe", num_ranks, num_ranks, num_microbatches, rows)
