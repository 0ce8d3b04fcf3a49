"""Flax NNX modules as a pipelined model, opt-in: `import dualpipe_jax` alone imports no Flax.

In: a module that holds a list, or a stack, of layers. Out: a `dualpipe_jax.Model`, and gradients as
`nnx.Optimizer.update` takes them.
"""

from dualpipe_jax.nnx._adapter import NNXModel as NNXModel
from dualpipe_jax.nnx._adapter import model as model
from dualpipe_jax.nnx._adapter import value_and_grad as value_and_grad

__all__ = ["NNXModel", "model", "value_and_grad"]
