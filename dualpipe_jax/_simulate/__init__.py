"""Schedule and costs -> how long the program takes: a replay of its tables, without JAX.

One file an idea: `costs`, `work` (of each tick), `replay` (which waits as the program does),
`waits` (for whom, and why), `simulation`, `published` (what the papers say), `fastest` (which
timetable, and whether with full backwards).
"""

from dualpipe_jax._simulate.costs import Costs as Costs
from dualpipe_jax._simulate.costs import of_transformer as of_transformer
from dualpipe_jax._simulate.fastest import fastest_timetable as fastest_timetable
from dualpipe_jax._simulate.fastest import prefers_full_backward as prefers_full_backward
from dualpipe_jax._simulate.simulation import Simulation as Simulation
from dualpipe_jax._simulate.simulation import simulate as simulate
