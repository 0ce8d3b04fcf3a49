"""Defers weight grads of a schedule of 1F1B's form to the ends of its rows, as ZB-H1 does.

Weight grads take equally long for all microbatches. So the first ones wait, to the end, and every
later one follows its input grad at once, where a queue would defer all of them by as many. Ticks
and slots are the same, but only the first ones recompute, and the others find the values of their
input grads still at hand.
"""

from collections.abc import Iterable

from dualpipe_jax._schedule.ir import Action, Row


def defer_first(rows: Iterable[Row], counts: Iterable[int]) -> tuple[Row, ...]:
    """Defers the weight grads of each row's first backwards to its end.

    >>> row = tuple(Action(kind, 0, m) for m in range(3) for kind in "FB")
    >>> for deferred in defer_first([row, row], [1, 2]):
    ...     print(*deferred)
    0F0 0I0 0F1 0B1 0F2 0B2 0W0
    0F0 0I0 0F1 0I1 0F2 0B2 0W0 0W1

    Args:
        rows: The rows of all ranks, without pairs.
        counts: How many weight grads each rank defers. A row's last backward stays whole: deferred
            to the end, its weight grad would follow it all the same.
    """
    return tuple(_defer(row, count) for row, count in zip(rows, counts, strict=True))


def _defer(row: Row, count: int) -> Row:
    backwards = [cell for cell in row if isinstance(cell, Action) and cell.kind == "B"]
    waiting = backwards[:-1][:count]
    is_waiting = set(waiting)
    split = [
        cell._replace(kind="I") if isinstance(cell, Action) and cell in is_waiting else cell
        for cell in row
    ]
    return (*split, *(action._replace(kind="W") for action in waiting))
