"""Beats: a forward and a backward on every rank, straight-line code without choices.

In: a rank, and what `ir.Steady` says of a run of beats. Out: a function from state to state that
runs them all, two in a trip of one `lax.scan`: in even beats chunk 0 is forward and chunk 1
backward, in odd ones the other way round. So weights and accumulators are named, never chosen, and
what a beat sends goes between fixed pairs of ranks and is the next beat's input.

XLA is free to run F of a layer beside I of another, and W beside both and beside the next beat's F:
nothing but data orders them. What could order them falsely is a slot buffer that F writes and I and
W read: its reads and writes have to follow each other (or XLA would copy the buffer), and a write
would wait for all reads before it. Hence layers are taken in opposite order, F of layer j beside I
of layer L-1-j, so that what one waits for in the other has its turn earlier anyway.

A beat of four layers, `f` and `i` on their way through the slots of a layer's buffer:

    F  0 1 2 3 -> x to the neighbour        layers 0, 1: f writes, then i reads
    I  3 2 1 0 -> cotangent to it           layers 3, 2: i reads, then f writes
    W          3 2 1 0                      x and cotangent travel meanwhile

GPU compilers would take this order apart: there data has to keep it (`order.py`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _microbatches, _scopes
from dualpipe_jax._executor import accumulators, order, registers
from dualpipe_jax._executor.leaves import pick, place
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.registers import when
from dualpipe_jax._executor.state import State
from dualpipe_jax._executor.tick import store_arrivals
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT, Pairs, Steady

PyTree = Any


def make_run(rank: Rank, steady: Steady, rows: Row) -> Callable[[State], State]:
    """Makes the function that runs all beats.

    Args:
      rank: The rank.
      steady: The run of beats.
      rows: This rank's rows of the tables, int32[num_ticks] for each column.
    """
    ticks_per_trip = 2 * TICKS_PER_BEAT
    mine = {name: column[steady.ticks] for name, column in rows.items()}
    trips = {name: column.reshape(-1, ticks_per_trip) for name, column in mine.items()}

    def tick_of(rows: Row, tick: int) -> Row:
        return {name: column[tick] for name, column in rows.items()}

    def two_beats(carry: tuple[State, PyTree, list], rows: Row) -> tuple[Any, None]:
        state, x, cotangent = carry
        with jax.named_scope(_scopes.STEADY):
            for parity in range(2):
                f_row, i_row = (tick_of(rows, TICKS_PER_BEAT * parity + i) for i in range(2))
                beat = _Beat(rank, steady, parity)
                state, x, cotangent = beat.run(state, x, cotangent, f_row, i_row)
        return (state, x, cotangent), None

    def run(state: State) -> State:
        first = tick_of(mine, 0), tick_of(mine, 1)
        state = store_arrivals(state, first[0])
        # A rank that embeds reads nothing: any slot will do.
        x, cotangent = (
            registers.read(state.received, jnp.maximum(row["read"], 0)) for row in first
        )
        carry = (state, x, pick(cotangent))
        (state, x, cotangent), _ = lax.scan(two_beats, carry, trips)
        return _leave(rank, steady, state, x, cotangent)

    return run


def _leave(rank: Rank, steady: Steady, state: State, x: PyTree, cotangent: list) -> State:
    """Stores what the last beat sent where the tables have it."""
    last = jax.tree.leaves(state.received)[0].shape[0] - 1
    me = lax.axis_index(rank.layout.axis)

    def slot(slots: np.ndarray) -> jax.Array:
        return jnp.asarray(np.where(slots < 0, last, slots), jnp.int32)[me]

    received = registers.write(state.received, x, slot(steady.x_slot))
    received = registers.write(received, place(x, cotangent), slot(steady.cotangent_slot))
    nothing = registers.allocate(x, poison=rank.poison)
    return state._replace(received=received, from_left=nothing, from_right=nothing)


class _Beat:
    """One beat: the forward of chunk `parity`, the backward of the other one."""

    def __init__(self, rank: Rank, steady: Steady, parity: int):
        self.rank, self.parity = rank, parity
        self.forward, self.backward = parity, 1 - parity
        self.x_pairs = steady.x_pairs[parity]
        self.cotangent_pairs = steady.cotangent_pairs[parity]
        self.stage_of = rank.layout.stage_of

    def run(
        self, state: State, x: PyTree, cotangent: list[jax.Array], f_row: Row, i_row: Row
    ) -> tuple[State, PyTree, list[jax.Array]]:
        """Runs the beat, and returns what the next one reads.

        Args:
          state: What the rank carries.
          x: What the forward reads, but on the first stage.
          cotangent: What the input grad reads, of the leaves that have one.
          f_row: The row of the forward's tick.
          i_row: The row of the input grad's tick; the weight grad's names the same slots.
        """
        rank, layout = self.rank, self.rank.layout
        if (self.stage_of[self.forward] == 0).any():
            x = self._embed(x, f_row)
        if layout.is_unrolled:
            beat = self._unrolled
        elif layout.has_equal_stages and len(layout.stacks) == 1:
            beat = self._looped
        else:
            beat = self._one_after_the_other
        state, y, dx, weight_grad = beat(state, x, cotangent, f_row, i_row)
        next_x = self._send(y, self.x_pairs)
        next_cotangent = self._send(dx, self.cotangent_pairs)
        state = weight_grad(state)
        # Else W would be put off to the end of the trip, and what it reads copied out of the slots.
        mine = state.take_grads(self.backward, rank.gradients.late)
        next_x, next_cotangent = order.wait_for((next_x, next_cotangent), mine)
        if (self.stage_of[self.backward] == 0).any():
            state = when(
                i_row["stage"] == 0, lambda state: rank.embed_grad(state, dx, i_row), state
            )
        last = layout.num_stages - 1
        if (self.stage_of[self.forward] == last).any():
            is_last = f_row["stage"] == last
            state, y = when(is_last, lambda carry: rank.head(carry[0], carry[1], f_row), (state, y))
            # The next beat begins with what the head gives, where there is one.
            next_cotangent = [
                jnp.where(is_last, mine, other)
                for mine, other in zip(pick(y), next_cotangent, strict=True)
            ]
        if rank.poison:
            state = _poison_dead(state, i_row)
        return state, next_x, next_cotangent

    def _embed(self, x: PyTree, row: Row) -> PyTree:
        is_first = row["stage"] == 0
        if not self.rank.functions.embeds_by_look_up:
            return lax.cond(is_first, lambda: self.rank.embed(row), lambda: x)
        # In a TPU compile, the matmuls that follow a conditional have their weights fetched late.
        return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), self.rank.embed(row), x)

    def _send(self, values: PyTree, pairs: Pairs) -> PyTree:
        with jax.named_scope(_scopes.SEND):
            if pairs:
                return lax.ppermute(values, self.rank.layout.axis, pairs)
        return registers.allocate(values, poison=self.rank.poison)

    def _unrolled(
        self, state: State, x: PyTree, cotangent: list, f_row: Row, i_row: Row
    ) -> tuple[State, PyTree, list, Callable[[State], State]]:
        """Runs F and I, layers unrolled; what W needs of I needs no slot."""
        rank, layout = self.rank, self.rank.layout
        aux, dx = state.aux, cotangent
        buffers = dict(state.residual), dict(state.weight_residual)
        names = "residual", "weight_residual"
        grads, shared = state.take_grads(self.backward, rank.gradients.early)
        grads = dict(grads)
        stashed = []
        layers = layout.layers_of(f_row["stage"]), layout.layers_of(i_row["stage"])[::-1]
        for f_layer, i_layer in zip(*layers, strict=True):
            kind = i_layer.kind
            kept, kept_longer = (
                _copy_small(registers.read_layer(buffer[kind], i_layer.index, i_row[name]), x)
                for buffer, name in zip(buffers, names, strict=True)
            )
            dx, values, _, early = rank.input_grad_of(
                i_layer, dx, kept, kept_longer, i_row, self.backward
            )
            stashed.append((i_layer, kept_longer, values))
            for buffer in buffers:
                buffer[kind] = registers.pass_on(
                    buffer[kind], i_layer.index, after=(dx, values, early)
                )
            grads[kind], shared = accumulators.add(
                grads[kind],
                shared,
                early,
                places=rank.gradients.early[kind],
                layer=i_layer.place,
            )

            kind = f_layer.kind
            x, aux_of_layer, *made = rank.forward_of(f_layer, x, f_row, self.forward)
            if aux_of_layer is not None:
                aux = _microbatches.add(aux, aux_of_layer)
            for buffer, name, values in zip(buffers, names, made, strict=True):
                buffer[kind] = registers.write_layer(
                    buffer[kind], values, f_layer.index, f_row[name]
                )
            # Each hides the other's collectives only if neither runs ahead by layers.
            x, dx = order.together(x, dx)
        state = state._replace(aux=aux, residual=buffers[0], weight_residual=buffers[1])
        state = state.put_grads(self.backward, rank.gradients.early, (grads, shared))
        return state, x, dx, lambda state: self._weight_grads(state, stashed, x, i_row)

    def _weight_grads(self, state: State, stashed: list, x: PyTree, row: Row) -> State:
        """Runs W of unrolled layers, of each of which there is what I has copied and what it left.

        Args:
          state: What the rank carries.
          stashed: For each layer itself, its residual for W as I has read it, and I's stash.
          x: What the layers pass on, for its size.
          row: A row that names the slots.
        """
        rank = self.rank
        buffers = dict(state.weight_residual)
        grads, shared = state.take_grads(self.backward, rank.gradients.late)
        grads = dict(grads)
        for layer, copied, values in stashed:
            kind = layer.kind
            kept = registers.read_layer(buffers[kind], layer.index, row["weight_residual"])
            kept = _pick_small(copied, kept, x)
            late = rank.weight_grad_of(layer, kept, values, row, self.backward, "stash")
            places = rank.gradients.late[kind]
            grads[kind], shared = accumulators.add(
                grads[kind], shared, late, places=places, layer=layer.place
            )
            mine = [grads[kind][i][layer.place] for i in places.layer]
            buffers[kind] = registers.pass_on(buffers[kind], layer.index, after=mine)
        state = state._replace(weight_residual=buffers)
        return state.put_grads(self.backward, rank.gradients.late, (grads, shared))

    def _looped(
        self, state: State, x: PyTree, cotangent: list, f_row: Row, i_row: Row
    ) -> tuple[State, PyTree, list, Callable[[State], State]]:
        """Runs F of layer j beside I of layer L-1-j in a loop; W in one of its own."""
        rank, layout = self.rank, self.rank.layout
        (kind,) = layout.stacks
        count = layout.num_layers_of_each
        places = rank.gradients.early

        def body(j: Any, loop: Any) -> Any:
            (x, dx, aux, shared), (residual, weight_residual, stash, grads) = loop
            i_layer = layout.layer_of_only_kind(i_row["stage"], count - 1 - j)
            kept, kept_longer = (
                registers.read_layer(buffer, i_layer.index, i_row[name])
                for buffer, name in (
                    (residual, "residual"),
                    (weight_residual, "weight_residual"),
                )
            )
            dx, values, _, early = rank.input_grad_of(
                i_layer, dx, kept, kept_longer, i_row, self.backward
            )
            stash = registers.write_layer(stash, values, i_layer.index, i_row["stash"])
            residual, weight_residual = (
                registers.pass_on(buffer, after=(dx, values, early))
                for buffer in (residual, weight_residual)
            )
            grads, shared = accumulators.add(
                grads, shared, early, places=places[kind], layer=i_layer.place
            )
            f_layer = layout.layer_of_only_kind(f_row["stage"], j)
            x, aux_of_layer, kept, kept_longer = rank.forward_of(f_layer, x, f_row, self.forward)
            if aux_of_layer is not None:
                aux = _microbatches.add(aux, aux_of_layer)
            residual = registers.write_layer(residual, kept, f_layer.index, f_row["residual"])
            weight_residual = registers.write_layer(
                weight_residual, kept_longer, f_layer.index, f_row["weight_residual"]
            )
            return (x, dx, aux, shared), (residual, weight_residual, stash, grads)

        grads, shared = state.take_grads(self.backward, places)
        buffers = (state.residual[kind], state.weight_residual[kind], state.stash[kind])
        loop = (x, cotangent, state.aux, shared), (*buffers, grads[kind])
        (x, dx, aux, shared), buffers = lax.fori_loop(0, count, body, loop)
        residual, weight_residual, stash, grads_of_kind = buffers
        state = state._replace(
            aux=aux,
            residual={kind: residual},
            weight_residual={kind: weight_residual},
            stash={kind: stash},
        )
        state = state.put_grads(self.backward, places, ({kind: grads_of_kind}, shared))
        return state, x, dx, lambda state: rank.weight_grad(state, i_row, self.backward, True)

    def _one_after_the_other(
        self, state: State, x: PyTree, cotangent: list, f_row: Row, i_row: Row
    ) -> tuple[State, PyTree, list, Callable[[State], State]]:
        """Runs F and I in loops of their own, where stages are unlike."""
        state, x = self.rank.forward(state, x, f_row, self.forward, True)
        state, dx = self.rank.input_grad(state, cotangent, i_row, self.backward, True)
        return state, x, dx, lambda state: self.rank.weight_grad(state, i_row, self.backward, True)


# A contraction reads its operands again for every tile of its output. From a slot that is slow: XLA
# fuses the read into the contraction, in place of fetching the value once. (On a TPU v5e, widths
# 1024 and 2048: W took up to 1.6 times as long.) So what is no larger than x is copied out of its
# slot, once for I and W; what is larger is read where it is needed, mostly elementwise.
def _copy_small(values: tuple[jax.Array, ...], x: PyTree) -> tuple[jax.Array, ...]:
    small = _is_small(values, x)
    pairs = zip(values, small, strict=True)
    return tuple(lax.optimization_barrier(value) if here else value for value, here in pairs)


def _pick_small(
    copied: tuple[jax.Array, ...], read: tuple[jax.Array, ...], x: PyTree
) -> tuple[jax.Array, ...]:
    """Takes what `_copy_small` has copied, and the rest as it is read now."""
    both = zip(copied, read, _is_small(read, x), strict=True)
    return tuple(old if here else new for old, new, here in both)


def _is_small(values: tuple[jax.Array, ...], x: PyTree) -> list[bool]:
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(x))
    return [value.nbytes <= largest for value in values]


def _poison_dead(state: State, row: Row) -> State:
    """Overwrites the slots that the backward has read for the last time."""
    return state._replace(
        residual=registers.poison(state.residual, row["residual"]),
        weight_residual=registers.poison(state.weight_residual, row["weight_residual"]),
        stash=registers.poison(state.stash, row["stash"]),
    )
