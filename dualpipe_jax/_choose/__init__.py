"""Sizes, costs and a memory limit -> the schedules in order of predicted step time, without JAX.

One file an idea: `transformer` (sizes -> bytes and costs), `memory` (tables and bytes -> a rank's
memory, term by term), `ranking`.
"""

from dualpipe_jax._choose.memory import LayerBytes as LayerBytes
from dualpipe_jax._choose.memory import ParameterBytes as ParameterBytes
from dualpipe_jax._choose.memory import Term as Term
from dualpipe_jax._choose.memory import memory_of as memory_of
from dualpipe_jax._choose.ranking import HEADROOM as HEADROOM
from dualpipe_jax._choose.ranking import Choice as Choice
from dualpipe_jax._choose.ranking import choices_of as choices_of
from dualpipe_jax._choose.ranking import in_order as in_order
from dualpipe_jax._choose.transformer import Transformer as Transformer
