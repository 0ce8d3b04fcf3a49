"""How what microbatches, layers' copies, ranks and shards give of one leaf becomes its gradient.

Gradients are added up. Of a leaf that its gradient overwrites, such as a scale of float8 or a
history of largest values, each microbatch gives a new value, and the largest counts: what none of
them may leave out of account.
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
        """Makes an array of what changes nothing."""
        return jnp.full(shape, self.nothing, dtype)


SUM = Rule(0, jnp.add, varying.sum_over)
LARGEST = Rule(-jnp.inf, jnp.maximum, varying.largest_over)


def rules_of(overwritten: Iterable[bool]) -> list[Rule]:
    """Gives each leaf its rule."""
    return [LARGEST if flag else SUM for flag in overwritten]
