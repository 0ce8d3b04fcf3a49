"""Timeline -> picture, in the manner of the figure that DeepSeek published for DualPipe.

Rows are ranks, time runs to the right; F, I and W have a colour each, light in direction 0 and dark
in direction 1. The F of a pair is drawn above its I and W, as long as both. A long timeline is
folded into bands, each under its own ticks. Matplotlib is imported when a picture is made.

Source: https://github.com/deepseek-ai/DualPipe, "DualPipe scheduling with 8 ranks".
"""

import math
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from dualpipe_jax._errors import brief, show
from dualpipe_jax._plot.geometry import Bands, Boxes, boxes_of, fold_into_bands
from dualpipe_jax._plot.legend import FACES, IDLE, INKS
from dualpipe_jax._plot.sheet import Sheet
from dualpipe_jax._schedule.find_steady import find_steady
from dualpipe_jax.schedules import Schedule, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RANK_LINE = 0.15  # inches, of the name of a rank
_FONT_SIZE, _MIN_FONT_SIZE = 8.4, 4.5  # points; a number that would be smaller is left out
_MAX_VECTOR_CELLS = 20_000  # above it an SVG holds the cells as one image


def plot_timeline(
    timeline: Timeline, *, title: str | None = None, path: str | PathLike[str] | None = None
) -> "Figure":
    """Draws a timeline.

    Args:
      timeline: The result of `Schedule.timeline()`.
      title: The title above the picture; `summarize(timeline)` by default.
      path: A file to write the picture to, `.svg`, `.png` or another format of Matplotlib.

    Returns:
      The figure, for the caller to add to or to save. It has one `Axes` for each band.

    Raises:
      TypeError: if an argument has a wrong type.
      ValueError: if the path's suffix is no format of Matplotlib.
      OSError: if the file cannot be written.
      ModuleNotFoundError: if Matplotlib is not installed.
    """
    if not isinstance(timeline, Timeline):
        fix = "; take its .timeline()" if isinstance(timeline, Schedule) else ""
        raise TypeError(
            f"timeline={brief(timeline)}: must be a dualpipe_jax.Timeline, the result of "
            f"Schedule.timeline(){fix}"
        )
    if not isinstance(title, str | None):
        raise TypeError(f"title={brief(title)}: must be a text, or None; got {show(title)}")
    if not isinstance(path, str | PathLike | None):
        raise TypeError(f"path={brief(path)}: must be the path of a file, or None")
    layout = fold_into_bands(timeline.num_ticks, timeline.num_ranks)
    font_size = _font_size(timeline, layout)
    has_numbers = font_size >= _MIN_FONT_SIZE
    sheet = Sheet(timeline, layout, has_numbers=has_numbers)
    boxes = boxes_of(timeline)
    for start in range(0, timeline.num_ticks, layout.band):
        ticks = range(start, min(start + layout.band, timeline.num_ticks))
        axes = sheet.add_band(len(ticks))
        _draw_cells(axes, timeline, boxes, ticks, line_width=0.6 * layout.scale)
        if has_numbers:
            _draw_numbers(axes, timeline, boxes, ticks, font_size)
        _draw_frame(axes, timeline, ticks, layout)
    figure = sheet.figure
    figure.axes[0].set_title(title or summarize(timeline), loc="left", fontsize=12, pad=20)
    if path is not None:
        _save_to(figure, path)
    return figure


def _save_to(figure: "Figure", path: str | PathLike[str]) -> None:
    """Writes a figure in the format of the path's suffix."""
    image_format = Path(path).suffix.removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if image_format not in known:
        raise ValueError(
            f"path={brief(path)}: must end in a format of Matplotlib, which are "
            f"{', '.join(sorted(known))}"
        )
    if "\0" in str(path):
        raise ValueError(f"path={brief(path)}: must be the path of a file, without null characters")
    try:
        save(figure, path, image_format=image_format)
    except OSError as error:
        must = f"path={brief(path)}: must be a file that can be written, but: {error.strerror}"
        raise OSError(error.errno, must) from error


def save(figure: "Figure", file: str | PathLike[str] | IO[bytes], *, image_format: str) -> None:
    """Writes a figure, the same bytes for the same figure."""
    from matplotlib import rc_context

    metadata = {"Date": None} if image_format == "svg" else None
    with rc_context({"svg.hashsalt": "dualpipe_jax"}):
        figure.savefig(file, format=image_format, metadata=metadata)


def summarize(timeline: Timeline) -> str:
    """Describes a timeline in one line: its sizes, and how much of it is idle."""
    program = timeline.program
    idle = (timeline.opcode == 0).mean()
    name = "" if timeline.timetable == "shortest" else f", {timeline.timetable}"
    beats = ""
    if timeline.timetable == "aligned":
        has_steady = find_steady(timeline) is not None
        beats = f": {count(len(timeline.beats), 'beat')}" if has_steady else ": no steady phase"
    return (
        f"{program.name}: {count(timeline.num_ranks, 'rank')}, "
        f"{count(program.num_microbatches, 'microbatch', 'es')}, "
        f"{count(timeline.num_ticks, 'tick')}, {idle:.1%} idle{name}{beats}"
    )


def count(number: int, noun: str, plural: str = "s") -> str:
    """Writes a number of things."""
    return f"{number} {noun}{plural if number != 1 else ''}"


def _draw_cells(
    axes: "Axes", timeline: Timeline, boxes: Boxes, ticks: range, *, line_width: float
) -> None:
    from matplotlib.collections import PolyCollection

    in_band = (boxes.right > ticks.start) & (boxes.left < ticks.stop)
    looks = [(0, 1, IDLE)]  # (opcode, direction, face); an idle tick has direction -1, which is odd
    for opcode, faces in enumerate(FACES.values(), start=1):
        looks += [(opcode, direction, face) for direction, face in enumerate(faces)]
    for opcode, direction, face in looks:
        chosen = (timeline.opcode == opcode) & (timeline.direction % 2 == direction) & in_band
        left, right, top, bottom = (edge[chosen] for edge in boxes)
        x = np.stack([left, right, right, left], axis=1)
        y = np.stack([top, top, bottom, bottom], axis=1)
        axes.add_collection(
            PolyCollection(
                list(np.stack([x, y], axis=2)),
                facecolors=face,
                edgecolors="white",
                linewidths=line_width,
                rasterized=timeline.opcode.size > _MAX_VECTOR_CELLS,
            )
        )


def _font_size(timeline: Timeline, layout: Bands) -> float:
    """Finds the size in points of a number that fits into a cell, and into half of one."""
    digits = len(str(timeline.program.num_microbatches - 1))
    # A digit is about 0.64 em wide.
    room = min(layout.cell_width / (0.64 * digits), layout.cell_height / 2)
    return min(_FONT_SIZE, 72 * 0.7 * room)


def _draw_numbers(
    axes: "Axes", timeline: Timeline, boxes: Boxes, ticks: range, font_size: float
) -> None:
    left, right = boxes.left.clip(min=ticks.start), boxes.right.clip(max=ticks.stop)
    # Where a band ends within a box, every part about as wide as a tick has the number.
    for tick, rank in np.argwhere((timeline.opcode > 0) & (right - left > 0.9)).tolist():
        axes.text(
            (left[tick, rank] + right[tick, rank]) / 2,
            (boxes.top[tick, rank] + boxes.bottom[tick, rank]) / 2,
            str(timeline.microbatch[tick, rank]),
            color=INKS[timeline.direction[tick, rank] % 2],
            fontsize=font_size,
            zorder=3,
            ha="center",
            va="center_baseline",
        )


def _draw_frame(axes: "Axes", timeline: Timeline, ticks: range, layout: Bands) -> None:
    num_ranks = timeline.num_ranks
    axes.set_xlim(ticks.start, ticks.stop)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    step = next(step for step in (1, 5, 10, 50, 100, 500, 10**9) if layout.band / step <= 30)
    marked = [tick for tick in ticks if tick % step == 0]
    axes.set_xticks([tick + 0.5 for tick in marked], map(str, marked))
    ranks = range(0, num_ranks, math.ceil(_RANK_LINE / layout.cell_height))
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9, pad=3)
    above_ranks = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate("tick", (0, 1), (-12, 3), ha="right", va="bottom", fontsize=9, **above_ranks)
    for spine in axes.spines.values():
        spine.set_visible(False)
