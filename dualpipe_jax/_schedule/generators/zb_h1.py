"""ZB-H1 (Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2.3).

1F1B with the backward split: rank r puts off r weight grads and runs them at the end, where 1F1B
idles. Rank r's P-r activations of 1F1B and these r are P together, on every rank.

Weight grads take as long, whichever microbatch's they are. So it is the first r that wait, to the
end, and every later one follows its input grad at once, where a queue would put all of them off by
r. Ticks and slots are the same; what recomputes does so for r microbatches and not for all, and
what W reads of I is still at hand.
"""

from dualpipe_jax._schedule.generators.row_builder import RowBuilder
from dualpipe_jax._schedule.generators.sizes import check_sizes
from dualpipe_jax._schedule.ir import Program, Row


def zb_h1(*, num_ranks: int, num_microbatches: int) -> Program:
    """Generates ZB-H1.

    >>> print(zb_h1(num_ranks=2, num_microbatches=3).to_csv(), end="")
    0F0,0F1,0B0,0F2,0B1,0B2
    1F0,1I0,1F1,1B1,1F2,1B2,1W0

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("zb-h1", num_ranks, num_ranks, num_microbatches, rows)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> Row:
    num_ahead = min(num_ranks - rank - 1, num_microbatches)
    num_deferred = min(rank, num_microbatches - 1)
    build = RowBuilder([(rank, range(num_microbatches))])

    # Warm-up: F
    for _ in range(num_ahead):
        build.forward(0)
    for i in range(num_microbatches):
        # Steady state: F B; cool-down: B. The first r B are I.
        if i < num_microbatches - num_ahead:
            build.forward(0)
        build.backward(0, defer=i < num_deferred)
    # The bubble of 1F1B, filled: W
    for _ in range(num_deferred):
        build.weight_grad()
    return build.row
