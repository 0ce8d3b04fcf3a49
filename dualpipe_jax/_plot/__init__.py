"""Timeline -> picture; and colours and pairs, for the text form of the command line."""

from dualpipe_jax._plot.geometry import pair_spans as pair_spans
from dualpipe_jax._plot.legend import FACES as FACES
from dualpipe_jax._plot.legend import INKS as INKS
from dualpipe_jax._plot.legend import WORDS as WORDS
from dualpipe_jax._plot.measured import Bar as Bar
from dualpipe_jax._plot.measured import plot_measured as plot_measured
from dualpipe_jax._plot.picture import plot_timeline as plot_timeline
from dualpipe_jax._plot.picture import save as save
from dualpipe_jax._plot.picture import summarize as summarize
