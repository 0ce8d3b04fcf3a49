"""Schedule and costs -> how long the program takes: a replay of its tables, without JAX.

One file an idea: `costs`, `simulation`, `waits` (for whom ranks wait, and why), `published` (what
the papers say), `fastest` (which timetable, and whether with full backwards). The replay, which
waits as the program does, is the schedule compiler's own.
"""

from dualpipe_jax._simulate.costs import TRANSFER as TRANSFER
from dualpipe_jax._simulate.costs import Costs as Costs
from dualpipe_jax._simulate.costs import of_transformer as of_transformer
from dualpipe_jax._simulate.fastest import fastest_timetable as fastest_timetable
from dualpipe_jax._simulate.fastest import prefers_full_backward as prefers_full_backward
from dualpipe_jax._simulate.fastest import usual_costs as usual_costs
from dualpipe_jax._simulate.simulation import Simulation as Simulation
from dualpipe_jax._simulate.simulation import compile_for as compile_for
from dualpipe_jax._simulate.simulation import durations_of as durations_of
from dualpipe_jax._simulate.simulation import simulate as simulate
