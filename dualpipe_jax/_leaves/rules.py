"""Combines the gradients of one leaf over microbatches, copies of layers, ranks and shards.

Gradients are added up. For a leaf that its gradient overwrites, such as float8's scales and
histories of largest values, each microbatch gives a new value, and the largest one is kept, because
it is valid for all microbatches.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._model import varying


@dataclass(frozen=True)
class Rule:
    """Combines values of one leaf.

    Attributes:
      nothing: The value that changes nothing.
      combine: Combines two arrays.
      over: Combines lists of arrays over mesh axes.
    """

    nothing: float
    combine: Callable[[jax.Array, jax.Array], jax.Array]
    over: Callable[[list[jax.Array], Iterable[str]], list[jax.Array]]

    def add(self, total: jax.Array, value: jax.Array) -> jax.Array:
        """Combines in the dtype of `total`."""
        return self.combine(total, jnp.asarray(value).astype(total.dtype))

    def start(self, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        """Makes an array of the value that changes nothing."""
        return jnp.full(shape, self.nothing, dtype)


SUM = Rule(0, jnp.add, varying.sum_over)
LARGEST = Rule(-jnp.inf, jnp.maximum, varying.largest_over)
