"""Beats: a forward and a backward on every rank, straight-line code without choices.

In: a rank, and the `tables.Steady` of a run of beats. Out: a function from state to state that
runs them all, two in a trip of one `lax.scan`: in even beats chunk 0 is forward and chunk 1
backward, in odd ones the other way round. So weights and accumulators are named, never chosen, and
what a beat sends goes between fixed pairs of ranks and is the next beat's input.

How F and I follow each other depends on the layers: `unrolled.py` has those that are unrolled, here
are those in loops.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _scopes
from dualpipe_jax._executor import accumulators, actions_of_stage, barriers, buffers, unrolled
from dualpipe_jax._executor.actions import Rank, Row
from dualpipe_jax._executor.buffers import when
from dualpipe_jax._executor.functions import Functions
from dualpipe_jax._executor.rows import RESIDUALS, SLOTS, in_rows
from dualpipe_jax._executor.stages import Layer
from dualpipe_jax._executor.start import empty_after, one_stash
from dualpipe_jax._executor.state import State
from dualpipe_jax._executor.ticks import spare_slots, store_arrivals
from dualpipe_jax._executor.unrolled import WeightGrads
from dualpipe_jax._leaves.leaves import pick, place
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT
from dualpipe_jax._schedule.tables import Pairs, Steady

PyTree = Any
# Kinds of layers that meet, F's and I's: each pair's code stands in the program once.
_MAX_PAIRS = 6


def make_run(rank: Rank, steady: Steady, rows: Row) -> Callable[[State], State]:
    """Makes the function that runs all beats.

    Args:
      rank: The rank.
      steady: The run of beats.
      rows: This rank's rows of the tables, int32[num_ticks] for each column.
    """
    ticks_per_trip = 2 * TICKS_PER_BEAT
    # (A beat's transfers are those of `Steady`.)
    mine = {name: column[steady.ticks] for name, column in rows.items() if name != "exchange"}
    trips = {name: column.reshape(-1, ticks_per_trip) for name, column in mine.items()}

    def tick_of(rows: Row, tick: int) -> Row:
        return {name: column[tick] for name, column in rows.items()}

    def two_beats(carry: tuple[State, PyTree, list], rows: Row) -> tuple[Any, None]:
        state, x, cotangent = carry
        with jax.named_scope(_scopes.STEADY):
            for parity in range(2):
                f_row, i_row = (tick_of(rows, TICKS_PER_BEAT * parity + i) for i in range(2))
                if parity == 1 and not rank.interleaves:
                    f_row = unrolled.after_beat(f_row, state, cotangent)
                beat = _Beat(rank, steady, parity)
                state, x, cotangent = beat.run(state, x, cotangent, f_row, i_row)
        return (state, x, cotangent), None

    def run(state: State) -> State:
        first = tick_of(mine, 0), tick_of(mine, 1)
        state = store_arrivals(state, first[0], state.messages)
        # A rank that embeds reads nothing: the last slot, which nobody else reads.
        slots = [spare_slots(state, row, "read")["read"] for row in first]
        x, cotangent = (buffers.read(state.received, slot) for slot in slots)
        if rank.poison:
            for slot in slots:
                state = state._replace(received=buffers.poison(state.received, slot))
        # What is idle takes no memory in the run: it ends here, and is made again after it.
        idle = {name: getattr(state, name) for name in rank.layout.idle_in(steady)}
        in_run: dict[str, Any] = {name: dict.fromkeys(kinds, ()) for name, kinds in idle.items()}
        if rank.stashes_in_beats:
            # Only there: in ticks W of what I has just stashed runs with it.
            idle["stash"] = state.stash
            stash = one_stash(rank.gradients, rank.layout)
            in_run["stash"] = empty_after(stash, after=(x, cotangent), poison=rank.poison)
        state = state._replace(**in_run)
        carry = (_in_rows(rank.functions, state), x, pick(cotangent))
        (state, x, cotangent), _ = lax.scan(two_beats, carry, trips)
        state = _in_rows(rank.functions, state)
        state = state._replace(**empty_after(idle, after=(x, cotangent), poison=rank.poison))
        return _leave(rank, steady, state, x, cotangent)

    return run


def _in_rows(functions: Functions, state: State) -> State:
    """Has a state's slots lie as ticks have them."""
    slots = in_rows(functions, {name: getattr(state, name) for name in SLOTS})
    return state._replace(**slots)


def _residuals_in_rows(
    functions: Functions, of_kinds: dict[Kind, "_OfKind"]
) -> dict[Kind, "_OfKind"]:
    """Has residuals lie as ticks, and the loop over W's layers, have them.

    A stash lies as I makes it: row by row it took 2 % more cycles (TPU v5e, a transformer).
    """
    slots = in_rows(
        functions,
        {
            name: {kind: getattr(mine, name) for kind, mine in of_kinds.items()}
            for name in RESIDUALS
        },
    )
    return {
        kind: mine._replace(**{name: slots[name][kind] for name in RESIDUALS})
        for kind, mine in of_kinds.items()
    }


def _leave(rank: Rank, steady: Steady, state: State, x: PyTree, cotangent: list) -> State:
    """Stores what the last beat sent where the tables have it."""
    last = jax.tree.leaves(state.received)[0].shape[0] - 1
    me = lax.axis_index(rank.layout.axis)

    def slot(slots: np.ndarray) -> jax.Array:
        return jnp.asarray(np.where(slots < 0, last, slots), jnp.int32)[me]

    received = buffers.write(state.received, x, slot(steady.x_slot))
    received = buffers.write(received, place(x, cotangent), slot(steady.cotangent_slot))
    nothing = buffers.allocate(x, poison=rank.poison)
    return state._replace(received=received, messages=(nothing, nothing))


class _OfKind(NamedTuple):
    """What a loop over layers carries for the layers of a kind; see `State`."""

    residual: Any
    weight_residual: Any
    stash: Any
    grads: list[Any]
    metrics: list[Any]


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
            chunks = self.forward, self.backward
            beat = functools.partial(unrolled.run_beat, rank, chunks)
        elif rank.interleaves and len(layout.pairs(self.forward, self.backward)) <= _MAX_PAIRS:
            beat = self._looped
        else:
            beat = self._one_after_the_other
        state, y, dx, weight_grad = beat(state, x, cotangent, f_row, i_row)
        sent = barriers.row_major((y, dx))
        arrivals = self._send(sent[0], self.x_pairs), self._send(sent[1], self.cotangent_pairs)
        state, (y, dx), (next_x, next_cotangent) = weight_grad(state, sent, arrivals)
        if rank.interleaves:
            # Else a GPU's compiler puts W off to the end, and copies the slots that it reads.
            mine = state.take_grads(self.backward, rank.gradients.late)
            next_x, next_cotangent = barriers.wait_for((next_x, next_cotangent), mine)
        if (self.stage_of[self.backward] == 0).any():
            state = when(
                i_row["stage"] == 0, lambda state: rank.embed_grad(state, dx, i_row), state
            )
        if (self.stage_of[self.forward] == layout.num_stages - 1).any():
            state, next_cotangent = self._head(state, y, next_cotangent, f_row)
        if rank.poison:
            state = _poison_dead(state, i_row)
        return state, next_x, next_cotangent

    def _head(
        self, state: State, y: PyTree, cotangent: list[jax.Array], row: Row
    ) -> tuple[State, list[jax.Array]]:
        """Runs the head on the last stage, where what it gives takes the place of `cotangent`.

        The next beat's backward begins with it. It is written over what came from a neighbour, so
        that nothing is selected on every rank.
        """

        def head(carry: tuple[State, list[jax.Array]]) -> tuple[State, list[jax.Array]]:
            state, out = self.rank.head(carry[0], y, row)
            return state, pick(out)

        is_last = row["stage"] == self.rank.layout.num_stages - 1
        return when(is_last, head, (state, cotangent))

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
        return buffers.allocate(values, poison=self.rank.poison)

    def _looped(
        self, state: State, x: PyTree, cotangent: list, f_row: Row, i_row: Row
    ) -> tuple[State, PyTree, list, WeightGrads]:
        """Runs F of layer j beside I of layer L-1-j in a loop; W in one of its own."""
        rank, layout = self.rank, self.rank.layout
        places = rank.gradients.early

        def input_grad(layer: Layer, dx: list, shared: Any, mine: _OfKind) -> Any:
            kept, kept_longer = (
                buffers.read_layer(buffer, layer.index, i_row[name])
                for buffer, name in (
                    (mine.residual, "residual"),
                    (mine.weight_residual, "weight_residual"),
                )
            )
            kept, kept_longer = rank.like_slots(layer, residual=kept, weight_residual=kept_longer)
            dx, values, _, early = rank.input_grad_of(
                layer, dx, kept, kept_longer, i_row, self.backward
            )
            residual, weight_residual = (
                buffers.pass_on(buffer, after=(dx, values, early))
                for buffer in (mine.residual, mine.weight_residual)
            )
            grads, shared = accumulators.add(
                mine.grads, shared, early, places=places[layer.kind], layer=layer.place
            )
            mine = mine._replace(
                stash=buffers.write_layer(mine.stash, values, layer.index, i_row["stash"]),
                residual=residual,
                weight_residual=weight_residual,
                grads=grads,
            )
            return dx, shared, mine

        def forward(layer: Layer, x: PyTree, aux: Any, mine: _OfKind, dx: list) -> Any:
            x, aux_of_layer, *made = rank.forward_of(layer, x, f_row, self.forward)
            kept, kept_longer = barriers.wait_for(made, (x, dx))  # as in `unrolled.run_beat`
            kept, kept_longer = rank.like_slots(layer, residual=kept, weight_residual=kept_longer)
            aux, metrics = accumulators.add_aux(aux, mine.metrics, aux_of_layer, layer=layer.place)
            mine = mine._replace(
                residual=buffers.write_layer(mine.residual, kept, layer.index, f_row["residual"]),
                weight_residual=buffers.write_layer(
                    mine.weight_residual, kept_longer, layer.index, f_row["weight_residual"]
                ),
                metrics=metrics,
            )
            return x, aux, mine

        def both(f_layer: Layer | None, i_layer: Layer | None, loop: Any) -> Any:
            x, dx, aux, shared, of_kinds = loop
            if i_layer is not None:
                dx, shared, mine = input_grad(i_layer, dx, shared, of_kinds[i_layer.kind])
                of_kinds = {**of_kinds, i_layer.kind: mine}
            if f_layer is not None:
                x, aux, mine = forward(f_layer, x, aux, of_kinds[f_layer.kind], dx)
                of_kinds = {**of_kinds, f_layer.kind: mine}
            return x, dx, aux, shared, _residuals_in_rows(rank.functions, of_kinds)

        grads, shared = state.take_grads(self.backward, places)
        of_kinds = {
            kind: _OfKind(
                residual=state.residual[kind],
                weight_residual=state.weight_residual[kind],
                stash=state.stash[kind],
                grads=grads[kind],
                metrics=state.block_metrics[self.forward][kind],
            )
            for kind in layout.stacks
        }
        loop = x, cotangent, state.aux, shared, of_kinds
        x, dx, aux, shared, of_kinds = layout.loop_pairs(
            (self.forward, self.backward), (f_row["stage"], i_row["stage"]), both, loop
        )

        def each(name: str) -> dict[Kind, Any]:
            return {kind: getattr(mine, name) for kind, mine in of_kinds.items()}

        state = state.put_aux(self.forward, aux, each("metrics"))._replace(
            residual=each("residual"),
            weight_residual=each("weight_residual"),
            stash=each("stash"),
        )
        state = state.put_grads(self.backward, places, (each("grads"), shared))
        return state, x, dx, self._weight_grads(i_row)

    def _one_after_the_other(
        self, state: State, x: PyTree, cotangent: list, f_row: Row, i_row: Row
    ) -> tuple[State, PyTree, list, WeightGrads]:
        """Runs F and I in loops of their own, as stages are unlike or nothing is to overlap."""
        state, x = actions_of_stage.forward(self.rank, state, x, f_row, self.forward, True)
        if self.rank.full_backward and not self.rank.interleaves:
            state, dx = actions_of_stage.backward(
                self.rank, state, cotangent, i_row, self.backward, True
            )
            return state, x, dx, lambda state, *transfers: (state, *transfers)
        state, dx = actions_of_stage.input_grad(
            self.rank, state, cotangent, i_row, self.backward, True
        )
        return state, x, dx, self._weight_grads(i_row)

    def _weight_grads(self, row: Row) -> WeightGrads:
        def run(state: State, *transfers: PyTree) -> tuple[State, PyTree, PyTree]:
            state = actions_of_stage.weight_grad(self.rank, state, row, self.backward, True)
            return state, *lax.optimization_barrier(transfers)

        return run


def _poison_dead(state: State, row: Row) -> State:
    """Overwrites the slots that the backward has read for the last time."""
    names = (*RESIDUALS, "stash")
    dead = {name: buffers.poison(getattr(state, name), row[name]) for name in names}
    return state._replace(**dead)
