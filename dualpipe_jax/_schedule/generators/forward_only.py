"""Forwards only, entering at both ends, as evaluation runs them.

Each rank takes its near direction until the far one has come through the pipeline to it, then
both in turn.
"""

from dualpipe_jax._schedule.generators.sizes import check_sizes, split_microbatches
from dualpipe_jax._schedule.ir import Action, Program, Row


def forward_only(*, num_ranks: int, num_microbatches: int) -> Program:
    """Generates forwards of both directions.

    >>> print(forward_only(num_ranks=2, num_microbatches=4).to_csv(), end="")
    0F0,1F2,0F1,1F3
    0F2,1F0,0F3,1F1

    Raises:
        ValueError: if a size is not a positive integer.
    """
    sizes = check_sizes(num_ranks=num_ranks, num_microbatches=num_microbatches)
    num_ranks, num_microbatches = sizes
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("forward-only", num_ranks, num_ranks, num_microbatches, rows, forward_only=True)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> Row:
    stages = rank, num_ranks - 1 - rank
    directions = [
        [Action("F", stage, m) for m in microbatches]
        for stage, microbatches in zip(stages, split_microbatches(num_microbatches), strict=True)
    ]
    near, far = directions if stages[0] <= stages[1] else directions[::-1]
    num_ahead = min(abs(stages[1] - stages[0]), len(near))
    row, near = near[:num_ahead], near[num_ahead:]
    for i in range(max(len(near), len(far))):
        row += far[i : i + 1] + near[i : i + 1]
    return tuple(row)
