"""Brings the layers of one stack from their shards to the ranks that run them, and gradients back.

A stack and its gradient are in model order, whatever the schedule. A rank receives the layers of
its chunks (a chunk is a stage that it holds for one direction), and returns their gradients. The
second copy that a bidirectional schedule needs exists only inside the step: one permute brings it,
another returns its gradient, which is added, so that the copies cannot drift. If the spread is even
or nearly so, a formula gives each stage's first layer and number of layers, else a table.
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
    """Spreads layers over stages: int[num_stages + 1], each stage's first layer, and their number.

    If they do not divide, the first stages get one more.

    >>> spread(7, 3)
    array([0, 3, 5, 7])
    """
    stages = np.arange(num_stages + 1)
    fewest, rest = divmod(num_layers, num_stages)
    return stages * fewest + np.minimum(stages, rest)


@dataclass(frozen=True, eq=False, kw_only=True)
class Spread:
    """Divides a row of layers into stages.

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
        """Counts the layers of a stage: an int if all have as many, else an int32 scalar."""
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
    """Spreads the layers of one kind over stages, and the stages over ranks.

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
        """Whether the stack is sharded over the axis, and its layers travel by permutes.

        Else every rank receives the whole stack and takes its layers out of it (JAX has no uneven
        shards).
        """
        return self.num_layers % self.stage_of.shape[1] == 0

    @property
    def shard_layers(self) -> int:
        """Layers of a rank's shard of the stack, and of its gradient."""
        return self.num_layers // (self.stage_of.shape[1] if self.is_sharded else 1)

    def shard_avals(self, layer: PyTree) -> PyTree:
        """Makes avals of a rank's shard from those of one layer."""
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
        """Finds where in its slab `[max_layers, ...]` a stage's first layer is."""
        if self._has_no_offsets:
            return 0
        return self.first_layer_of(stage) - self._slab_start(stage)

    @property
    def _has_no_offsets(self) -> bool:
        return self.is_even or self.is_sharded

    def _offset_of_chunk(self, chunk: int) -> Any:
        return 0 if self._has_no_offsets else self.offset_of(self._stage_of_rank(chunk))

    def fetch(self, stack: PyTree) -> list[PyTree]:
        """Brings each chunk's layers `[max_layers, ...]` to this rank.

        `stack` is this rank's shard `[num_layers / num_ranks, ...]` if `is_sharded`, else all.
        """
        leaves, structure = jax.tree.flatten(stack)
        fetched = [self._fetch(leaf) if self.is_sharded else self._take(leaf) for leaf in leaves]
        chunks = ([leaf[chunk] for leaf in fetched] for chunk in range(self.num_chunks))
        return [jax.tree.unflatten(structure, chunk) for chunk in chunks]

    def unstack(self, chunk: int, slab: PyTree) -> tuple[PyTree, ...]:
        """Cuts a chunk's layers `[max_layers, ...]` apart, the first layer of its stage first."""
        offset = self._offset_of_chunk(chunk)

        def layer(index: int) -> PyTree:
            if isinstance(offset, int):
                return jax.tree.map(lambda leaf: leaf[index], slab)
            # Entries beyond the stage's last layer are read by nobody.
            entry = jnp.minimum(offset + index, self.max_layers - 1)
            return jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, entry, keepdims=False), slab
            )

        return tuple(map(layer, range(self.max_layers)))

    def _join_layers(self, chunk: int, layers: list[jax.Array]) -> jax.Array:
        """Joins a chunk's sums, one for each layer, to an array with the entries of its slab."""
        offset, slab = self._offset_of_chunk(chunk), jnp.stack(layers)
        return slab if isinstance(offset, int) else jnp.roll(slab, offset, axis=0)

    def _take(self, leaf: jax.Array) -> list[jax.Array]:
        starts = (self._slab_start(self._stage_of_rank(c)) for c in range(self.num_chunks))
        return [lax.dynamic_slice_in_dim(leaf, start, self.max_layers) for start in starts]

    @cached_property
    def _is_whole(self) -> bool:
        """Whether in every round every rank gets a whole chunk, and so all of them."""
        size = self.max_layers
        return len(self._rounds) == self.num_chunks and all(
            w.count == size and ((w.entry >= 0) & (w.entry % size == 0)).all() for w in self._rounds
        )

    def _pick(self, which: np.ndarray, pieces: list[jax.Array]) -> jax.Array:
        """Picks one of `pieces` by this rank's number in `which` `[num_ranks]`."""
        index = self._of_rank(which)
        return pieces[index] if isinstance(index, int) else lax.select_n(index, *pieces)

    def _fetch(self, shard: jax.Array) -> list[jax.Array]:
        if self._is_whole:
            return self._fetch_whole(shard)
        size, num_entries = self.max_layers, self.num_chunks * self.max_layers
        # The entry that a piece goes to may depend on the rank. Behind the last entry is room for
        # pieces without one; an entry stays zero if no stage that is held as this chunk fills it.
        spare = max(permute.count for permute in self._rounds)
        stack = jnp.zeros((num_entries + spare, *shard.shape[1:]), shard.dtype)
        whole: dict[int, jax.Array] = {}  # chunks that are one piece on every rank
        for permute in self._rounds:
            piece = _slice(shard, self._of_rank(permute.first), permute.count)
            if not permute.stays:
                piece = lax.ppermute(piece, self.axis, permute.pairs)
            entry = self._of_rank(np.where(permute.entry < 0, num_entries, permute.entry))
            if permute.count == size and isinstance(entry, int):
                whole[entry // size] = piece
            else:
                stack = lax.dynamic_update_slice_in_dim(stack, piece, entry, 0)
        return [
            whole[c] if c in whole else lax.slice_in_dim(stack, c * size, (c + 1) * size)
            for c in range(self.num_chunks)
        ]

    def _fetch_whole(self, shard: jax.Array) -> list[jax.Array]:
        pieces = []
        for permute in self._rounds:
            piece = _slice(shard, self._of_rank(permute.first), permute.count)
            pieces.append(piece if permute.stays else lax.ppermute(piece, self.axis, permute.pairs))
        # which[round, rank]: the chunk that a round brings; its inverse: the round of a chunk
        which = np.stack([permute.entry // self.max_layers for permute in self._rounds])
        return [self._pick(rounds, pieces) for rounds in which.argsort(axis=0)]

    def _of_rank(self, values: np.ndarray) -> Any:
        """Takes this rank's of `values` `[num_ranks]`; an int if all are alike."""
        if len(set(values)) == 1:
            return int(values[0])
        return jnp.asarray(values, jnp.int32)[lax.axis_index(self.axis)]

    def collect(self, grads: list[list[Any]], rules: Sequence[Rule]) -> list[jax.Array]:
        """Adds up the chunks' gradients in the form of the stack, each by its rule."""
        stacked = [
            [self._join_layers(n, leaf) if isinstance(leaf, list) else leaf for leaf in chunk]
            for n, chunk in enumerate(grads)
        ]
        leaves = zip(*stacked, strict=True)
        return [self._collect(list(leaf), rule) for leaf, rule in zip(leaves, rules, strict=True)]

    def _collect(self, chunks: list[jax.Array], rule: Rule) -> jax.Array:
        if self.is_sharded:
            return self._return(chunks, rule)
        total = rule.start((self.num_layers, *chunks[0].shape[1:]), chunks[0].dtype)
        for chunk, leaf in enumerate(chunks):
            start = self._slab_start(self._stage_of_rank(chunk))
            changed = rule.combine(lax.dynamic_slice_in_dim(total, start, self.max_layers), leaf)
            total = lax.dynamic_update_slice_in_dim(total, changed, start, 0)
        return rule.over([total], (self.axis,))[0]

    def _return(self, chunks: list[jax.Array], rule: Rule) -> jax.Array:
        """Sends gradients back the ways of `_fetch`, and adds those that arrive."""
        size, num_entries = self.max_layers, self.num_chunks * self.max_layers
        # Behind the last entry are empty ones, for ranks that received, and so return, nothing.
        spare = max(permute.count for permute in self._rounds)
        stack = _join([*chunks, rule.start((spare, *chunks[0].shape[1:]), chunks[0].dtype)])
        total = None
        for permute in self._rounds:
            entry = self._of_rank(np.where(permute.entry < 0, num_entries, permute.entry))
            if self._is_whole:
                piece = self._pick(permute.entry // size, chunks)
            elif permute.count == size and isinstance(entry, int):
                piece = chunks[entry // size]
            else:
                piece = _slice(stack, entry, permute.count)
            if not permute.stays:
                piece = lax.ppermute(piece, self.axis, [(t, s) for s, t in permute.pairs])
                if rule.nothing and (permute.target < 0).any():
                    # A rank that sent nothing gets zeros back.
                    sent = self._of_rank((permute.target >= 0).astype(int)) > 0
                    piece = jnp.where(sent, piece, rule.nothing)
            if permute.count == self.shard_layers:
                total = piece if total is None else rule.combine(total, piece)
                continue
            if total is None:
                total = rule.start((self.shard_layers, *piece.shape[1:]), piece.dtype)
            first = self._of_rank(permute.first)
            changed = rule.combine(_slice(total, first, permute.count), piece)
            total = lax.dynamic_update_slice_in_dim(total, changed, first, 0)
        assert total is not None
        return total

    def _stage_of_rank(self, chunk: int) -> jax.Array:
        # A rank without this chunk never runs it: any stage will do.
        stages = np.maximum(self.stage_of[chunk], 0).astype(np.int32)
        return jnp.asarray(stages)[lax.axis_index(self.axis)]


def _slice(stack: jax.Array, first: Any, count: int) -> jax.Array:
    """Takes entries `[first, first + count)`, or all if there are no more."""
    return stack if stack.shape[0] == count else lax.dynamic_slice_in_dim(stack, first, count)


def _join(pieces: list[jax.Array]) -> jax.Array:
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces)
