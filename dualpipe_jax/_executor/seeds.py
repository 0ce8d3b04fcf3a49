"""The cotangents with which the backward of each microbatch begins.

In: how many microbatches there are, or their weight, and by what the user scales the loss. Out: the
cotangents of a microbatch's loss and of a layer's aux loss.
"""

import jax
import jax.numpy as jnp

from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.returns import Outputs


def make_seeds(
    outs: Outputs, *, count: int, weight: jax.Array | None, scale: jax.Array | None
) -> tuple[jax.Array | None, dict[Kind, jax.Array | None]]:
    """Makes the cotangents, in the dtypes of what they belong to.

    d loss / d head = scale / count, or scale / total weight; d loss / d aux loss = scale / count.

    Args:
      outs: Avals of the losses.
      count: Microbatches of all shards.
      weight: Their total weight, or None.
      scale: By what the loss is scaled, a scalar; None for 1.

    Returns:
      The cotangent of the head's loss, None without one; and for each kind of layer that of its aux
      loss, or None.
    """

    def seed(loss: jax.Array, total: jax.Array) -> jax.Array:
        # Scaled before it is rounded to the loss's own dtype, in which it might be lost.
        dtype = semantics.accumulator_dtype(loss.dtype)
        value = 1 / total.astype(dtype)
        return (value if scale is None else value * scale.astype(dtype)).astype(loss.dtype)

    total = jnp.asarray(count)
    of_head = None if outs.loss is None else seed(outs.loss, total if weight is None else weight)
    of_aux = {
        kind: None if aux.loss is None else seed(aux.loss, total) for kind, aux in outs.aux.items()
    }
    return of_head, of_aux
