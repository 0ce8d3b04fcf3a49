"""Combines the gradients of one leaf: of microbatches, of copies of layers, of ranks and shards.

Gradients are added up. A leaf that its gradient overwrites, such as a scale of float8 or a history
of largest values, gets a new value from each microbatch, and the largest is kept: it holds for all
of them.
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
