"""Interleaved 1F1B with ZB-H1's rule: weight grads wait for the end, where ranks idle.

Interleaved 1F1B is that of arXiv:2104.04473, section 2.2; the rule is that of arXiv:2401.10241,
section 2.3. Rank 0 of interleaved 1F1B with v stages a rank holds v P + P - 1 activations, and rank
r holds 2r fewer: so r weight grads that wait there, or 2r of them, take no more memory.
"""

import operator
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np

from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.generators.defer import defer_first
from dualpipe_jax._schedule.generators.interleaved_one_f_one_b import interleaved_one_f_one_b
from dualpipe_jax._schedule.ir import Program


def interleaved_zb(
    *,
    num_ranks: int,
    num_microbatches: int,
    num_stages_per_rank: int = 2,
    num_deferred: str | Sequence[int] = "r",
) -> Program:
    """Makes interleaved 1F1B that defers weight grads to fill its bubbles, as ZB-H1 does.

    If forwards, input grads and weight grads take equally long, ranks idle no longer than the first
    forward takes to reach the last one. It holds no more activations than interleaved 1F1B.

    >>> print(interleaved_zb(num_ranks=2, num_microbatches=2).to_csv(), end="")
    0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
    1F0,1F1,3F0,3I0,3F1,3B1,1B0,1B1,3W0

    Args:
        num_ranks: The number of ranks.
        num_microbatches: The number of microbatches of a step.
        num_stages_per_rank: How many stages each rank holds.
        num_deferred: How many weight grads each rank defers to its end: `"r"`, rank 0 none, rank 1
            one and so on; `"2r"`, twice as many, which suits input grads that take longer than
            weight grads and needs no more memory either; or one number a rank. A rank that has
            fewer backwards defers all but its last one.

    Raises:
        ValueError: if a size is not a positive integer, or `num_deferred` says no number, of at
            least 0, for each rank.
    """
    plain = interleaved_one_f_one_b(
        num_ranks=num_ranks,
        num_microbatches=num_microbatches,
        num_stages_per_rank=num_stages_per_rank,
    )
    counts = _counts(num_deferred, plain.num_ranks)
    return replace(plain, name="interleaved-zb", rows=defer_first(plain.rows, counts))


def _counts(num_deferred: str | Sequence[int], num_ranks: int) -> list[int]:
    counts = []
    if isinstance(num_deferred, str):
        if found := re.fullmatch(r"(\d{0,9})r", num_deferred):
            return [int(found[1] or 1) * rank for rank in range(num_ranks)]
    elif isinstance(num_deferred, Sequence | np.ndarray):
        with suppress(TypeError):  # of an array without dims, or a count that is no integer
            if len(num_deferred) == num_ranks:
                counts = [-1 if isinstance(n, bool) else operator.index(n) for n in num_deferred]
    if not counts or min(counts) < 0:
        raise ValueError(
            f"num_deferred={brief(num_deferred)}: must be 'r' or '2r', for the number of each rank "
            f"or twice that, or {num_ranks} integers of at least 0, one for each of the "
            f"{num_ranks} ranks"
        )
    return counts
