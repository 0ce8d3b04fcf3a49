"""Timeline -> the box of each action, in ticks and ranks, and the size of a cell in inches."""

from typing import NamedTuple

import numpy as np

from dualpipe_jax.schedules import Timeline

# Inches. Cells become wider to fill the least width, and smaller to stay within the limits.
CELL_WIDTH, CELL_HEIGHT = 0.23, 0.33
_MIN_WIDTH, _MAX_WIDTH, _MAX_HEIGHT = 7.0, 17.0, 24.0
RULER = 0.3  # the numbers of the ticks, above each band
# Ticks and ranks: a pair stands apart from its neighbours, and a rank from the next.
_PAIR_INSET, _RANK_INSET = 0.06, 0.04


class Bands(NamedTuple):
    """Holds how a timeline is folded: bands of `band` ticks, the last one of fewer; in inches."""

    num_bands: int
    band: int
    cell_width: float
    cell_height: float

    @property
    def scale(self) -> float:
        """Divides the size of a cell by the full size."""
        return min(1.0, self.cell_width / CELL_WIDTH, self.cell_height / CELL_HEIGHT)


class Boxes(NamedTuple):
    """Holds the edges of the box of each tick of each rank, each float64[num_ticks, num_ranks]."""

    left: np.ndarray
    right: np.ndarray
    top: np.ndarray
    bottom: np.ndarray


def fold_into_bands(num_ticks: int, num_ranks: int) -> Bands:
    """Finds the fewest bands that give the largest cells."""
    layouts = []
    for num_bands in range(1, num_ticks + 1):
        band = -(-num_ticks // num_bands)
        cell_width = min(max(CELL_WIDTH, _MIN_WIDTH / band), _MAX_WIDTH / band)
        cell_height = min(CELL_HEIGHT, (_MAX_HEIGHT / num_bands - RULER) / num_ranks)
        if cell_height <= 0:
            break
        layouts.append(Bands(num_bands, band, cell_width, cell_height))
    return max(layouts, key=lambda layout: layout.scale)


def pair_spans(timeline: Timeline) -> list[tuple[int, int, int]]:
    """Lists the pairs as (rank, first tick, last tick)."""
    tick, rank = np.nonzero(timeline.pair >= 0)
    spans: dict[int, tuple[int, int, int]] = {}
    for t, r, pair in zip(
        tick.tolist(), rank.tolist(), timeline.pair[tick, rank].tolist(), strict=True
    ):
        spans[pair] = (r, spans.get(pair, (r, t, t))[1], t)  # ticks come in ascending order
    return list(spans.values())


def boxes_of(timeline: Timeline) -> Boxes:
    """Makes the box of each tick; the F of a pair has the upper half of the ticks of its pair.

    Its I and W share the lower half. A pair in which the rank idles is drawn tick by tick.

    >>> from dualpipe_jax.schedules import Schedule
    >>> csv = "0F0,(0F1;0B0)OVERLAP_F_B,0B1"
    >>> boxes = boxes_of(Schedule.from_csv(csv).timeline())
    >>> for left, right, top, bottom in zip(*(edge[:, 0].round(1) for edge in boxes), strict=True):
    ...     print(f"{left} to {right}, {top} to {bottom}")
    0.0 to 1.0, -0.5 to 0.5
    1.1 to 3.9, -0.5 to 0.0
    1.1 to 2.5, 0.0 to 0.5
    2.5 to 3.9, 0.0 to 0.5
    4.0 to 5.0, -0.5 to 0.5
    5.0 to 6.0, -0.5 to 0.5
    """
    tick, rank = np.indices(timeline.opcode.shape, float)
    half = 0.5 - _RANK_INSET
    boxes = Boxes(left=tick, right=tick + 1, top=rank - half, bottom=rank + half)
    for of_rank, first, last in pair_spans(timeline):
        forward, backward = (first, of_rank), (slice(first + 1, last + 1), of_rank)
        if (timeline.opcode[backward] == 0).any():
            continue
        edges = np.linspace(first + _PAIR_INSET, last + 1 - _PAIR_INSET, last - first + 1)
        boxes.left[forward], boxes.right[forward] = edges[0], edges[-1]
        boxes.left[backward], boxes.right[backward] = edges[:-1], edges[1:]
        boxes.bottom[forward] = boxes.top[backward] = of_rank
    return boxes
