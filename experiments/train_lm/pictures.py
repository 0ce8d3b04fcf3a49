"""How the pictures of experiments look."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def frame(axes: Axes, *, grid: Any = "both", hidden: tuple[str, ...] = ("top", "right")) -> None:
    """Draws a light grid behind all lines, and leaves out these sides of the frame."""
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color="#e4e4e4", linewidth=0.6)
    axes.spines[list(hidden)].set_visible(False)
    if "left" in hidden:
        axes.tick_params(length=0)


def legend_below(figure: Figure, axes: Axes, *, columns: int | None = None) -> None:
    """Puts one legend under all panels, that of this one."""
    handles, labels = axes.get_legend_handles_labels()
    ncols = columns or len(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)
