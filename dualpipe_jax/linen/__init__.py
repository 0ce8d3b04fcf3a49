"""Flax Linen modules as a pipelined model, opt-in: `import dualpipe_jax` alone imports no Flax.

In: modules for the embedding, a layer and the head; or the parameters of a model with layers of its
own. Out: a `dualpipe_jax.Model`, with `init` for its parameters.
"""

from dualpipe_jax.linen._adapter import LinenModel as LinenModel
from dualpipe_jax.linen._adapter import model as model
from dualpipe_jax.linen._layers import to_canonical as to_canonical
from dualpipe_jax.linen._layers import to_flax as to_flax

__all__ = ["LinenModel", "model", "to_canonical", "to_flax"]
