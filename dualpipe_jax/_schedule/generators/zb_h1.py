"""ZB-H1 (Qi et al. 2023, Zero Bubble Pipeline Parallelism, arXiv:2401.10241, section 2.3).

1F1B with the backward split: rank r defers r weight grads and runs them at the end, where 1F1B
idles. Rank r's P-r activations of 1F1B and these r are P together, on every rank.
"""

from dataclasses import replace

from dualpipe_jax._schedule.generators.defer import defer_first
from dualpipe_jax._schedule.generators.one_f_one_b import one_f_one_b
from dualpipe_jax._schedule.ir import Program


def zb_h1(*, num_ranks: int, num_microbatches: int) -> Program:
    """Makes ZB-H1 (arXiv:2401.10241): 1F1B that defers weight grads to fill its bubbles.

    It holds as many live activations as 1F1B, the same number on every rank.

    >>> print(zb_h1(num_ranks=2, num_microbatches=3).to_csv(), end="")
    0F0,0F1,0B0,0F2,0B1,0B2
    1F0,1I0,1F1,1B1,1F2,1B2,1W0

    Raises:
        ValueError: if a size is not a positive integer.
    """
    plain = one_f_one_b(num_ranks=num_ranks, num_microbatches=num_microbatches)
    rows = defer_first(plain.rows, range(plain.num_ranks))
    return replace(plain, name="zb-h1", rows=rows)
