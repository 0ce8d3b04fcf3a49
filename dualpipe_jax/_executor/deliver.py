"""Delivers outputs from the ranks where the pipeline ends to those that keep them.

Rank r keeps those of microbatches `[r S, (r + 1) S)`, S = ceil(N / P), so that no rank ever holds
more than its part of the batch. They travel round the ring of ranks, one rank a tick and at most
about half of the ring: those made on the last rank by way of rank 0 upwards, those made on rank 0
by way of the last rank downwards. A rank forwards outputs of others at once; as a rank finishes at
most one microbatch a tick, no two of a direction ever meet on a rank.

Four ranks, eight microbatches, two a rank:

    direction 0, microbatches 0..3: rank 3 -> rank 0 (0, 1) -> rank 1 (2, 3)
    direction 1, microbatches 4..7: rank 0 -> rank 3 (6, 7) -> rank 2 (4, 5)
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _scopes
from dualpipe_jax._executor import buffers
from dualpipe_jax._executor.buffers import when
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.actions import FORWARD
from dualpipe_jax._schedule.tables import Tables


class Parcel(NamedTuple):
    """Holds the outputs of one microbatch on their way.

    Attributes:
      outputs: The outputs, `[rows, ...]`.
      microbatch: Its number, an int32 scalar; -1 for none.
    """

    outputs: PyTree
    microbatch: jax.Array


class Mail(NamedTuple):
    """Holds the outputs that a rank keeps, and those that it sends on.

    Attributes:
      kept: The outputs that it keeps, `[S, rows, ...]`.
      parcels: For each chunk the outputs to be sent on after this tick.
    """

    kept: PyTree
    parcels: list[Parcel]


@dataclass(frozen=True, eq=False, kw_only=True)
class Delivery:
    """Delivers outputs to their ranks.

    Attributes:
      axis: The pipeline axis.
      tables: The tables, of a forward-only program with a direction for each chunk.
    """

    axis: str
    tables: Tables

    @property
    def is_even(self) -> bool:
        """Whether all ranks keep the outputs of the same number of microbatches."""
        return self.tables.num_microbatches % self.tables.num_ranks == 0

    @property
    def share(self) -> int:
        """Microbatches whose outputs a rank keeps, at most."""
        return -(-self.tables.num_microbatches // self.tables.num_ranks)

    @cached_property
    def _steps(self) -> list[int]:
        """Ranks that a parcel of each chunk moves a tick, away from the rank of the last stage."""
        ends = (self.tables.stage_of == self.tables.num_stages - 1).argmax(axis=1)
        return [1 if end == self.tables.num_ranks - 1 else -1 for end in ends]

    @cached_property
    def _moves(self) -> np.ndarray:
        """bool[ticks, num_chunks], whether any parcel of a chunk is on its way after a tick.

        There may be more ticks than the tables have.
        """
        tables = self.tables
        is_end = (tables.opcode == FORWARD) & (tables.stage == tables.num_stages - 1)
        ways = []
        for tick, rank in np.argwhere(is_end):
            chunk, owner = tables.chunk[tick, rank], tables.microbatch[tick, rank] // self.share
            hops = (owner - rank) * self._steps[chunk] % tables.num_ranks
            ways.append((tick, tick + hops, chunk))
        last = max(tables.num_ticks, *(end for _, end, _ in ways))
        moves = np.zeros((last, tables.num_chunks), bool)
        for tick, end, chunk in ways:
            moves[tick:end, chunk] = True
        return moves

    def rows(self) -> tuple[jax.Array, jax.Array]:
        """Says in which ticks, and in which later ones, parcels move: bool[ticks, num_chunks]."""
        moves = jnp.asarray(self._moves)
        return moves[: self.tables.num_ticks], moves[self.tables.num_ticks :]

    def start(self, avals: PyTree) -> Mail:
        """Allocates the mail for outputs, which have `avals` for a microbatch."""
        nothing = Parcel(buffers.allocate(avals), jnp.int32(-1))
        kept = buffers.allocate(avals, self.share)
        return Mail(kept=kept, parcels=[nothing] * self.tables.num_chunks)

    def post(self, mail: Mail, outputs: PyTree, microbatch: jax.Array, chunk: jax.Array) -> Mail:
        """Keeps a microbatch's outputs, or sends them on their way."""
        kept, parcel = self._keep(mail.kept, Parcel(outputs, microbatch))
        parcels = [
            jax.tree.map(lambda new, old: jnp.where(chunk == c, new, old), parcel, old)  # noqa: B023
            for c, old in enumerate(mail.parcels)
        ]
        return Mail(kept, parcels)

    def move(self, mail: Mail, moves: jax.Array) -> Mail:
        """Moves the parcels of the chunks in `moves`, bool[num_chunks], by one rank."""
        size = self.tables.num_ranks
        if size == 1:
            return mail
        kept, parcels = mail
        for chunk, step in enumerate(self._steps):
            pairs = [(r, (r + step) % size) for r in range(size)]

            def send(parcel: Parcel, pairs: Any = pairs) -> Parcel:
                with jax.named_scope(_scopes.SEND):
                    return lax.ppermute(parcel, self.axis, pairs)

            parcel = lax.cond(moves[chunk], send, lambda parcel: parcel, parcels[chunk])
            kept, parcel = self._keep(kept, parcel)
            parcels = [*parcels[:chunk], parcel, *parcels[chunk + 1 :]]
        return Mail(kept, parcels)

    def finish(self, mail: Mail, later: jax.Array) -> PyTree:
        """Delivers the parcels that are still on their way, and returns this rank's rows, in order.

        Returns:
          The outputs: `[S rows, ...]` of this rank's microbatches if `is_even`, else all rows.
        """
        mail, _ = lax.scan(lambda mail, moves: (self.move(mail, moves), None), mail, later)

        def rows(leaf: jax.Array) -> jax.Array:
            size = leaf.shape[1]
            kept = leaf.reshape(leaf.shape[0] * size, *leaf.shape[2:])
            if self.is_even:
                return kept
            whole = lax.all_gather(kept, self.axis, tiled=True)
            return whole[: self.tables.num_microbatches * size]

        return jax.tree.map(rows, mail.kept)

    def _keep(self, kept: PyTree, parcel: Parcel) -> tuple[PyTree, Parcel]:
        """Keeps a parcel that has reached its rank, and empties it."""
        first = lax.axis_index(self.axis) * self.share
        entry = parcel.microbatch - first
        is_own = (parcel.microbatch >= 0) & (entry >= 0) & (entry < self.share)
        kept = when(is_own, lambda kept: buffers.write(kept, parcel.outputs, entry), kept)
        return kept, parcel._replace(microbatch=jnp.where(is_own, -1, parcel.microbatch))
