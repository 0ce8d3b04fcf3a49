"""F, I and W of one layer: parameters and slots in, a value for the next layer and sums out.

    F  x                        -> y; residual and weight_residual go to their slots
    I  cotangent of y, residual, weight_residual
                                -> cotangent of x; operands of W go to the stash, or are held
    W  weight_residual, stash   -> gradients, added to the sums

Ticks and beats, loops over layers and straight-line code all run these. They differ in how they
touch the buffers, and `LayerWork` says how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax

from dualpipe_jax import _scopes
from dualpipe_jax._executor import barriers
from dualpipe_jax._executor.buffers import RESIDUALS, STASHES, SlotBuffer, when
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.stages import Layer
from dualpipe_jax._executor.state import LayerBuffers, SharedGrads, add_aux, add_gradients
from dualpipe_jax._leaves.pick import pick, put_leaves
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.actions import DEFERRED, EFFECTS, Opcode


class Flow(NamedTuple):
    """Holds the values that pass from layer to layer; None for those that an action does not have.

    Attributes:
      x: The activation.
      aux: The sum of aux losses.
      dx: The cotangents of the leaves of x that have one.
      shared: The sums of shared's gradients.
      turn: As `Rank.first_turn` makes it.
    """

    x: PyTree = None
    aux: Any = None
    dx: Any = None
    shared: SharedGrads | None = None
    turn: jax.Array | None = None


class Held(NamedTuple):
    """Holds the operands of a layer's W that its I passes outside of slots."""

    weight_residual: tuple[jax.Array, ...]
    stash: tuple[jax.Array, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerWork:
    """Runs F, I and W of one layer within an action, or within a beat.

    Attributes:
      rank: The rank.
      forward: The chunk and the row of F, where there is one.
      backward: The chunk and the row of I and W.
      stores: The buffers in which I keeps operands of W: none if W directly follows it; with both
        `stash` and `deferred`, in `deferred` where the row says so.
      source: The buffer in which W finds its operands, if they are not held.
      is_straight: Whether the layers are straight-line code of a beat, where I and W read slots in
        parts and layouts are left to XLA. Else values have the layouts of their slots.
      is_beside: Whether an F runs beside an I, and neither is to run ahead.
    """

    rank: Rank
    forward: tuple[int, Row] | None = None
    backward: tuple[int, Row] | None = None
    stores: tuple[str, ...] = ()
    source: str = "stash"
    is_straight: bool = False
    is_beside: bool = False

    def touches(self, actions: str) -> tuple[str, ...]:
        """Names the slots and sums that actions touch, in the order in which loops carry them."""
        if actions == "W":
            is_deferred = self.source == DEFERRED
            opcode = Opcode.WEIGHT_GRAD_DEFERRED if is_deferred else Opcode.WEIGHT_GRAD
            return ("grads", *EFFECTS[opcode].reads)
        return {
            "F": (*RESIDUALS, "metrics"),
            "I": (*STASHES, *EFFECTS[Opcode.INPUT_GRAD].reads, "grads"),
            "IW": (*EFFECTS[Opcode.BACKWARD_LOWER].reads, "grads"),
        }[actions]

    def run(
        self, actions: str, layer: Layer, flow: Flow, buffers: LayerBuffers
    ) -> tuple[Flow, LayerBuffers]:
        """Runs `"F"`, `"I"`, `"W"` or `"IW"`, W right after its I, of a layer that may be there."""
        if layer.is_there is True:
            return self._run(actions, layer, flow, buffers)
        # Nothing else passes through the loop: arrays of another layer, or of the other direction,
        # would wait for it.
        passed = ("x", "aux") if actions == "F" else ("dx", "shared", "turn")
        mine = Flow(**{name: getattr(flow, name) for name in passed})
        if self.is_beside:
            # Else a W of the other direction reads slots after the loop, which copies all of them.
            sums = [total[layer.entry] for total in (buffers.grads or {}).values()]
            buffers = self._hand_on(RESIDUALS, layer, buffers, after=sums)
        own = buffers.take_layer(self.touches(actions), layer)
        mine, own = when(layer.is_there, lambda loop: self._run(actions, layer, *loop), (mine, own))
        flow = flow._replace(**{name: getattr(mine, name) for name in passed})
        return flow, buffers.put_layer(own, layer)

    def _run(
        self, actions: str, layer: Layer, flow: Flow, buffers: LayerBuffers
    ) -> tuple[Flow, LayerBuffers]:
        held = None
        for action in actions:
            if action == "F":
                flow, buffers = self.run_forward(layer, flow, buffers)
            elif action == "I":
                flow, buffers, held = self.run_input_grad(layer, flow, buffers)
                if self.is_beside:
                    # W took 1.5 times as long where it computed an activation again (TPU v5e).
                    may_wait = self.rank.gradients.block[layer.kind].stash_may_wait
                    stash = lax.optimization_barrier(pick(held.stash, may_wait))
                    held = held._replace(stash=put_leaves(held.stash, stash, may_wait))
            else:
                flow, buffers = self.run_weight_grad(layer, flow, buffers, held)
        return self.end_turn(layer, flow, buffers), buffers

    def run_forward(
        self, layer: Layer, flow: Flow, buffers: LayerBuffers
    ) -> tuple[Flow, LayerBuffers]:
        """Runs F of a layer."""
        rank = self.rank
        assert self.forward is not None
        chunk, row = self.forward
        if rank.functions.gradients is None:
            (params, _), ctx = rank.read_layer(row, chunk, layer)
            x, aux_of_layer = rank.functions.block[layer.kind](params, flow.x, ctx)
        else:
            x, aux_of_layer, *residuals = self._forward(layer, flow.x)
            dx = flow.dx
            if self.is_beside:
                # F and I hide each other's collectives only if neither runs ahead by layers; and
                # earlier writes of residuals would, on a GPU, run beside them in a matmul's place.
                x_and_dx = x, dx
                if self.is_straight:
                    x, dx, residuals = barriers.wait_for((x, dx, residuals), x_and_dx)
                else:
                    residuals = barriers.wait_for(residuals, x_and_dx)
                flow = flow._replace(dx=dx)
            for name, values in zip(RESIDUALS, residuals, strict=True):
                buffers = self._write(name, layer, buffers, values, row)
        aux, metrics = add_aux(flow.aux, buffers.metrics or [], aux_of_layer, layer.entry)
        return flow._replace(x=x, aux=aux), buffers._replace(metrics=metrics)

    def run_input_grad(
        self, layer: Layer, flow: Flow, buffers: LayerBuffers
    ) -> tuple[Flow, LayerBuffers, Held]:
        """Runs I of a layer, and returns the operands of its W that are in no slot."""
        rank = self.rank
        row = rank.in_turn(self._row, flow.turn)
        residual, weight_residual = (
            self._read(name, layer, buffers, row, is_copied=True) for name in RESIDUALS
        )
        dx, stash, deferred, gradients = self._input_grad(layer, flow.dx, residual, weight_residual)
        if "stash" in self.stores:
            buffers = self._write("stash", layer, buffers, stash, row)
        if DEFERRED in self.stores:

            def store(buffer: SlotBuffer) -> SlotBuffer:
                values = buffer.in_memory_order(deferred)
                return buffer.write(layer.index, self._row[DEFERRED], values)

            kept = buffers.slots[DEFERRED]
            is_choice = "stash" in self.stores
            kept = when(row["is_deferring"], store, kept) if is_choice else store(kept)
            buffers = buffers.with_slots({DEFERRED: kept})
        fetched = dict(zip(RESIDUALS, (residual, weight_residual), strict=True))
        buffers = self._hand_on(
            RESIDUALS, layer, buffers, after=(dx, stash, gradients), fetched=fetched
        )
        flow, buffers = self._add(layer, flow._replace(dx=dx), buffers, gradients, "I")
        return flow, buffers, Held(weight_residual, stash)

    def run_weight_grad(
        self, layer: Layer, flow: Flow, buffers: LayerBuffers, held: Held | None = None
    ) -> tuple[Flow, LayerBuffers]:
        """Runs W of a layer, whose operands I has left in `held`, or else in slots."""
        rank, name = self.rank, "weight_residual"
        row = rank.in_turn(self._row, flow.turn)
        if held is None:
            weight_residual = self._read(name, layer, buffers, row)
            operands = self._read(self.source, layer, buffers, row)
        elif self.is_straight:
            read = self._read(name, layer, buffers, row)
            weight_residual = barriers.copied_or_read(
                held.weight_residual, read, small=rank.functions.size_of_x
            )
            weight_residual = buffers.slots[name].keep_fetched(
                layer.index, held.weight_residual, weight_residual
            )
            operands = held.stash
        else:
            weight_residual, operands = held
        gradients = self._weight_grad(layer, weight_residual, operands)
        flow, buffers = self._add(layer, flow, buffers, gradients, "W")
        if held is None:
            buffers = self._hand_on((name, self.source), layer, buffers)
        elif self.is_beside:
            buffers = self._hand_on_with_sums(name, layer, buffers)
        return flow, buffers

    def end_turn(self, layer: Layer, flow: Flow, buffers: LayerBuffers) -> Flow:
        """Passes the turn to the next layer, where layers take turns."""
        if flow.turn is None:
            return flow
        sums = list((buffers.grads or {}).values())
        return flow._replace(turn=self.rank.next_turn(flow.turn, layer, sums, flow.dx or ()))

    @jax.named_scope(_scopes.FORWARD)
    def _forward(self, layer: Layer, x: PyTree) -> Any:
        assert self.forward is not None
        chunk, row = self.forward
        params, ctx = self.rank.read_layer(row, chunk, layer)
        return self.rank.gradients.block[layer.kind].forward(params, x, ctx)

    @jax.named_scope(_scopes.INPUT_GRAD)
    def _input_grad(self, layer: Layer, dy: list[jax.Array], residual: Any, weight: Any) -> Any:
        params, ctx = self.rank.read_layer(self._row, self._chunk, layer)
        aux_cotangent = self.rank.aux_cotangent[layer.kind]
        block = self.rank.gradients.block[layer.kind]
        return block.input_grad(params, ctx, residual, weight, dy, aux_cotangent)

    @jax.named_scope(_scopes.WEIGHT_GRAD)
    def _weight_grad(self, layer: Layer, weight_residual: Any, operands: Any) -> list[jax.Array]:
        params, ctx = self.rank.read_layer(self._row, self._chunk, layer)
        block = self.rank.gradients.block[layer.kind]
        run = block.weight_grad if self.source == "stash" else block.deferred_weight_grad
        return run(params, ctx, weight_residual, operands)

    @property
    def _chunk(self) -> int:
        assert self.backward is not None
        return self.backward[0]

    @property
    def _row(self) -> Row:
        assert self.backward is not None
        return self.backward[1]

    def _read(
        self, name: str, layer: Layer, buffers: LayerBuffers, row: Row, *, is_copied: bool = False
    ) -> tuple[jax.Array, ...]:
        buffer = buffers.slots[name]
        values = buffer.read(layer.index, row[name], self._chunk, in_parts=self.is_straight)
        if not self.is_straight:
            return buffer.in_memory_order(values)
        small = self.rank.functions.size_of_x
        return barriers.copied_out(values, small=small) if is_copied else values

    def _write(
        self, name: str, layer: Layer, buffers: LayerBuffers, values: Sequence[jax.Array], row: Row
    ) -> LayerBuffers:
        buffer = buffers.slots[name]
        # A beat's stash keeps the layout in which I makes it: row-major took 2 % more cycles (TPU
        # v5e, a transformer).
        if not self.is_straight and not (self.is_beside and name == "stash"):
            values = buffer.in_memory_order(values)
        chunk = self.forward if name in RESIDUALS else self.backward
        assert chunk is not None
        written = buffer.write(layer.index, row[name], values, chunk[0])
        return buffers.with_slots({name: written})

    def _hand_on(
        self,
        names: Sequence[str],
        layer: Layer,
        buffers: LayerBuffers,
        *,
        after: PyTree = (),
        fetched: Mapping[str, Sequence[jax.Array]] | None = None,
    ) -> LayerBuffers:
        """Passes buffers that were read to their next writes; in beats, `after` their readers.

        Or, where they are in the host's memory, after the values `fetched` there.
        """
        if self.is_straight and not self.is_beside:
            return buffers  # `barriers.zero_after` orders them
        handed = {}
        for name in names:
            buffer = buffers.slots[name].hand_on(layer.index, after=after if self.is_beside else ())
            if self.is_beside and fetched is not None:
                buffer = buffer.after_fetch(layer.index, fetched[name], self._chunk)
            handed[name] = buffer
        return buffers.with_slots(handed)

    def _hand_on_with_sums(self, name: str, layer: Layer, buffers: LayerBuffers) -> LayerBuffers:
        """Passes a buffer that W has read to its next write, once all of W's sums are known."""
        own = buffers.take_layer(("grads",), layer)
        slots, own = buffers.slots[name].hand_on_with(layer.index, own)
        return buffers.with_slots({name: slots}).put_layer(own, layer)

    def _add(
        self, layer: Layer, flow: Flow, buffers: LayerBuffers, gradients: Any, action: str
    ) -> tuple[Flow, LayerBuffers]:
        assert buffers.grads is not None
        assert flow.shared is not None
        index = self.rank.gradients.index[action][layer.kind]
        grads, shared = add_gradients(buffers.grads, flow.shared, gradients, index, layer.entry)
        return flow._replace(shared=shared), buffers._replace(grads=grads)
