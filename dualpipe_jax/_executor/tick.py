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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax import _microbatches
from dualpipe_jax._executor import registers
from dualpipe_jax._executor.layout import Layout
from dualpipe_jax._executor.registers import when
from dualpipe_jax._schedule.ir import FORWARD, INPUT_GRAD, WEIGHT_GRAD
from dualpipe_jax._split_vjp import SplitVjp, is_differentiable
from dualpipe_jax._types import Context, Model

PyTree = Any


class State(NamedTuple):
    """What a rank carries from tick to tick.

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
      ends_grads: The gradients of the differentiable leaves of `ends`.
      loss, aux, metrics: Sums over microbatches.
      from_left, from_right: What the neighbours sent in the tick before: an x.
    """

    received: PyTree
    residual: Any
    weight_residual: Any
    stash: Any
    deferred: Any
    block_grads: list[list[Any]]
    ends_grads: list[jax.Array]
    loss: jax.Array
    aux: jax.Array | None
    metrics: PyTree
    from_left: PyTree
    from_right: PyTree


Row = dict[str, jax.Array]  # this rank's row of the tables, int32 scalars


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """Runs the actions of one rank.

    Attributes:
      model: The model.
      layout: Which layers are whose.
      split: The block's split backward; None in forward-only programs.
      block: `(params, x, ctx) -> (y, aux)`.
      chunks: The layers' parameters `[max_layers, ...]` of each chunk.
      ends: The parameters outside the layer stack.
      microbatches: The batch, `[num_microbatches, ...]`.
      rng: The step's key, or None.
      shard: The index of this shard of the batch, or None if there is one only.
      loss_seed: The cotangent of each microbatch's loss, a scalar.
      aux_seed: The cotangent of each layer's aux loss, a scalar; None without.
      x: Avals of x.
      num_deferred: The slots for what deferred weight gradients recompute from; 0 if none does.
      poison: Whether to overwrite what is dead with values that spread, in tests.
    """

    model: Model
    layout: Layout
    split: SplitVjp | None
    block: Callable[..., tuple[PyTree, Any]]
    chunks: list[PyTree]
    ends: PyTree
    microbatches: PyTree
    rng: jax.Array | None
    shard: jax.Array | None
    loss_seed: jax.Array
    aux_seed: jax.Array | None
    x: PyTree
    num_deferred: int = 0
    poison: bool = False

    def act(self, state: State, row: Row) -> tuple[State, PyTree]:
        """Runs this tick's action, and returns what it sends: an x, or a cotangent of one.

        Of two ranks with a stage each, while microbatch 1 is in its forward and 0 in its backward:
        rank 0 runs `0F1`: read the received slot or embed -> layers -> send x to rank 1.
        rank 1 runs `1I0`: read the kept cotangent -> layers, backwards -> send dx to rank 0.
        All other pieces stand in the program too, and are passed over.
        """
        opcode, stage = row["opcode"], row["stage"]
        is_first, is_last = stage == 0, stage == self.layout.num_stages - 1
        # One value goes through: what the action reads, then what its layers make of it.
        out = registers.read(state.received, row["read"])
        out = lax.cond((opcode == FORWARD) & is_first, lambda: self._embed(row), lambda: out)
        for chunk in range(len(self.chunks)):
            is_mine = row["chunk"] == chunk
            state, out = self._forward(state, out, row, chunk, is_mine & (opcode == FORWARD))
            if self.split is not None:
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
        if self.split is not None:
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

    def _layer(self, row: Row, chunk: int, layer: Any) -> tuple[PyTree, Context]:
        """Reads a layer's parameters and makes its context."""
        params = registers.read(self.chunks[chunk], layer + self.layout.offset_of(row["stage"]))
        position = self.layout.first_layer_of(row["stage"]) + layer
        return params, self._context(row, position, is_layer=True)

    def _embed(self, row: Row) -> PyTree:
        x = self.model.embed(self.ends, self._context(row, self.layout.num_layers))
        return _microbatches.strong(x)

    # F: x -> y, residuals
    def _forward(
        self, state: State, x: PyTree, row: Row, chunk: int, is_on: Any
    ) -> tuple[State, PyTree]:
        def layer(index: Any, carry: Any) -> Any:
            x, aux_sum, residual, weight_residual = carry
            params, ctx = self._layer(row, chunk, index)
            if self.split is None:
                x, aux = self.block(params, x, ctx)
            else:
                x, aux, kept, kept_longer = self.split.forward(params, x, ctx)
                residual = registers.write(residual, kept, row["residual"], index)
                weight_residual = registers.write(
                    weight_residual, kept_longer, row["weight_residual"], index
                )
            if aux is not None:
                aux_sum = _microbatches.add(aux_sum, aux)
            return x, aux_sum, residual, weight_residual

        carry = (x, state.aux, state.residual, state.weight_residual)
        x, aux, residual, weight_residual = self.layout.loop(row["stage"], is_on, layer, carry)
        return state._replace(aux=aux, residual=residual, weight_residual=weight_residual), x

    # The head follows the last stage's F: its value and gradient at once, so that its residuals
    # (the logits) never get a slot; what is kept is the cotangent of x.
    def _head(self, state: State, x: PyTree, row: Row) -> tuple[State, PyTree]:
        ctx = self._context(row, self.layout.num_layers + 1)

        def head(ends_leaves: list, x_leaves: list) -> tuple[jax.Array, PyTree]:
            ends, y = _with_leaves(self.ends, ends_leaves), _with_leaves(x, x_leaves)
            return _microbatches.head_outputs(self.model, self.model.head(ends, y, ctx))

        args = _leaves(self.ends), _leaves(x)
        if self.split is None:
            loss, metrics = head(*args)
        else:
            loss, pull, metrics = jax.vjp(head, *args, has_aux=True)
            dends, dx = pull(self.loss_seed.astype(loss.dtype))
            state = state._replace(ends_grads=_microbatches.add(state.ends_grads, dends))
            x = _with_leaves(x, dx)
        sums = _microbatches.add((state.loss, state.metrics), (loss, metrics))
        return state._replace(loss=sums[0], metrics=sums[1]), x

    # I: cotangent of y -> cotangent of x, stash
    def _input_grad(
        self, state: State, out: PyTree, row: Row, chunk: int, is_on: Any
    ) -> tuple[State, PyTree]:
        assert self.split is not None
        split = self.split
        offset = self.layout.offset_of(row["stage"])

        def layer(index: Any, carry: Any) -> Any:
            dy, stash, deferred, residual, weight_residual, grads = carry
            params, ctx = self._layer(row, chunk, index)
            dx, values, put_off, early = split.input_grad(
                params,
                ctx,
                registers.read(residual, row["residual"], index),
                registers.read(weight_residual, row["weight_residual"], index),
                dy,
                self.aux_seed,
            )
            stash = registers.write(stash, values, row["stash"], index)
            if self.num_deferred:
                deferred = registers.write(deferred, put_off, row["deferred"], index)
            grads = registers.accumulate(grads, early, index + offset)
            return dx, stash, deferred, *registers.pass_on((residual, weight_residual)), grads

        # Gradients that are made with dx; commonly none.
        grads = _select(state.block_grads[chunk], split.has_grad, split.is_early)
        buffers = state.stash, state.deferred, state.residual, state.weight_residual
        carry = _leaves(out), *buffers, grads
        carry = self.layout.loop(row["stage"], is_on, layer, carry, reverse=True)
        dx, stash, deferred, residual, weight_residual, grads = carry
        state = state._replace(
            stash=stash,
            deferred=deferred,
            residual=residual,
            weight_residual=weight_residual,
            block_grads=self._with_grads(state, chunk, grads, split.is_early),
        )
        return state, _with_leaves(out, dx)

    # The embedding's gradient follows the first stage's I. Its forward runs again rather than
    # keeping its residuals in a slot; of a table look-up nothing is left of it.
    def _embed_grad(self, state: State, dx: PyTree, row: Row) -> State:
        def embed(leaves: list) -> list[jax.Array]:
            ends = _with_leaves(self.ends, leaves)
            ctx = self._context(row, self.layout.num_layers)
            return _leaves(_microbatches.strong(self.model.embed(ends, ctx)))

        (dends,) = jax.vjp(embed, _leaves(self.ends))[1](_leaves(dx))
        return state._replace(ends_grads=_microbatches.add(state.ends_grads, dends))

    # W: stash (or what is deferred), residuals -> gradients of the layers, added up in place
    def _weight_grad(self, state: State, row: Row, chunk: int, is_on: Any, source: str) -> State:
        assert self.split is not None
        split = self.split
        weight_grad = split.weight_grad if source == "stash" else split.recompute_weight_grad
        offset = self.layout.offset_of(row["stage"])

        def layer(index: Any, carry: Any) -> Any:
            grads, weight_residual, values = carry
            params, ctx = self._layer(row, chunk, index)
            late = weight_grad(
                params,
                ctx,
                registers.read(weight_residual, row["weight_residual"], index),
                registers.read(values, row[source], index),
            )
            grads = registers.accumulate(grads, late, index + offset)
            return grads, *registers.pass_on((weight_residual, values))

        grads = _select(state.block_grads[chunk], split.has_grad, split.is_late)
        carry = grads, state.weight_residual, getattr(state, source)
        carry = self.layout.loop(row["stage"], is_on, layer, carry, reverse=True)
        grads, weight_residual, values = carry
        return state._replace(
            block_grads=self._with_grads(state, chunk, grads, split.is_late),
            weight_residual=weight_residual,
            **{source: values},
        )

    def _with_grads(
        self, state: State, chunk: int, grads: list[Any], is_new: Sequence[bool]
    ) -> list[list[Any]]:
        """Puts `grads` in the places of the chunk's leaves that `is_new` flags."""
        assert self.split is not None
        new, old = iter(grads), state.block_grads
        flags = [flag for flag, has in zip(is_new, self.split.has_grad, strict=True) if has]
        mine = [next(new) if flag else grad for grad, flag in zip(old[chunk], flags, strict=True)]
        return [mine if c == chunk else other for c, other in enumerate(old)]


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


def _select(grads: list[Any], has_grad: Sequence[bool], flags: Sequence[bool]) -> list[Any]:
    """Selects of the gradients, one for each leaf that has one, those that `flags` flags."""
    mine = [flag for flag, has in zip(flags, has_grad, strict=True) if has]
    return [grad for grad, flag in zip(grads, mine, strict=True) if flag]


def _leaves(tree: PyTree) -> list[jax.Array]:
    """Lists the leaves that have a cotangent."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_differentiable(leaf)]


def _with_leaves(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    """Puts `leaves` in the places of those leaves of `tree` that have a cotangent."""
    rest = iter(leaves)
    return jax.tree.map(lambda old: next(rest) if is_differentiable(old) else old, tree)
