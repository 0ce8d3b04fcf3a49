"""Chooses the colours of actions, and draws their legend."""

from functools import partial
from typing import TYPE_CHECKING, Any

from dualpipe_jax.schedules import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# FACES[kind][direction]. Blue, orange and olive in two lightnesses: chosen by the least distance in
# CIELAB between any two of them and the idle ground, over normal, protan, deutan and tritan sight.
FACES = {"F": ("#8cc4ef", "#12508f"), "I": ("#ffa640", "#bd4400"), "W": ("#b3c48a", "#3b4722")}
INKS = ("#000000", "#ffffff")  # of the numbers, by direction
IDLE = "#f1f1f1"
SEND = "#c4c4c4"  # of measured transfers
WORDS = {"F": "forward", "I": "input grad", "W": "weight grad"}


def draw_legend(
    figure: "Figure",
    timeline: Timeline,
    *,
    left: float,
    bottom: float,
    width: float,
    has_numbers: bool,
    is_measured: bool = False,
) -> float:
    """Draws the legend over a width in inches, in as few lines as it takes; returns its height.

    Measured timetables have transfers in the place of pairs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.legend_handler import HandlerTuple

    entries = _entries(timeline, has_numbers=has_numbers, is_measured=is_measured)
    handles, labels = zip(*entries, strict=True)
    make_legend = partial(
        figure.legend,
        handles,
        labels,
        handler_map={
            tuple: HandlerTuple(ndivide=None, pad=0),
            _PairSwatch: _PairSwatch(),
        },
        loc="lower left",
        bbox_to_anchor=(left, bottom, width, 0),
        bbox_transform=figure.dpi_scale_trans,
        frameon=False,
        fontsize=9,
        handlelength=2.6,
        handleheight=1.1,
        borderaxespad=0,
        borderpad=0,
        columnspacing=1.8,
    )
    renderer = FigureCanvasAgg(figure).get_renderer()
    for num_columns in range(len(labels), 0, -1):
        legend = make_legend(ncols=num_columns)
        extent = legend.get_window_extent(renderer)
        legend.remove()
        if extent.width <= width * figure.dpi:
            break
    make_legend(ncols=num_columns, mode="expand").set_in_layout(False)
    return extent.height / figure.dpi


def _entries(
    timeline: Timeline, *, has_numbers: bool, is_measured: bool
) -> list[tuple[object, str]]:
    """Lists the handles and labels of the legend, those of a column after each other."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    starts = [route[0] for route in timeline.program.routes[:2]]
    entries: list[tuple[object, str]] = [
        (tuple(Patch(facecolor=face) for face in FACES[kind][: len(starts)]), f"{word} ({kind})")
        for kind, word in WORDS.items()
    ]
    entries.append((Patch(facecolor=IDLE, edgecolor="#bbbbbb", linewidth=0.5), "idle"))
    if has_numbers:
        number = Line2D([], [], marker="$7$", color="black", linestyle="none")
        entries.append((number, "microbatch"))
    if is_measured:
        entries.append((Patch(facecolor=SEND), "send, and the wait for the other rank"))
    elif (timeline.pair >= 0).any():
        entries.append((_PairSwatch(), "pair: F beside I and W"))
    if len(starts) == 2:
        for direction, (start, shade) in enumerate(zip(starts, ("light", "dark"), strict=True)):
            patches = tuple(Patch(facecolor=faces[direction]) for faces in FACES.values())
            entries.append((patches, f"{shade}: direction {direction}, enters at rank {start}"))
    return entries


class _PairSwatch:
    """Draws a pair in the legend: a handle, and Matplotlib's handler of it."""

    def legend_artist(self, legend: Any, handle: Any, fontsize: float, box: Any) -> None:
        """Draws a pair: F above I and W."""
        from matplotlib.patches import Rectangle

        width, height = box.width / 2, box.height / 2
        for kind, corner, length in (("F", (0, height), 2), ("I", (0, 0), 1), ("W", (width, 0), 1)):
            box.add_artist(
                Rectangle(
                    corner,
                    length * width,
                    height,
                    facecolor=FACES[kind][0],
                    edgecolor="white",
                    linewidth=0.6,
                    transform=box.get_transform(),
                )
            )
