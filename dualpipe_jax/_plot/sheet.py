"""A figure of bands, one below the other, above a legend; Matplotlib is imported as it is made."""

from typing import TYPE_CHECKING

from dualpipe_jax._plot.geometry import RULER, Bands
from dualpipe_jax._plot.legend import draw_legend
from dualpipe_jax.schedules import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEFT, _RIGHT, _TOP, _BOTTOM = 0.75, 0.15, 0.35, 0.12  # inches, beside the bands and the legend


class Sheet:
    """Holds the figure, and adds the bands.

    Attributes:
      figure: The figure.
    """

    def __init__(
        self, timeline: Timeline, layout: Bands, *, has_numbers: bool, is_measured: bool = False
    ):
        """Makes the figure with its legend.

        Args:
          timeline: Its ranks are the rows of a band; its actions are in the legend.
          layout: The bands.
          has_numbers: Whether boxes show microbatches.
          is_measured: Whether transfers are shown too.

        Raises:
          ModuleNotFoundError: If Matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "a picture needs Matplotlib: pip install matplotlib", name=error.name
            ) from error

        self._cell_width = layout.cell_width
        self._band_height = timeline.num_ranks * layout.cell_height
        chart_width = layout.band * layout.cell_width
        self.figure = Figure(dpi=150)
        legend_height = draw_legend(
            self.figure,
            timeline,
            left=_LEFT,
            bottom=_BOTTOM,
            width=chart_width,
            has_numbers=has_numbers,
            is_measured=is_measured,
        )
        self._width = _LEFT + chart_width + _RIGHT
        bands_height = layout.num_bands * (RULER + self._band_height)
        self._height = _TOP + bands_height + legend_height + 2 * _BOTTOM
        self.figure.set_size_inches(self._width, self._height)
        self._bottom = self._height - _TOP

    def add_band(self, num_cells: float) -> "Axes":
        """Adds the next band below the last one, so many cells wide."""
        self._bottom -= RULER + self._band_height
        left, bottom = _LEFT / self._width, self._bottom / self._height
        size = num_cells * self._cell_width / self._width, self._band_height / self._height
        return self.figure.add_axes((left, bottom, *size))
