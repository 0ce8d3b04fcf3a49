"""Measured actions -> picture, in the look of a timetable, with time in place of ticks.

Rows are ranks; a box is as long as its action took. Transfers that no action hides are grey.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from dualpipe_jax._plot.geometry import Bands, fold_into_bands
from dualpipe_jax._plot.legend import FACES, IDLE, INKS, SEND
from dualpipe_jax._plot.sheet import Sheet
from dualpipe_jax.schedules import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HALF = 0.46  # of a row
_FONT_SIZE, _DIGIT = 7.0, 0.075  # points, and inches of a digit in them
_MARKS = 12  # the most numbers on the ruler of a band


class Bar(NamedTuple):
    """Tells when a rank ran a part of an action.

    Attributes:
      rank: The rank.
      kind: F, I, W or `send`.
      direction: The direction; 0 for a transfer.
      microbatch: The microbatch; None for a transfer.
      start: When it started, in milliseconds.
      end: When it ended.
    """

    rank: int
    kind: str
    direction: int
    microbatch: int | None
    start: float
    end: float


def plot_measured(bars: Sequence[Bar], timeline: Timeline, *, title: str) -> "Figure":
    """Draws a measured timetable.

    Args:
      bars: The parts of actions.
      timeline: The timeline of the schedule, for the legend.
      title: The title above the picture.

    Raises:
      ModuleNotFoundError: If Matplotlib is not installed.
    """
    num_ranks = timeline.num_ranks
    last = max(bar.end for bar in bars)
    acts = sum(bar.end - bar.start for bar in bars if bar.kind != "send")
    # A cell of the timetable is as long as an action, the mean of all.
    cell = acts / (timeline.opcode > 0).sum()
    layout = fold_into_bands(math.ceil(last / cell), num_ranks)
    sheet = Sheet(timeline, layout, has_numbers=True, is_measured=True)
    for number in range(layout.num_bands):
        start = number * layout.band * cell
        end = min(last, start + layout.band * cell)
        axes = sheet.add_band((end - start) / cell)
        _draw(axes, bars, (start, end), layout, cell)
        _draw_frame(axes, num_ranks, (start, end), layout.band * cell)
    sheet.figure.axes[0].set_title(title, loc="left", fontsize=12, pad=20)
    return sheet.figure


def _draw(
    axes: "Axes", bars: Sequence[Bar], window: tuple[float, float], layout: Bands, cell: float
) -> None:
    from matplotlib.collections import PolyCollection

    boxes: dict[str, list[list[tuple[float, float]]]] = {}
    for bar in bars:
        start, end = max(bar.start, window[0]), min(bar.end, window[1])
        if start >= end:
            continue
        face = SEND if bar.kind == "send" else FACES[bar.kind][bar.direction % 2]
        top, bottom = bar.rank - _HALF, bar.rank + _HALF
        boxes.setdefault(face, []).append(
            [(start, top), (end, top), (end, bottom), (start, bottom)]
        )
        inches = (end - start) / cell * layout.cell_width
        if bar.microbatch is not None and inches > _DIGIT * len(str(bar.microbatch)):
            axes.text(
                (start + end) / 2,
                bar.rank,
                str(bar.microbatch),
                color=INKS[bar.direction % 2],
                fontsize=_FONT_SIZE,
                zorder=3,
                ha="center",
                va="center_baseline",
            )
    for face, corners in boxes.items():
        axes.add_collection(PolyCollection(corners, facecolors=face, edgecolors="none"))


def _draw_frame(
    axes: "Axes", num_ranks: int, window: tuple[float, float], milliseconds: float
) -> None:
    axes.set_xlim(*window)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    axes.set_facecolor(IDLE)
    power = 10.0 ** math.floor(math.log10(milliseconds / _MARKS))
    step = next(n * power for n in (1, 2, 5, 10) if milliseconds / (n * power) <= _MARKS)
    marks = [
        number * step
        for number in range(math.ceil(window[0] / step), math.floor(window[1] / step) + 1)
    ]
    axes.set_xticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axes.hlines([rank + 0.5 for rank in range(num_ranks - 1)], *window, colors="white", lw=1.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9, pad=3)
    above_ranks = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate("ms", (0, 1), (-12, 3), ha="right", va="bottom", fontsize=9, **above_ranks)
    for spine in axes.spines.values():
        spine.set_visible(False)
