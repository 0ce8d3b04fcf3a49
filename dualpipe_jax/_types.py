"""What a user hands over (`Model`) and what their functions are given (`Context`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """What a model function may look at besides its parameters and its input.

    Attributes:
      microbatch: This microbatch's slice of `batch`: the same pytree, leaves of shape
        `[batch_size / num_microbatches, ...]`.
      layer: The global layer index, an int32 scalar, in blocks; None in embed and head.
      rng: A key for this microbatch and layer, the same in every schedule; None without `rng=`.
        With `k = jax.random.fold_in(rng, m)`, block `l` gets `fold_in(k, l)`, embed
        `fold_in(k, num_layers)` and head `fold_in(k, num_layers + 1)`.
      shared: `params["shared"]`, parameters that all blocks (and embed and head) may use; None
        without. Their gradient is the sum over all uses.
    """

    microbatch: PyTree
    layer: jax.Array | None = None
    rng: jax.Array | None = None
    shared: PyTree = None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model as pure functions, from which every schedule builds its stages.

    Attributes:
      embed: `(ends, ctx) -> x`, the first thing, on the first stage. `x` is any pytree of arrays.
      block: `(block_params, x, ctx) -> x`, one layer; its parameters come without the layer dim,
        and `x` leaves with the structure, shapes and dtypes with which it came.
      head: `(ends, x, ctx) -> loss`, the last thing, on the last stage: a floating-point scalar.
      weight: `(microbatch) -> scalar`, or None. With it the loss is sum(head) / sum(weight) over
        the microbatches, and head returns a sum; without it the loss is the mean of head.
      has_aux: Whether head returns `(loss, metrics)`; metrics are summed over microbatches.
      block_has_aux: Whether block returns `(x, aux_loss)`; the aux losses are summed over layers,
        averaged over microbatches, never weighted, and added to the loss.
    """

    embed: Callable[..., PyTree]
    block: Callable[..., PyTree]
    head: Callable[..., PyTree]
    weight: Callable[[PyTree], Any] | None = None
    has_aux: bool = False
    block_has_aux: bool = False
