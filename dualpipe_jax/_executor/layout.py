"""Where the layers of each stage lie: from the canonical stack to the ranks, and gradients back.

`blocks` and its gradient are stacks in model order, whatever the schedule. Here a rank gets the
layers of each of its chunks (a stage that it holds for one direction), and gives their gradients
back. The second copy that a bidirectional schedule needs exists only inside the step: it comes by
one permute, and its gradient leaves by one permute and is added, so the copies cannot drift.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _microbatches
from dualpipe_jax._executor.registers import when

PyTree = Any

# Layers are unrolled up to this number a stage: XLA then fuses and schedules across them. Beyond,
# a loop keeps program size and compile time from growing with depth.
_MAX_UNROLLED = 4


@dataclass(frozen=True, eq=False, kw_only=True)
class Layout:
    """Spreads `num_layers` layers over stages, and stages over ranks.

    Attributes:
      axis: The name of the pipeline axis.
      num_layers: Layers of the model. Where they do not divide, the first stages get one more.
      num_stages: Stages of the schedule.
      stage_of: int[num_chunks, num_ranks], the stage that each rank holds as each chunk, or -1.
    """

    axis: str
    num_layers: int
    num_stages: int
    stage_of: np.ndarray

    @property
    def num_chunks(self) -> int:
        """Stages that a rank holds, over both directions."""
        return self.stage_of.shape[0]

    @property
    def max_layers(self) -> int:
        """Layers of the first stage, which has the most."""
        return -(-self.num_layers // self.num_stages)

    @property
    def is_even(self) -> bool:
        """Whether all stages have the same number of layers."""
        return self.num_layers % self.num_stages == 0

    @cached_property
    def is_sharded(self) -> bool:
        """Whether `blocks` lies over the axis as it is: a stage a rank, in order.

        Else every rank is given the whole stack and takes its layers out of it (JAX has no uneven
        shards).
        """
        num_ranks = self.stage_of.shape[1]
        ranks = np.arange(num_ranks)
        return (
            self.is_even
            and self.num_stages == num_ranks
            and all(np.array_equal(np.sort(chunk), ranks) for chunk in self.stage_of)
        )

    @property
    def is_unrolled(self) -> bool:
        """Whether a stage's layers stand in the program one after the other, not in a loop."""
        return self.is_even and self.max_layers <= _MAX_UNROLLED

    def num_layers_of(self, stage: Any) -> Any:
        """Counts the layers of a stage: an int where all have as many, else an int32 scalar."""
        fewest, rest = divmod(self.num_layers, self.num_stages)
        return fewest if self.is_even else fewest + (stage < rest).astype(jnp.int32)

    def first_layer_of(self, stage: Any) -> Any:
        """Finds the global index of a stage's first layer, an int32 scalar."""
        fewest, rest = divmod(self.num_layers, self.num_stages)
        return stage * fewest + jnp.minimum(stage, rest)

    def _slab_start(self, stage: Any) -> Any:
        # A slab of max_layers must not reach beyond the stack: the last stage's starts early.
        return jnp.minimum(self.first_layer_of(stage), self.num_layers - self.max_layers)

    def offset_of(self, stage: Any) -> Any:
        """Finds where in its slab `[max_layers, ...]` a stage's first layer lies: 0 or 1."""
        return 0 if self.is_even else self.first_layer_of(stage) - self._slab_start(stage)

    def fetch(self, blocks: PyTree) -> list[PyTree]:
        """Brings each chunk's layers `[max_layers, ...]` to this rank.

        `blocks` is this rank's shard `[num_layers / num_ranks, ...]` if `is_sharded`, else all.
        """
        return [
            jax.tree.map(lambda leaf, c=c: self._fetch(leaf, c), blocks)
            for c in range(self.num_chunks)
        ]

    def _fetch(self, leaf: jax.Array, chunk: int) -> jax.Array:
        stages = self.stage_of[chunk]
        if not self.is_sharded:
            start = self._slab_start(self._my_stage(chunk))
            return lax.dynamic_slice_in_dim(leaf, start, self.max_layers)
        if np.array_equal(stages, np.arange(len(stages))):
            return leaf
        return lax.ppermute(leaf, self.axis, [(int(s), r) for r, s in enumerate(stages)])

    def zero_grads(self, avals: list[Any]) -> list[Any]:
        """Makes the accumulators of a chunk whose leaves have `avals` `[max_layers, ...]`.

        Each is an array, or with unrolled layers a list of arrays without the layer dim.
        """
        if not self.is_unrolled:
            return _microbatches.zeros_for_sum(avals)
        return [
            [
                jnp.zeros(aval.shape[1:], _microbatches.accumulator_dtype(aval.dtype))
                for _ in range(self.max_layers)
            ]
            for aval in avals
        ]

    def collect(self, grads: list[list[Any]]) -> list[jax.Array]:
        """Adds up the chunks' gradients where the layers lie, as `blocks`."""
        stacked = [
            [jnp.stack(leaf) if isinstance(leaf, list) else leaf for leaf in chunk]
            for chunk in grads
        ]
        return [self._collect(list(leaves)) for leaves in zip(*stacked, strict=True)]

    def _collect(self, chunks: list[jax.Array]) -> jax.Array:
        total = None
        if self.is_sharded:
            for stages, leaf in zip(self.stage_of, chunks, strict=True):
                if not np.array_equal(stages, np.arange(len(stages))):
                    perm = [(r, int(s)) for r, s in enumerate(stages)]
                    leaf = lax.ppermute(leaf, self.axis, perm)
                total = leaf if total is None else total + leaf
            assert total is not None
            return total
        total = jnp.zeros((self.num_layers, *chunks[0].shape[1:]), chunks[0].dtype)
        for chunk, leaf in enumerate(chunks):
            start = self._slab_start(self._my_stage(chunk))
            mine = lax.dynamic_slice_in_dim(total, start, self.max_layers) + leaf
            total = lax.dynamic_update_slice_in_dim(total, mine, start, 0)
        return lax.psum(total, self.axis)

    def _my_stage(self, chunk: int) -> jax.Array:
        # A rank without this chunk never runs it: any stage will do.
        stages = np.maximum(self.stage_of[chunk], 0).astype(np.int32)
        return jnp.asarray(stages)[lax.axis_index(self.axis)]

    def loop(
        self,
        stage: Any,
        is_on: Any,
        body: Callable[[Any, Any], Any],
        carry: Any,
        *,
        reverse: bool = False,
    ) -> Any:
        """Runs `body(layer, carry) -> carry` for a stage's layers, from 0, if `is_on` holds."""
        count = self.num_layers_of(stage)
        if self.is_unrolled:

            def unrolled(carry: Any) -> Any:
                for layer in reversed(range(count)) if reverse else range(count):
                    carry = body(layer, carry)
                return carry

            return when(is_on, unrolled, carry)
        return lax.fori_loop(
            0,
            jnp.where(is_on, count, 0),
            lambda i, carry: body(count - 1 - i if reverse else i, carry),
            carry,
        )
