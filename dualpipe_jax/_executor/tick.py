"""One tick of one rank: store what arrived, run this rank's action, send.

The tables say what to do; everything but the rank is static. Each kind of action of each chunk
stands in the program once, run or passed over by the rank's opcode, and holds no collective over
the pipeline axis: the two permutes that move activations and cotangents right and left follow on
every rank.

The choice is made by loops that run their body once or not at all (`when`), not by `lax.switch`:
XLA copies whatever passes through a conditional, on every tick all slots and accumulators, but
updates what passes through a loop in place. (On CPU, a transformer of width 256 on two ranks: a
switch copied every buffer twice a tick; so nothing is copied.)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax import _microbatches
from dualpipe_jax._executor import accumulators, registers
from dualpipe_jax._executor.accumulators import LayerGrads, Places
from dualpipe_jax._executor.functions import Functions
from dualpipe_jax._executor.layout import Layer, Layout
from dualpipe_jax._executor.leaves import pick, place
from dualpipe_jax._executor.registers import when
from dualpipe_jax._kinds import Kind
from dualpipe_jax._schedule.ir import FORWARD, INPUT_GRAD, WEIGHT_GRAD
from dualpipe_jax._types import Context

PyTree = Any


class State(NamedTuple):
    """What a rank carries from tick to tick.

    What belongs to layers has an entry for each kind of layer, `layer` counting those of the kind.

    Attributes:
      received: Activations and cotangents that wait for their action, `[slot, ...]` for each leaf
        of x; the last slot takes what nobody wants.
      residual: What the forward keeps for the input gradient, `[slot, layer, ...]`.
      weight_residual: What the forward keeps for the weight gradient, `[slot, layer, ...]`.
      stash: What the input gradient keeps for the weight gradient, `[slot, layer, ...]`.
      deferred: What it keeps for a deferred one, which recomputes, `[slot, layer, ...]`; the last
        slot takes what nobody wants. Empty where none recomputes.
      block_grads: For each chunk the gradients of the leaves that have one, `[layer, ...]`, or
        lists of as many arrays where layers are unrolled.
      ends_grads, shared_grads: The gradients of the leaves outside the stack that get one.
      loss, aux, metrics: Sums over microbatches.
      from_left, from_right: What the neighbours sent in the tick before: an x.
    """

    received: PyTree
    residual: dict[Kind, Any]
    weight_residual: dict[Kind, Any]
    stash: dict[Kind, Any]
    deferred: dict[Kind, Any]
    block_grads: list[LayerGrads]
    ends_grads: list[jax.Array]
    shared_grads: list[jax.Array]
    loss: jax.Array
    aux: jax.Array | None
    metrics: PyTree
    from_left: PyTree
    from_right: PyTree

    def take_grads(self, chunk: int, places: dict[Kind, Places]) -> Any:
        """Takes the accumulators of a chunk, and of shared, that stand at `places`."""
        return accumulators.take(self.block_grads[chunk], self.shared_grads, places)

    def put_grads(self, chunk: int, places: dict[Kind, Places], taken: Any) -> "State":
        """Puts back what was taken."""
        grads, shared = accumulators.put(self.block_grads[chunk], self.shared_grads, places, taken)
        block_grads = [grads if c == chunk else old for c, old in enumerate(self.block_grads)]
        return self._replace(block_grads=block_grads, shared_grads=shared)

    def add_outside(self, gradients: list[jax.Array]) -> "State":
        """Adds gradients of ends, then of shared."""
        num_ends = len(self.ends_grads)
        sums = _microbatches.add([*self.ends_grads, *self.shared_grads], gradients)
        return self._replace(ends_grads=sums[:num_ends], shared_grads=sums[num_ends:])


Row = dict[str, jax.Array]  # this rank's row of the tables, int32 scalars


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """Runs the actions of one rank.

    Attributes:
      functions: The model's functions.
      layout: Which layers are whose.
      chunks: The layers' parameters of each chunk, for each kind `[max_layers, ...]`.
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside the stack.
      microbatches: The batch, `[num_microbatches, ...]`.
      rng: The step's key, or None.
      shard: The index of this shard of the batch, or None if there is one only.
      loss_seed: The cotangent of each microbatch's loss, a scalar.
      aux_seed: The cotangent of each layer's aux loss, for each kind a scalar, or None.
      num_deferred: The slots for what deferred weight gradients recompute from; 0 if none does.
      poison: Whether to overwrite what is dead with values that spread, in tests.
    """

    functions: Functions
    layout: Layout
    chunks: list[dict[Kind, PyTree]]
    outside: dict[str, PyTree]
    microbatches: PyTree
    rng: jax.Array | None
    shard: jax.Array | None
    loss_seed: jax.Array
    aux_seed: dict[Kind, jax.Array | None]
    num_deferred: int = 0
    poison: bool = False

    def act(self, state: State, row: Row) -> tuple[State, PyTree]:
        """Runs this tick's action, and returns what it sends: an x, or a cotangent of one.

        Of two ranks with a stage each, while microbatch 1 is in its forward and 0 in its backward:
        rank 0 runs `0F1`: read the received slot or embed -> layers -> send x to rank 1.
        rank 1 runs `1I0`: read the kept cotangent -> layers, backwards -> send dx to rank 0.
        All other pieces stand in the program too, and are passed over.
        """
        gradients = self.functions.gradients
        opcode, stage = row["opcode"], row["stage"]
        is_first, is_last = stage == 0, stage == self.layout.num_stages - 1
        # One value goes through: what the action reads, then what its layers make of it.
        out = registers.read(state.received, row["read"])
        out = lax.cond((opcode == FORWARD) & is_first, lambda: self._embed(row), lambda: out)
        for chunk in range(len(self.chunks)):
            is_mine = row["chunk"] == chunk
            state, out = self._forward(state, out, row, chunk, is_mine & (opcode == FORWARD))
            if gradients is not None:
                state, out = self._input_grad(
                    state, out, row, chunk, is_mine & (opcode == INPUT_GRAD)
                )
                is_on = is_mine & (opcode == WEIGHT_GRAD)
                if self.num_deferred:
                    is_put_off = row["is_deferred"] > 0
                    state = self._weight_grad(state, row, chunk, is_on & is_put_off, "deferred")
                    is_on &= ~is_put_off
                state = self._weight_grad(state, row, chunk, is_on, "stash")
        state, out = when(
            (opcode == FORWARD) & is_last,
            lambda carry: self._head(carry[0], carry[1], row),
            (state, out),
        )
        if gradients is not None:
            state = when(
                (opcode == INPUT_GRAD) & is_first,
                lambda state: self._embed_grad(state, out, row),
                state,
            )
        return state, out

    def _context(self, row: Row, position: Any, *, is_layer: bool = False) -> Context:
        return _microbatches.context(
            _microbatches.take(self.microbatches, row["microbatch"]),
            _microbatches.microbatch_key(self.rng, row["microbatch"]),
            position,
            is_layer=is_layer,
            shard=self.shard,
        )

    def _layer(self, row: Row, chunk: int, layer: Layer) -> tuple[PyTree, Context]:
        """Reads a layer's parameters, with the shared ones, and makes its context."""
        params = registers.read(self.chunks[chunk][layer.kind], layer.place)
        params = params, self.outside.get("shared")
        return params, self._context(row, layer.position, is_layer=True)

    def _embed(self, row: Row) -> PyTree:
        return self.functions.embed(self.outside, self._context(row, self.layout.num_layers))

    # F: x -> y, residuals
    def _forward(
        self, state: State, x: PyTree, row: Row, chunk: int, is_on: Any
    ) -> tuple[State, PyTree]:
        def run(layer: Layer, carry: Any, buffers: Any) -> Any:
            x, aux_sum = carry
            residual, weight_residual = buffers
            params, ctx = self._layer(row, chunk, layer)
            if self.functions.gradients is None:
                x, aux = self.functions.block[layer.kind](params, x, ctx)
            else:
                split = self.functions.gradients.block[layer.kind]
                x, aux, kept, kept_longer = split.forward(params, x, ctx)
                residual = registers.write(residual, kept, row["residual"], layer.index)
                weight_residual = registers.write(
                    weight_residual, kept_longer, row["weight_residual"], layer.index
                )
            if aux is not None:
                aux_sum = _microbatches.add(aux_sum, aux)
            return (x, aux_sum), (residual, weight_residual)

        buffers = state.residual, state.weight_residual
        out = self.layout.loop(row["stage"], is_on, run, (x, state.aux), buffers)
        (x, aux), (residual, weight_residual) = out
        return state._replace(aux=aux, residual=residual, weight_residual=weight_residual), x

    # The head follows the last stage's F: its value and gradient at once, so that its residuals
    # (the logits) never get a slot; what is kept is the cotangent of x.
    def _head(self, state: State, x: PyTree, row: Row) -> tuple[State, PyTree]:
        ctx = self._context(row, self.layout.num_layers + 1)
        gradients = self.functions.gradients
        if gradients is None:
            assert self.functions.head is not None
            loss, metrics = self.functions.head(self.outside, x, ctx)
        else:
            (loss, metrics, dx), doutside = gradients.head(self.outside, x, ctx, self.loss_seed)
            state, x = state.add_outside(doutside), place(x, dx)
        sums = _microbatches.add((state.loss, state.metrics), (loss, metrics))
        return state._replace(loss=sums[0], metrics=sums[1]), x

    # I: cotangent of y -> cotangent of x, stash (and gradients that are made with it: mostly none)
    def _input_grad(
        self, state: State, out: PyTree, row: Row, chunk: int, is_on: Any
    ) -> tuple[State, PyTree]:
        gradients = self.functions.gradients
        assert gradients is not None

        def run(layer: Layer, carry: Any, buffers: Any) -> Any:
            (dy, shared), (stash, deferred, residual, weight_residual, grads) = carry, buffers
            params, ctx = self._layer(row, chunk, layer)
            dx, values, put_off, early = gradients.block[layer.kind].input_grad(
                params,
                ctx,
                registers.read(residual, row["residual"], layer.index),
                registers.read(weight_residual, row["weight_residual"], layer.index),
                dy,
                self.aux_seed[layer.kind],
            )
            stash = registers.write(stash, values, row["stash"], layer.index)
            if self.num_deferred:
                deferred = registers.write(deferred, put_off, row["deferred"], layer.index)
            kept = registers.pass_on((residual, weight_residual))
            places = gradients.early[layer.kind]
            grads, shared = accumulators.add(grads, shared, early, places=places, layer=layer.place)
            return (dx, shared), (stash, deferred, *kept, grads)

        grads, shared = state.take_grads(chunk, gradients.early)
        buffers = state.stash, state.deferred, state.residual, state.weight_residual, grads
        (dx, shared), buffers = self.layout.loop(
            row["stage"], is_on, run, (pick(out), shared), buffers, reverse=True
        )
        stash, deferred, residual, weight_residual, grads = buffers
        state = state._replace(
            stash=stash, deferred=deferred, residual=residual, weight_residual=weight_residual
        )
        return state.put_grads(chunk, gradients.early, (grads, shared)), place(out, dx)

    # The embedding's gradient follows the first stage's I. Its forward runs again rather than
    # keeping its residuals in a slot; of a table look-up nothing is left of it.
    def _embed_grad(self, state: State, dx: PyTree, row: Row) -> State:
        assert self.functions.gradients is not None
        ctx = self._context(row, self.layout.num_layers)
        _, doutside = self.functions.gradients.embed(self.outside, ctx, pick(dx))
        return state.add_outside(doutside)

    # W: stash (or what is deferred), residuals -> gradients of the layers and of what they share
    def _weight_grad(self, state: State, row: Row, chunk: int, is_on: Any, source: str) -> State:
        gradients = self.functions.gradients
        assert gradients is not None

        def run(layer: Layer, shared: Any, buffers: Any) -> Any:
            grads, weight_residual, values = buffers
            params, ctx = self._layer(row, chunk, layer)
            block = gradients.block[layer.kind]
            weight_grad = block.weight_grad if source == "stash" else block.recompute_weight_grad
            late = weight_grad(
                params,
                ctx,
                registers.read(weight_residual, row["weight_residual"], layer.index),
                registers.read(values, row[source], layer.index),
            )
            places = gradients.late[layer.kind]
            grads, shared = accumulators.add(grads, shared, late, places=places, layer=layer.place)
            return shared, (grads, *registers.pass_on((weight_residual, values)))

        grads, shared = state.take_grads(chunk, gradients.late)
        buffers = grads, state.weight_residual, getattr(state, source)
        shared, buffers = self.layout.loop(row["stage"], is_on, run, shared, buffers, reverse=True)
        grads, weight_residual, values = buffers
        state = state._replace(weight_residual=weight_residual)
        state = (
            state._replace(stash=values) if source == "stash" else state._replace(deferred=values)
        )
        return state.put_grads(chunk, gradients.late, (grads, shared))


def make_tick(rank: Rank, *, num_ranks: int, wraps: bool) -> Callable[[State, Row], State]:
    """Makes the function that runs one row of the tables."""
    axis = rank.layout.axis
    right = [(r, (r + 1) % num_ranks) for r in range(num_ranks if wraps else num_ranks - 1)]
    left = [(target, source) for source, target in right]

    def tick(state: State, row: Row) -> State:
        # A slot of -1, none, becomes the last one, which nobody reads.
        last = jax.tree.leaves(state.received)[0].shape[0] - 1
        slot = {
            name: jnp.where(row[name] < 0, last, row[name])
            for name in ("from_left", "from_right", "keep", "read")
        }
        if rank.num_deferred:
            slot |= _deferred_slots(row, num_deferred=rank.num_deferred)
        received = registers.write(state.received, state.from_left, slot["from_left"])
        received = registers.write(received, state.from_right, slot["from_right"])
        state, out = rank.act(state._replace(received=received), {**row, **slot})
        if rank.poison:
            state, out = _poison_dead(state, out, {**row, **slot})
        state = state._replace(received=registers.write(state.received, out, slot["keep"]))
        if num_ranks == 1:
            return state
        return state._replace(
            from_left=lax.ppermute(out, axis, right), from_right=lax.ppermute(out, axis, left)
        )

    return tick


def _deferred_slots(row: Row, *, num_deferred: int) -> Row:
    """Gives an I both kinds of slot: it writes both, where nobody reads it to no harm.

    Of the stash it may be any: what directly follows an I leaves none in use at another.
    """
    is_deferred = row["deferred"] >= 0
    return {
        "is_deferred": is_deferred.astype(jnp.int32),
        "deferred": jnp.where(is_deferred, row["deferred"], num_deferred),
        "stash": jnp.maximum(row["stash"], 0),
    }


def _poison_dead(state: State, out: PyTree, row: Row) -> tuple[State, PyTree]:
    """Overwrites every slot whose last read was in this tick, and what nobody should send."""
    opcode = row["opcode"]
    by_input_grad, by_weight_grad = opcode == INPUT_GRAD, opcode == WEIGHT_GRAD

    def overwrite(buffers: PyTree, slot: Any, is_dead: Any) -> PyTree:
        return when(is_dead, lambda buffers: registers.poison(buffers, slot), buffers)

    state = state._replace(
        received=registers.poison(state.received, row["read"]),
        residual=overwrite(state.residual, row["residual"], by_input_grad),
        weight_residual=overwrite(state.weight_residual, row["weight_residual"], by_weight_grad),
        stash=overwrite(state.stash, row["stash"], by_weight_grad),
    )
    if "deferred" in row:
        deferred = overwrite(state.deferred, row["deferred"], by_weight_grad)
        state = state._replace(deferred=deferred)
    sends = (opcode == FORWARD) | by_input_grad
    nothing = registers.allocate(out, poison=True)
    return state, jax.tree.map(lambda a, b: jnp.where(sends, a, b), out, nothing)
