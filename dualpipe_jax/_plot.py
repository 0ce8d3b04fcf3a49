"""Timeline -> picture, in the manner of the figure that DeepSeek published for DualPipe.

Rows are ranks, time runs to the right; F, I and W have a colour each, light in direction 0 and dark
in direction 1; a pair is outlined as one block, an idle tick is left empty. Matplotlib is imported
when a picture is made.

Source: https://github.com/deepseek-ai/DualPipe, "DualPipe scheduling with 8 ranks".
"""

from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from dualpipe_jax.schedules import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# FACES[kind][direction]. Blue, orange and olive in two lightnesses: chosen by the least distance in
# CIELAB between any two of them and the idle ground, over normal, protan, deutan and tritan sight.
FACES = {"F": ("#8cc4ef", "#12508f"), "I": ("#ffa640", "#bd4400"), "W": ("#b3c48a", "#3b4722")}
INKS = ("#000000", "#ffffff")  # of the numbers, by direction
IDLE = "#f1f1f1"
KINDS = {"F": "forward (F)", "I": "input grad (I)", "W": "weight grad (W)"}

# Inches. A picture wider or taller than the limit gets smaller cells instead.
_CELL_WIDTH, _CELL_HEIGHT = 0.23, 0.33
_MAX_WIDTH, _MAX_HEIGHT = 48.0, 24.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 0.15, 0.62, 0.66
_MIN_FONT_SIZE = 3.0  # points; below it a number is no help
_MAX_VECTOR_CELLS = 20_000  # above it an SVG holds the cells as one image


def plot_timeline(
    timeline: Timeline, *, title: str | None = None, path: str | PathLike[str] | None = None
) -> "Figure":
    """Draws a timeline.

    Args:
      timeline: What `Schedule.timeline()` gives.
      title: Stands above the picture; `summarize(timeline)` by default.
      path: A file to write it to as well, `.svg`, `.png` or whatever else Matplotlib writes.

    Returns:
      The figure, for the caller to add to or to save.

    Raises:
      ModuleNotFoundError: if Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a picture needs Matplotlib: pip install matplotlib", name=error.name
        ) from error

    num_ticks, num_ranks = timeline.num_ticks, timeline.num_ranks
    cell_width = min(_CELL_WIDTH, _MAX_WIDTH / num_ticks)
    cell_height = min(_CELL_HEIGHT, _MAX_HEIGHT / num_ranks)
    # At least as wide as the legend.
    width = max(cell_width * num_ticks, 7.6) + _LEFT + _RIGHT
    height = cell_height * num_ranks + _TOP + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.add_axes(
        (
            _LEFT / width,
            _BOTTOM / height,
            cell_width * num_ticks / width,
            cell_height * num_ranks / height,
        )
    )
    scale = cell_width / _CELL_WIDTH
    _draw_cells(axes, timeline, line_width=0.6 * scale)
    _draw_pairs(axes, timeline, line_width=1.3 * scale)
    _draw_numbers(axes, timeline, cell_width)
    _draw_frame(axes, timeline)
    axes.set_title(title or summarize(timeline), loc="left", fontsize=12, pad=20)
    _draw_legend(figure, timeline, x=_LEFT / width, y=0.1 / height)
    if path is not None:
        save(figure, path, image_format=Path(path).suffix.removeprefix(".") or "png")
    return figure


def save(figure: "Figure", file: str | PathLike[str] | IO[bytes], *, image_format: str) -> None:
    """Writes a figure, the same bytes each time it is the same figure."""
    from matplotlib import rc_context

    metadata = {"Date": None} if image_format == "svg" else None
    with rc_context({"svg.hashsalt": "dualpipe_jax"}):
        figure.savefig(file, format=image_format, metadata=metadata)


def summarize(timeline: Timeline) -> str:
    """Says in one line what a timeline is and how much of it is idle."""
    program = timeline.program
    idle = (timeline.opcode == 0).mean()
    name = "" if timeline.timetable == "shortest" else f", {timeline.timetable}"
    beats = f": {_count(len(timeline.beats), 'beat')}" if timeline.timetable == "aligned" else ""
    return (
        f"{program.name}: {_count(timeline.num_ranks, 'rank')}, "
        f"{_count(program.num_microbatches, 'microbatch', 'es')}, "
        f"{_count(timeline.num_ticks, 'tick')}, {idle:.1%} idle{name}{beats}"
    )


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def pair_spans(timeline: Timeline) -> list[tuple[int, int, int]]:
    """Lists the pairs as (rank, first tick, last tick)."""
    tick, rank = np.nonzero(timeline.pair >= 0)
    spans: dict[int, tuple[int, int, int]] = {}
    for t, r, pair in zip(
        tick.tolist(), rank.tolist(), timeline.pair[tick, rank].tolist(), strict=True
    ):
        spans[pair] = (r, spans.get(pair, (r, t, t))[1], t)  # ticks come in ascending order
    return list(spans.values())


def _boxes(
    left: np.ndarray, right: np.ndarray, rank: np.ndarray, inset: float = 0
) -> list[np.ndarray]:
    """Lists the corners, float64[4, 2] each, of boxes one row high from `left` to `right`."""
    top, bottom = rank - 0.5 + inset, rank + 0.5 - inset
    x = np.stack([left, right, right, left], axis=1)
    y = np.stack([top, top, bottom, bottom], axis=1)
    return list(np.stack([x, y], axis=2))


def _draw_cells(axes: "Axes", timeline: Timeline, *, line_width: float) -> None:
    from matplotlib.collections import PolyCollection

    looks = [(0, 1, IDLE)]  # (opcode, direction, face); an idle tick has direction -1, which is odd
    for opcode, faces in enumerate(FACES.values(), start=1):
        looks += [(opcode, direction, face) for direction, face in enumerate(faces)]
    for opcode, direction, face in looks:
        chosen = (timeline.opcode == opcode) & (timeline.direction % 2 == direction)
        tick, rank = np.nonzero(chosen)
        axes.add_collection(
            PolyCollection(
                _boxes(tick, tick + 1, rank),
                facecolors=face,
                edgecolors="white",
                linewidths=line_width,
                rasterized=timeline.opcode.size > _MAX_VECTOR_CELLS,
            )
        )


def _draw_pairs(axes: "Axes", timeline: Timeline, *, line_width: float) -> None:
    from matplotlib.collections import PolyCollection

    spans = pair_spans(timeline)
    if not spans:
        return
    rank, first, last = np.array(spans).T
    # White around the black sets a pair off from its dark cells and from the next pair.
    for color, width in (("white", 2.3 * line_width), ("black", line_width)):
        axes.add_collection(
            PolyCollection(
                _boxes(first + 0.07, last + 0.93, rank, inset=0.06),
                facecolors="none",
                edgecolors=color,
                linewidths=width,
                joinstyle="round",
                rasterized=timeline.opcode.size > _MAX_VECTOR_CELLS,
            )
        )


def _draw_numbers(axes: "Axes", timeline: Timeline, cell_width: float) -> None:
    digits = len(str(timeline.program.num_microbatches - 1))
    # A digit is about 0.64 em wide.
    font_size = min(8.4, cell_width * 72 * 0.7 / (0.64 * digits))
    if font_size < _MIN_FONT_SIZE:
        return
    for tick, rank in np.argwhere(timeline.opcode > 0).tolist():
        axes.text(
            tick + 0.5,
            rank,
            str(timeline.microbatch[tick, rank]),
            color=INKS[timeline.direction[tick, rank] % 2],
            fontsize=font_size,
            zorder=3,
            ha="center",
            va="center_baseline",
        )


def _draw_frame(axes: "Axes", timeline: Timeline) -> None:
    num_ticks, num_ranks = timeline.num_ticks, timeline.num_ranks
    axes.set_xlim(0, num_ticks)
    axes.set_ylim(num_ranks - 0.5, -0.5)
    step = next(step for step in (1, 5, 10, 50, 100, 500, 10**9) if num_ticks / step <= 30)
    axes.set_xticks(np.arange(0, num_ticks, step) + 0.5, np.arange(0, num_ticks, step))
    ranks = range(0, num_ranks, max(1, num_ranks // 32))
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=9, pad=3)
    above_ranks = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate("tick", (0, 1), (-8, 3), ha="right", va="bottom", fontsize=9, **above_ranks)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_legend(figure: "Figure", timeline: Timeline, *, x: float, y: float) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    num_directions = min(2, len(timeline.program.routes))
    entries: list[tuple[tuple[Patch, ...], str]] = [
        (tuple(Patch(facecolor=face) for face in FACES[kind][:num_directions]), label)
        for kind, label in KINDS.items()
    ]
    if (timeline.pair >= 0).any():
        entries.append(((Patch(facecolor="white", edgecolor="black", linewidth=1.3),), "pair"))
    entries.append(((Patch(facecolor=IDLE, edgecolor="#bbbbbb", linewidth=0.5),), "idle"))
    title = "numbers: microbatches"
    if num_directions == 2:
        starts = [route[0] for route in timeline.program.routes]
        title += (
            f"   light: direction 0, enters at rank {starts[0]}"
            f"   dark: direction 1, enters at rank {starts[1]}"
        )
    handles, labels = zip(*entries, strict=True)
    legend = figure.legend(
        handles,
        labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        bbox_to_anchor=(x, y),
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        handlelength=2.6,
        handleheight=1.1,
        borderaxespad=0,
        borderpad=0,
        columnspacing=1.8,
        title=title,
        title_fontsize=9,
        alignment="left",
    )
    legend.set_in_layout(False)
