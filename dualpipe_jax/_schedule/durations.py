"""The durations of actions, by which they are placed in ticks and replayed."""

from dataclasses import dataclass, replace

import numpy as np

from dualpipe_jax._schedule.actions import Opcode, unit_of
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT
from dualpipe_jax._schedule.replay import as_full_backwards
from dualpipe_jax._schedule.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Copies:
    """Says how long the copies of activations to and from the host's memory take.

    Attributes:
      spill: For each stage the time that a whole activation takes to the host.
      fill: The same back.
      slots_on_device: The activations that have room on the device, of those that a rank has.
    """

    spill: tuple[float, ...]
    fill: tuple[float, ...]
    slots_on_device: float


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
      copies: The copies to and from the host; None where all activations stay on the device.
    """

    of_opcode: tuple[tuple[float, ...], ...]
    recompute: tuple[float, ...]
    upper_share: tuple[float, ...]
    full_backward: float | None
    embed_grad: float
    transfer: float
    copies: Copies | None = None

    def recomputed(self, tables: Tables) -> np.ndarray:
        """Finds how long deferred weight grads recompute: float64[num_ticks, num_ranks]."""
        is_deferred = tables.opcode == Opcode.WEIGHT_GRAD_DEFERRED
        return is_deferred * np.array(self.recompute)[tables.stage]

    def copied(self, tables: Tables) -> np.ndarray:
        """Finds how long actions wait for copies: float64[num_ticks, num_ranks]."""
        if self.copies is None:
            return np.zeros(tables.opcode.shape)
        return self.work(tables) - replace(self, copies=None).work(tables)

    def work(self, tables: Tables) -> np.ndarray:
        """Finds how long each tick's action takes: float64[num_ticks, num_ranks], 0 if idle."""
        # An idle tick has stage -1, and costs 0 there too.
        work = np.array(self.of_opcode)[unit_of(tables.opcode), tables.stage] + self.recomputed(
            tables
        )
        if self.full_backward is not None:
            work = as_full_backwards(
                tables,
                work,
                upper_share=np.array(self.upper_share),
                cost=self.full_backward,
                embed_grad=self.embed_grad,
            )
        return work if self.copies is None else self._with_copies(tables, work, self.copies)

    def _with_copies(self, tables: Tables, work: np.ndarray, copies: Copies) -> np.ndarray:
        """Adds the time by which copies take longer than the actions beside which they run.

        In a tick that is one action: F writes a part of its activation, I reads it, and so does a W
        in a tick of its own. In a beat it is F, I and W, and I hands on the part that it has read.
        """
        num_slots = tables.num_slots.get("weight_residual", 0)
        part = max(0.0, 1 - copies.slots_on_device / max(num_slots, 1))
        spill, fill = (
            part * np.array(times)[tables.stage] for times in (copies.spill, copies.fill)
        )
        upper = np.array(self.upper_share)[tables.stage]
        least = np.select(
            [
                tables.opcode == Opcode.FORWARD,
                tables.opcode == Opcode.BACKWARD_UPPER,
                tables.opcode == Opcode.BACKWARD_LOWER,
                (tables.opcode == Opcode.IDLE) | (tables.opcode == Opcode.WEIGHT_GRAD_DONE),
            ],
            [spill, upper * fill, (1 - upper) * fill, 0.0],
            fill,
        )
        slower = np.maximum(work, least)
        if tables.steady is not None:
            in_beats = tables.steady.ticks
            shape = (-1, TICKS_PER_BEAT, tables.num_ranks)
            beats = work[in_beats].reshape(shape).copy()
            longest = np.maximum(
                spill[in_beats].reshape(shape)[:, 0], fill[in_beats].reshape(shape)[:, 1]
            )
            # Whichever of the three it is added to: nobody is waited for within a beat.
            beats[:, 1] += np.maximum(0.0, longest - beats.sum(axis=1))
            slower[in_beats] = beats.reshape(-1, tables.num_ranks)
        return slower
