"""Schedule and costs -> how long the program takes: a replay of its tables, without JAX.

One file an idea: `costs`, `simulation` (what a replay took), `decide` (the fastest execution),
`simulate`, `waits` (for whom ranks wait, and why), `published` (what the papers say). The replay,
which waits as the program does, is the schedule compiler's own.
"""

from dualpipe_jax._simulate.costs import FULL_BACKWARD as FULL_BACKWARD
from dualpipe_jax._simulate.costs import TRANSFER as TRANSFER
from dualpipe_jax._simulate.costs import Costs as Costs
from dualpipe_jax._simulate.costs import of_transformer as of_transformer
from dualpipe_jax._simulate.decide import decide as decide
from dualpipe_jax._simulate.decide import has_pairs as has_pairs
from dualpipe_jax._simulate.decide import has_steady_state as has_steady_state
from dualpipe_jax._simulate.decide import usual_costs as usual_costs
from dualpipe_jax._simulate.simulate import simulate as simulate
from dualpipe_jax._simulate.simulation import Simulation as Simulation
from dualpipe_jax._simulate.simulation import compile_for as compile_for
