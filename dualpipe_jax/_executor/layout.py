"""Where the layers of each stage lie: from the canonical stack to the ranks, and gradients back.

`blocks` and its gradient are stacks in model order, whatever the schedule. Here a rank gets the
layers of each of its chunks (a stage that it holds for one direction), and gives their gradients
back. The second copy that a bidirectional schedule needs exists only inside the step: it comes by
a permute, and its gradient leaves by a permute and is added, so the copies cannot drift.
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
from dualpipe_jax._executor.travel import Travel, plan_travel

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

    @property
    def is_sharded(self) -> bool:
        """Whether `blocks` lies over the axis, as many layers a rank, to travel by permutes.

        Else every rank is given the whole stack and takes its layers out of it (JAX has no uneven
        shards).
        """
        return self.num_layers % self.stage_of.shape[1] == 0

    @property
    def shard_layers(self) -> int:
        """Layers of what a rank is given of `blocks`, and gives back of its gradient."""
        return self.num_layers // (self.stage_of.shape[1] if self.is_sharded else 1)

    @cached_property
    def _travel(self) -> Travel:
        stages = np.arange(self.num_stages + 1)
        fewest, rest = divmod(self.num_layers, self.num_stages)
        return plan_travel(
            stage_of=self.stage_of,
            first_layers=stages * fewest + np.minimum(stages, rest),
            shard_layers=self.shard_layers,
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
        if self.is_even or self.is_sharded:
            return 0
        return self.first_layer_of(stage) - self._slab_start(stage)

    def fetch(self, blocks: PyTree) -> list[PyTree]:
        """Brings each chunk's layers `[max_layers, ...]` to this rank.

        `blocks` is this rank's shard `[num_layers / num_ranks, ...]` if `is_sharded`, else all.
        """
        leaves, structure = jax.tree.flatten(blocks)
        fetch = self._fetch if self.is_sharded else self._take
        chunks = zip(*map(fetch, leaves), strict=True)
        return [jax.tree.unflatten(structure, chunk) for chunk in chunks]

    def _take(self, leaf: jax.Array) -> list[jax.Array]:
        starts = (self._slab_start(self._my_stage(c)) for c in range(self.num_chunks))
        return [lax.dynamic_slice_in_dim(leaf, start, self.max_layers) for start in starts]

    def _fetch(self, shard: jax.Array) -> list[jax.Array]:
        travel = self._travel
        size = travel.piece_layers
        num_places = self.num_chunks * travel.chunk_pieces
        places: list[Any] = [None] * num_places
        moving = []
        for way in travel.rounds:
            piece = _slice(shard, self._mine(way.piece), size)
            if not way.stays:
                piece = lax.ppermute(piece, self.axis, way.pairs)
            if len(set(way.place)) == 1:
                places[way.place[0]] = piece
            else:
                moving.append((way.place, piece))
        if moving:
            # Which place a piece goes to depends on the rank; a last place takes what has none.
            stack = jnp.zeros(((num_places + 1) * size, *shard.shape[1:]), shard.dtype)
            for place, piece in moving:
                place = self._mine(np.where(place < 0, num_places, place))
                stack = lax.dynamic_update_slice_in_dim(stack, piece, place * size, 0)
            places = [
                lax.slice_in_dim(stack, i * size, (i + 1) * size) if piece is None else piece
                for i, piece in enumerate(places)
            ]
        count = travel.chunk_pieces
        return [_join(places[c * count : (c + 1) * count]) for c in range(self.num_chunks)]

    def _mine(self, values: np.ndarray) -> Any:
        """This rank's entry of `values` `[num_ranks]`; an int if all are alike."""
        if len(set(values)) == 1:
            return int(values[0])
        return jnp.asarray(values, jnp.int32)[lax.axis_index(self.axis)]

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
        if self.is_sharded:
            return self._return(chunks)
        total = jnp.zeros((self.num_layers, *chunks[0].shape[1:]), chunks[0].dtype)
        for chunk, leaf in enumerate(chunks):
            start = self._slab_start(self._my_stage(chunk))
            mine = lax.dynamic_slice_in_dim(total, start, self.max_layers) + leaf
            total = lax.dynamic_update_slice_in_dim(total, mine, start, 0)
        return lax.psum(total, self.axis)

    def _return(self, chunks: list[jax.Array]) -> jax.Array:
        """Takes the ways of `_fetch` back, adding what comes to what is there."""
        travel = self._travel
        size, num_places = travel.piece_layers, self.num_chunks * travel.chunk_pieces
        # Behind the last place lie zeros, for ranks that got nothing and so send nothing.
        empty = jnp.zeros((size, *chunks[0].shape[1:]), chunks[0].dtype)
        is_full = all((way.place >= 0).all() for way in travel.rounds)
        stack = None if is_full and travel.chunk_pieces == 1 else _join([*chunks, empty])
        total = None
        for way in travel.rounds:
            place = self._mine(np.where(way.place < 0, num_places, way.place))
            if stack is None and isinstance(place, int):
                piece = chunks[place]
            else:
                stack = _join([*chunks, empty]) if stack is None else stack
                piece = _slice(stack, place, size)
            if not way.stays:
                piece = lax.ppermute(piece, self.axis, [(t, s) for s, t in way.pairs])
            if size == self.shard_layers:
                total = piece if total is None else total + piece
                continue
            if total is None:
                total = jnp.zeros((self.shard_layers, *piece.shape[1:]), piece.dtype)
            # A rank that sent nothing gets zeros back.
            start = self._mine(way.piece)
            mine = _slice(total, start, size) + piece
            total = lax.dynamic_update_slice_in_dim(total, mine, start * size, 0)
        assert total is not None
        return total

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


def _slice(stack: jax.Array, index: Any, size: int) -> jax.Array:
    """Takes entries `[index * size, (index + 1) * size)`, or all if there are no more."""
    if stack.shape[0] == size:
        return stack
    return lax.dynamic_slice_in_dim(stack, index * size, size)


def _join(pieces: list[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
