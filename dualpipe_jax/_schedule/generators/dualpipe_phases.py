"""The eight phases that DualPipe and DualPipeV share, as DeepSeek's `step()` publishes them.

A rank holds two chunks: 0, the near one, whose microbatches reach it first, and 1, the far one.
The two schedules differ in how far a rank is from the turn, where the two chunks are neighbours.
"""

from collections.abc import Iterable

from dualpipe_jax._schedule.generators.row_builder import RowBuilder
from dualpipe_jax._schedule.ir import Row


def published_row(
    chunks: Iterable[tuple[int, range]], *, h: int, half: int, num_microbatches: int
) -> Row:
    """Writes one rank's row, under the names of `step()` for its phases.

    Args:
        chunks: the stage and the microbatches of the near and of the far chunk.
        h: how many ranks are between this one and the end where its near microbatches enter.
        half: how many ranks there are from that end to the turn.
        num_microbatches: how many pass through each chunk, at least `2 * half`.
    """
    near, far = 0, 1
    build = RowBuilder(list(chunks))

    # 1: nF0
    for _ in range(2 * (half - h - 1)):
        build.forward(near)
    # 2: nF0F1
    for _ in range(h + 1):
        build.forward(near)
        build.forward(far)
    # 3: nB1W1F1
    for _ in range(half - h - 1):
        build.input_grad(far)
        build.weight_grad()
        build.forward(far)
    # 4, the steady state: nF0B1F1B0
    for i in range(num_microbatches - 2 * half + h + 1):
        if i == 0 and h == half - 1:
            # Apart at the turn: the forward is awaited beyond it.
            build.forward(near)
            build.backward(far)
        else:
            build.pair(near, far)
        build.pair(far, near)
    # 5: nB1F1B0
    for _ in range(half - h - 1):
        build.backward(far)
        build.pair(far, near)
    # 6: nB1B0, from the middle on with deferred weight grads
    for i in range(h + 1):
        middle = (h + 1) // 2
        build.backward(far, defer=i > middle or (i == middle and h % 2 == 1))
        build.backward(near, defer=i >= middle)
    # 7: nWB0
    for _ in range(half - h - 1):
        build.weight_grad()
        build.input_grad(near)
    # 8: nW
    for _ in range(h + 1):
        build.weight_grad()
    return build.row
