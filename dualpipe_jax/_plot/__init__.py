"""Timeline -> picture or page; and colours and pairs, for the text form of the command line."""

from dualpipe_jax._plot.geometry import pair_spans as pair_spans
from dualpipe_jax._plot.legend import FACES as FACES
from dualpipe_jax._plot.legend import INKS as INKS
from dualpipe_jax._plot.legend import WORDS as WORDS
from dualpipe_jax._plot.measured import Bar as Bar
from dualpipe_jax._plot.measured import plot_measured as plot_measured
from dualpipe_jax._plot.page import Box as Box
from dualpipe_jax._plot.page import Timetable as Timetable
from dualpipe_jax._plot.page import make_page as make_page
from dualpipe_jax._plot.picture import count as count
from dualpipe_jax._plot.picture import plot_timeline as plot_timeline
from dualpipe_jax._plot.picture import save as save
from dualpipe_jax._plot.picture import summarize as summarize
