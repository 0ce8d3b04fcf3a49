"""A rank as its actions see it: the model's functions, its layers' parameters, the microbatches."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._executor import barriers, buffers
from dualpipe_jax._executor.buffers import RESIDUALS
from dualpipe_jax._executor.deliver import Delivery
from dualpipe_jax._executor.stages import Layer, Stages
from dualpipe_jax._executor.trace import Functions, Gradients
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Context, PyTree
from dualpipe_jax._schedule.actions import DEFERRED

Row = dict[str, jax.Array]  # this rank's row of the tables, int32 scalars


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """Holds all that the actions of one rank read beside its state.

    Attributes:
      functions: The model's functions.
      stages: The layers of each stage, and the stages of each rank.
      chunks: The layers' parameters of each chunk, and casts of them, for each kind
        `[max_layers, ...]`; of unrolled layers a tuple of them, without the layers' dim.
      shared_casts: Casts of the shared parameters, for each kind.
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside the stack.
      microbatches: The batch, `[num_microbatches, ...]`.
      rng: The step's key, or None.
      shard: The index of this shard of the batch, or None if there is one only.
      loss_cotangent: The cotangent of each microbatch's loss, a scalar; None without a loss.
      aux_cotangent: The cotangent of each layer's aux loss, for each kind a scalar, or None.
      delivery: Where outputs go, in a program that returns outputs.
      full_backward: Whether a W that follows its I runs with it, as a full backward; then only
        deferred W's have operands in slots, in `deferred`.
      defers: Whether deferred W's have their operands in `deferred`.
      takes_turns: Whether the backward of each unrolled layer waits for that of the next.
      runs_side_by_side: Whether a beat's F and I run side by side, on devices that can.
      communicates: Whether the model's functions may have collectives of their own.
      device_kind: The kind of the devices, such as "TPU v5 lite", or None.
      poison: Whether to overwrite dead values with values that spread, in tests.
    """

    functions: Functions
    stages: Stages
    chunks: list[dict[Kind, PyTree]]
    shared_casts: dict[Kind, list[jax.Array]]
    outside: dict[str, PyTree]
    microbatches: PyTree
    rng: jax.Array | None
    shard: jax.Array | None
    loss_cotangent: jax.Array | None
    aux_cotangent: dict[Kind, jax.Array | None]
    delivery: Delivery | None = None
    full_backward: bool = False
    defers: bool = False
    takes_turns: bool = False
    runs_side_by_side: bool = False
    communicates: bool = False
    device_kind: str | None = None
    poison: bool = False

    @property
    def gradients(self) -> Gradients:
        """The derivatives of the model's functions, in a program that has them."""
        assert self.functions.gradients is not None
        return self.functions.gradients

    def context(self, row: Row, position: Any, *, is_layer: bool = False) -> Context:
        """Makes the context of a layer, or of embed or head, for the row's microbatch."""
        return semantics.context(
            semantics.take(self.microbatches, row["microbatch"]),
            semantics.microbatch_key(self.rng, row["microbatch"]),
            position,
            is_layer=is_layer,
            shard=self.shard,
        )

    def read_layer(self, row: Row, chunk: int, layer: Layer) -> tuple[PyTree, Context]:
        """Reads a layer's parameters, with the shared ones and the casts, and makes its context."""
        stack = self.chunks[chunk][layer.kind]
        if self.stages.is_unrolled:
            params, casts = stack[layer.entry]
        else:
            params, casts = buffers.read(stack, layer.entry)
        context = self.context(row, layer.position, is_layer=True)
        casts = [*casts, *self.shared_casts.get(layer.kind, [])]
        return ((params, self.outside.get("shared")), casts), context

    @property
    def stashes_in_beats(self) -> bool:
        """Whether the beats alone have stashes: W of all layers hides transfers there."""
        return self.full_backward and self.runs_side_by_side and not self.stages.is_unrolled

    # XLA's CPU compiler runs first whatever waits for nothing: of unrolled layers, all that they
    # recompute. (Where it shards their values, picking an entry of one would gather it.)
    def first_turn(self, row: Row) -> jax.Array | None:
        """Makes the turn of the layer whose backward runs first: a zero that XLA does not know.

        None where layers take no turns.
        """
        if not self.takes_turns:
            return None
        return jnp.minimum(row["microbatch"], 0)

    def in_turn(self, row: Row, turn: jax.Array | None) -> Row:
        """Has a row name the slots that a layer's backward reads only when it is its turn."""
        if turn is None:
            return row
        return {**row, **{name: row[name] + turn for name in (*RESIDUALS, DEFERRED) if name in row}}

    def next_turn(
        self, turn: jax.Array | None, layer: Layer, grads: list[Any], dx: Any = ()
    ) -> jax.Array | None:
        """Has the next layer's turn come when a layer's gradients are added and its dx is made.

        Args:
          turn: The layer's own.
          layer: The layer.
          grads: The sums of gradients of the layers of its kind.
          dx: Its dx.
        """
        if turn is None:
            return None
        return barriers.zero_after((dx, [total[layer.entry] for total in grads]), at=turn)
