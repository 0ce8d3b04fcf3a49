"""Where the layers of one stack lie: from the canonical stack to the ranks, and gradients back.

A stack and its gradient are in model order, whatever the schedule. Here a rank gets the layers of
each of its chunks (a stage that it holds for one direction), and gives their gradients back. The
second copy that a bidirectional schedule needs exists only inside the step: it comes by a permute,
and its gradient leaves by a permute and is added, so the copies cannot drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._executor import buffers
from dualpipe_jax._executor.travel import Round, plan_travel
from dualpipe_jax._leaves.rules import Rule
from dualpipe_jax._model.types import PyTree


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


@dataclass(frozen=True, eq=False, kw_only=True)
class Stack(Spread):
    """The layers of one kind, spread over stages, and the stages over ranks.

    Attributes:
      axis: The name of the pipeline axis.
      stage_of: int[num_chunks, num_ranks], the stage that each rank holds as each chunk, or -1.
    """

    axis: str
    stage_of: np.ndarray

    @property
    def num_chunks(self) -> int:
        """Stages that a rank holds, over both directions."""
        return self.stage_of.shape[0]

    @property
    def is_sharded(self) -> bool:
        """Whether the stack lies over the axis, as many layers a rank, to travel by permutes.

        Else every rank is given the whole stack and takes its layers out of it (JAX has no uneven
        shards).
        """
        return self.num_layers % self.stage_of.shape[1] == 0

    @property
    def shard_layers(self) -> int:
        """Layers of what a rank is given of the stack, and gives back of its gradient."""
        return self.num_layers // (self.stage_of.shape[1] if self.is_sharded else 1)

    def shard_avals(self, layer: PyTree) -> PyTree:
        """Makes avals of a rank's shard, of those of one layer."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((self.shard_layers, *leaf.shape), leaf.dtype), layer
        )

    @cached_property
    def _rounds(self) -> list[Round]:
        return plan_travel(
            stage_of=self.stage_of, first_layers=self.first_layers, shard_layers=self.shard_layers
        )

    def _slab_start(self, stage: Any) -> Any:
        # A slab of max_layers must not reach beyond the stack: the last stage's starts early.
        return jnp.minimum(self.first_layer_of(stage), self.num_layers - self.max_layers)

    def offset_of(self, stage: Any) -> Any:
        """Finds where in its slab `[max_layers, ...]` a stage's first layer lies."""
        if self.is_even or self.is_sharded:
            return 0
        return self.first_layer_of(stage) - self._slab_start(stage)

    def fetch(self, stack: PyTree) -> list[PyTree]:
        """Brings each chunk's layers `[max_layers, ...]` to this rank.

        `stack` is this rank's shard `[num_layers / num_ranks, ...]` if `is_sharded`, else all.
        """
        leaves, structure = jax.tree.flatten(stack)
        fetched = [self._fetch(leaf) if self.is_sharded else self._take(leaf) for leaf in leaves]
        chunks = ([leaf[chunk] for leaf in fetched] for chunk in range(self.num_chunks))
        return [jax.tree.unflatten(structure, chunk) for chunk in chunks]

    def _take(self, leaf: jax.Array) -> list[jax.Array]:
        starts = (self._slab_start(self._my_stage(c)) for c in range(self.num_chunks))
        return [lax.dynamic_slice_in_dim(leaf, start, self.max_layers) for start in starts]

    @cached_property
    def _is_whole(self) -> bool:
        """Whether in every round every rank gets a whole chunk, and so all of them."""
        size = self.max_layers
        return len(self._rounds) == self.num_chunks and all(
            w.count == size and ((w.place >= 0) & (w.place % size == 0)).all() for w in self._rounds
        )

    def _pick(self, which: np.ndarray, pieces: list[jax.Array]) -> jax.Array:
        """Picks one of `pieces` by this rank's entry of `which` `[num_ranks]`."""
        index = self._mine(which)
        return pieces[index] if isinstance(index, int) else lax.select_n(index, *pieces)

    def _fetch(self, shard: jax.Array) -> list[jax.Array]:
        if self._is_whole:
            return self._fetch_whole(shard)
        size, num_places = self.max_layers, self.num_chunks * self.max_layers
        # Which place a piece goes to may depend on the rank. Behind the last place is room for what
        # has none; a place gets nothing if no stage that is held as this chunk fills it.
        spare = max(way.count for way in self._rounds)
        stack = jnp.zeros((num_places + spare, *shard.shape[1:]), shard.dtype)
        whole: dict[int, jax.Array] = {}  # chunks that are one piece on every rank
        for way in self._rounds:
            piece = _slice(shard, self._mine(way.first), way.count)
            if not way.stays:
                piece = lax.ppermute(piece, self.axis, way.pairs)
            place = self._mine(np.where(way.place < 0, num_places, way.place))
            if way.count == size and isinstance(place, int):
                whole[place // size] = piece
            else:
                stack = lax.dynamic_update_slice_in_dim(stack, piece, place, 0)
        return [
            whole[c] if c in whole else lax.slice_in_dim(stack, c * size, (c + 1) * size)
            for c in range(self.num_chunks)
        ]

    def _fetch_whole(self, shard: jax.Array) -> list[jax.Array]:
        pieces = []
        for way in self._rounds:
            piece = _slice(shard, self._mine(way.first), way.count)
            pieces.append(piece if way.stays else lax.ppermute(piece, self.axis, way.pairs))
        # which[round, rank]: the chunk that comes in a round; its inverse: the round of a chunk
        which = np.stack([way.place // self.max_layers for way in self._rounds])
        return [self._pick(rounds, pieces) for rounds in which.argsort(axis=0)]

    def _mine(self, values: np.ndarray) -> Any:
        """This rank's entry of `values` `[num_ranks]`; an int if all are alike."""
        if len(set(values)) == 1:
            return int(values[0])
        return jnp.asarray(values, jnp.int32)[lax.axis_index(self.axis)]

    def collect(self, grads: list[list[Any]], rules: Sequence[Rule]) -> list[jax.Array]:
        """Adds up the chunks' gradients where the layers lie, as the stack, each by its rule."""
        stacked = [
            [jnp.stack(leaf) if isinstance(leaf, list) else leaf for leaf in chunk]
            for chunk in grads
        ]
        leaves = zip(*stacked, strict=True)
        return [self._collect(list(leaf), rule) for leaf, rule in zip(leaves, rules, strict=True)]

    def _collect(self, chunks: list[jax.Array], rule: Rule) -> jax.Array:
        if self.is_sharded:
            return self._return(chunks, rule)
        total = rule.start((self.num_layers, *chunks[0].shape[1:]), chunks[0].dtype)
        for chunk, leaf in enumerate(chunks):
            start = self._slab_start(self._my_stage(chunk))
            mine = rule.combine(lax.dynamic_slice_in_dim(total, start, self.max_layers), leaf)
            total = lax.dynamic_update_slice_in_dim(total, mine, start, 0)
        return rule.over([total], (self.axis,))[0]

    def _return(self, chunks: list[jax.Array], rule: Rule) -> jax.Array:
        """Takes the ways of `_fetch` back, adding what comes to what is there."""
        size, num_places = self.max_layers, self.num_chunks * self.max_layers
        # Behind the last place lies nothing, for ranks that got nothing and so send nothing.
        spare = max(way.count for way in self._rounds)
        stack = _join([*chunks, rule.start((spare, *chunks[0].shape[1:]), chunks[0].dtype)])
        total = None
        for way in self._rounds:
            place = self._mine(np.where(way.place < 0, num_places, way.place))
            if self._is_whole:
                piece = self._pick(way.place // size, chunks)
            elif way.count == size and isinstance(place, int):
                piece = chunks[place // size]
            else:
                piece = _slice(stack, place, way.count)
            if not way.stays:
                piece = lax.ppermute(piece, self.axis, [(t, s) for s, t in way.pairs])
                if rule.nothing and (way.target < 0).any():
                    # A rank that sent nothing gets zeros back.
                    sent = self._mine((way.target >= 0).astype(int)) > 0
                    piece = jnp.where(sent, piece, rule.nothing)
            if way.count == self.shard_layers:
                total = piece if total is None else rule.combine(total, piece)
                continue
            if total is None:
                total = rule.start((self.shard_layers, *piece.shape[1:]), piece.dtype)
            first = self._mine(way.first)
            mine = rule.combine(_slice(total, first, way.count), piece)
            total = lax.dynamic_update_slice_in_dim(total, mine, first, 0)
        assert total is not None
        return total

    def _my_stage(self, chunk: int) -> jax.Array:
        # A rank without this chunk never runs it: any stage will do.
        stages = np.maximum(self.stage_of[chunk], 0).astype(np.int32)
        return jnp.asarray(stages)[lax.axis_index(self.axis)]


def _slice(stack: jax.Array, first: Any, count: int) -> jax.Array:
    """Takes entries `[first, first + count)`, or all if there are no more."""
    return stack if stack.shape[0] == count else lax.dynamic_slice_in_dim(stack, first, count)


def _join(pieces: list[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
