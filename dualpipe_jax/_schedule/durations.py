"""The durations of actions, by which they are placed in ticks and replayed."""

from dataclasses import dataclass

import numpy as np

from dualpipe_jax._schedule.actions import Opcode, unit_of
from dualpipe_jax._schedule.replay import as_full_backwards
from dualpipe_jax._schedule.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Says how long the actions of each stage take, in any one unit of time.

    Attributes:
      of_opcode: For each opcode the durations over stages; idling takes none.
      recompute: The time that a deferred W of each stage takes in addition.
      upper_share: The share of each stage's layers in the upper half of a full backward.
      full_backward: The time of I and W fused, as a share of the two split; None if never fused.
      embed_grad: The part of the first stage's I that the embedding's gradient takes.
      transfer: How long a value travels to a neighbour.
    """

    of_opcode: tuple[tuple[float, ...], ...]
    recompute: tuple[float, ...]
    upper_share: tuple[float, ...]
    full_backward: float | None
    embed_grad: float
    transfer: float

    def recomputed(self, tables: Tables) -> np.ndarray:
        """Finds how long deferred weight grads recompute: float64[num_ticks, num_ranks]."""
        is_deferred = tables.opcode == Opcode.WEIGHT_GRAD_DEFERRED
        return is_deferred * np.array(self.recompute)[tables.stage]

    def work(self, tables: Tables) -> np.ndarray:
        """Finds how long each tick's action takes: float64[num_ticks, num_ranks], 0 if idle."""
        # An idle tick has stage -1, and costs 0 there too.
        work = np.array(self.of_opcode)[unit_of(tables.opcode), tables.stage] + self.recomputed(
            tables
        )
        if self.full_backward is None:
            return work
        return as_full_backwards(
            tables,
            work,
            upper_share=np.array(self.upper_share),
            cost=self.full_backward,
            embed_grad=self.embed_grad,
        )
