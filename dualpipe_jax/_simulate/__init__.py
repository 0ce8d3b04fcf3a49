"""Schedule and costs -> how long the program takes: a replay of its tables, without JAX.

One file an idea: `costs`, `replay` (which waits as the program does), `simulation`, `published`
(what the papers say), `fastest` (which timetable).
"""

from dualpipe_jax._simulate.costs import Costs as Costs
from dualpipe_jax._simulate.fastest import fastest_timetable as fastest_timetable
from dualpipe_jax._simulate.simulation import Simulation as Simulation
from dualpipe_jax._simulate.simulation import simulate as simulate
