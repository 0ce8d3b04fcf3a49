"""Simulates and ranks schedules without JAX: time and memory of a step, by its tables alone.

One file an idea: `costs`, `layers` (of each stage, and their cost), `simulation` (the replay of a
decided execution), `decide` (the fastest execution), `balance` (the fastest split of layers over
stages), `simulate` (checks, decides, replays), `waits` (for whom ranks wait, and why), `timed`
(when each action runs, and its waits), `placement` (all three
as a program's name), `published` (the papers' bubbles); and to rank schedules, `transformer`
(sizes -> bytes and costs), `memory` (tables and bytes -> a rank's memory, term by term),
`candidate` (a schedule and its splits), `ranking`.
The replay, which waits as the program does, belongs to the schedule compiler.
"""

from dualpipe_jax._costs import FULL_BACKWARD as FULL_BACKWARD
from dualpipe_jax._costs import TRANSFER as TRANSFER
from dualpipe_jax._costs import Costs as Costs
from dualpipe_jax._costs import StageLayers as StageLayers
from dualpipe_jax._costs import of_transformer as of_transformer
from dualpipe_jax._costs import weights_by_kind as weights_by_kind
from dualpipe_jax._predict.balance import balance as balance
from dualpipe_jax._predict.candidate import Candidate as Candidate
from dualpipe_jax._predict.decide import decide as decide
from dualpipe_jax._predict.decide import has_pairs as has_pairs
from dualpipe_jax._predict.decide import has_steady_state as has_steady_state
from dualpipe_jax._predict.decide import replay_decided as replay_decided
from dualpipe_jax._predict.decide import usual_costs as usual_costs
from dualpipe_jax._predict.memory import LayerBytes as LayerBytes
from dualpipe_jax._predict.memory import MemoryTerm as MemoryTerm
from dualpipe_jax._predict.memory import ParameterBytes as ParameterBytes
from dualpipe_jax._predict.memory import memory_of as memory_of
from dualpipe_jax._predict.placement import Placement as Placement
from dualpipe_jax._predict.ranking import HEADROOM as HEADROOM
from dualpipe_jax._predict.ranking import Choice as Choice
from dualpipe_jax._predict.ranking import choices_of as choices_of
from dualpipe_jax._predict.ranking import in_order as in_order
from dualpipe_jax._predict.ranking import rank as rank
from dualpipe_jax._predict.simulate import simulate as simulate
from dualpipe_jax._predict.simulation import Simulation as Simulation
from dualpipe_jax._predict.simulation import compile_for as compile_for
from dualpipe_jax._predict.timed import TimedAction as TimedAction
from dualpipe_jax._predict.timed import timed_actions as timed_actions
from dualpipe_jax._predict.transformer import Transformer as Transformer
