"""How layers in a row are spread over stages: where each stage's begin, and how many it has.

Found by formula where the spread is even or nearly so, else looked up in a table.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from dualpipe_jax._executor import buffers


def spread(num_layers: int, num_stages: int) -> np.ndarray:
    """Spreads layers over stages: int[num_stages + 1], each stage's first one, and their number.

    Where they do not divide, the first stages get one more.

    >>> spread(7, 3)
    array([0, 3, 5, 7])
    """
    stages = np.arange(num_stages + 1)
    fewest, rest = divmod(num_layers, num_stages)
    return stages * fewest + np.minimum(stages, rest)


@dataclass(frozen=True, eq=False, kw_only=True)
class Spread:
    """Layers in a row, each stage's after those of the stage before.

    Attributes:
      first_layers: int[num_stages + 1], each stage's first layer, and the number of layers.
    """

    first_layers: np.ndarray

    @property
    def num_layers(self) -> int:
        """Layers of all stages."""
        return int(self.first_layers[-1])

    @property
    def num_stages(self) -> int:
        """Stages of the schedule."""
        return len(self.first_layers) - 1

    @property
    def max_layers(self) -> int:
        """Layers of the stage that has the most."""
        return int(np.diff(self.first_layers).max())

    @cached_property
    def is_even(self) -> bool:
        """Whether all stages have the same number of layers."""
        return len(set(np.diff(self.first_layers).tolist())) == 1

    @cached_property
    def _follows_formula(self) -> bool:
        return bool((self.first_layers == spread(self.num_layers, self.num_stages)).all())

    def num_layers_of(self, stage: Any) -> Any:
        """Counts the layers of a stage: an int where all have as many, else an int32 scalar."""
        if not self._follows_formula:
            return buffers.read(jnp.asarray(np.diff(self.first_layers), jnp.int32), stage)
        fewest, rest = divmod(self.num_layers, self.num_stages)
        return fewest if self.is_even else fewest + (stage < rest).astype(jnp.int32)

    def first_layer_of(self, stage: Any) -> Any:
        """Finds a stage's first layer, an int32 scalar."""
        if not self._follows_formula:
            return buffers.read(jnp.asarray(self.first_layers, jnp.int32), stage)
        fewest, rest = divmod(self.num_layers, self.num_stages)
        return stage * fewest + jnp.minimum(stage, rest)
