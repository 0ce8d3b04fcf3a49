"""One beat: a forward and a backward on every rank, straight-line code without choices.

Beats repeat after a period: in beat b of it chunk b is forward and chunk `Steady.backward[b]` is
backward. So weights and sums are fixed, never selected, and the values that a beat sends go between
fixed pairs of ranks. They are the next beat's input or, on a rank where values wait, that of a beat
a fixed number later.

The order of F, I and W of the layers, and of the transfers, is a list of `layer_order`. In
straight-line code data alone orders the work: XLA is free to run F of a layer beside I of another,
and W beside both and beside the next beat's F. A slot buffer shared by layers could add false
dependencies, so every layer has its own: where XLA does not see whether a read or a write of a
buffer comes first, it copies the buffer, so that the order has to be fixed (`barriers`), and one
waits for the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _scopes
from dualpipe_jax._devices import find_device
from dualpipe_jax._executor import barriers, buffers
from dualpipe_jax._executor.actions import (
    embed,
    embed_grad,
    head,
    run_backward,
    run_forward,
)
from dualpipe_jax._executor.buffers import RESIDUALS, lay_out, when
from dualpipe_jax._executor.layer import Flow, Held, LayerWork
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.stages import Layer
from dualpipe_jax._executor.state import LayerBuffers, State
from dualpipe_jax._leaves.pick import pick, put_leaves
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule import layer_order
from dualpipe_jax._schedule.layer_order import RECEIVE, SEND, LayerAction, Loop, Order
from dualpipe_jax._schedule.tables import Pairs, Steady
from dualpipe_jax._split_vjp import contraction_flops

# The most pairs of kinds, F's and I's, side by side: the program has the code of each pair.
_MAX_PAIRS = 6
# The buffers of the backward chunk's layers, and the slots of the forward's, that a beat touches.
_TOUCHES = (*RESIDUALS, "stash", "grads")


def after_beat(row: Row, state: State, cotangents: list[list[jax.Array]]) -> Row:
    """Makes the slots that F writes known only after all reads of the beat before.

    Every value that a beat reads goes into a weight grad, or into the cotangent that it sends.
    """
    made = state.block_grads, state.ends_grads, state.shared_grads, cotangents
    zero = barriers.zero_after(made)
    return {**row, **{name: row[name] + zero for name in RESIDUALS}}


@dataclass
class _Transfers:
    """Holds the values that a beat sends, and those that arrive."""

    sent: tuple[PyTree, Any] = (None, None)
    arrivals: tuple[PyTree, Any] = (None, None)


class Beat:
    """Runs one beat of a period, `number`: the forward of a chunk, the backward of a chunk.

    The backward's row is that of the input grad's tick; the weight grad's names the same slots.
    """

    def __init__(self, rank: Rank, steady: Steady, number: int, f_row: Row, i_row: Row):
        self.rank, self.f_row, self.i_row = rank, f_row, i_row
        self.forward, self.backward = number, steady.backward[number]
        self.pairs = steady.x_pairs[number], steady.cotangent_pairs[number]
        self.waits = steady.x_wait, steady.cotangent_wait
        is_unrolled = rank.stages.is_unrolled
        self.work = LayerWork(
            rank=rank,
            forward=(self.forward, f_row),
            backward=(self.backward, i_row),
            stores=() if is_unrolled else ("stash",),
            is_straight=is_unrolled,
            is_beside=rank.settings.runs_side_by_side,
        )

    def run(
        self, state: State, xs: list[PyTree], cotangents: list[list[jax.Array]]
    ) -> tuple[State, list[PyTree], list[list[jax.Array]]]:
        """Runs the beat, and returns the values that the next ones read.

        Args:
          state: The rank's state.
          xs: The x that the forward reads, except on the first stage; behind it those that wait for
            the next beats, as many as the most that a value waits.
          cotangents: The same for the input grad, of the leaves that have a cotangent.
        """
        (x, *later_xs), (cotangent, *later_cotangents) = xs, cotangents
        rank, stages = self.rank, self.rank.stages
        stage_of, f_row, i_row = stages.stage_of, self.f_row, self.i_row
        if (stage_of[self.forward] == 0).any():
            x = self._embed(x)
        state, transfers = self._run_order(self._order(x), state, x, cotangent)
        (y, dx), (next_x, next_cotangent) = transfers.sent, transfers.arrivals
        if rank.settings.runs_side_by_side:
            # Else a GPU's compiler defers W to the end, and copies the slots that it reads.
            of_w = rank.gradients.index["W"]
            grads = state.take(("grads",), self.backward, of_w), state.take_shared(of_w)
            next_x, next_cotangent = barriers.wait_for((next_x, next_cotangent), grads)
        next_xs = self._upcoming(self.waits[0], later_xs, next_x)
        next_cotangent, *next_cotangents = self._upcoming(
            self.waits[1], later_cotangents, next_cotangent
        )
        if (stage_of[self.backward] == 0).any():
            state = when(
                i_row["stage"] == 0, lambda state: embed_grad(rank, state, dx, i_row), state
            )
        if (stage_of[self.forward] == stages.num_stages - 1).any():
            # Overwrites the value received from a neighbour; a select would run on every rank.
            def run_head(carry: tuple[State, list[jax.Array]]) -> tuple[State, list[jax.Array]]:
                state, out = head(rank, carry[0], y, f_row)
                return state, pick(out)

            is_last = f_row["stage"] == stages.num_stages - 1
            state, next_cotangent = when(is_last, run_head, (state, next_cotangent))
        if rank.settings.poison:
            names = (*RESIDUALS, "stash")
            slots = state.slots
            state = state.with_slots(
                {n: {kind: of.poison(i_row[n]) for kind, of in slots[n].items()} for n in names}
            )
        return state, next_xs, [next_cotangent, *next_cotangents]

    def _upcoming(self, wait: np.ndarray, later: list[PyTree], arrived: PyTree) -> list[PyTree]:
        """Puts the value that has arrived behind those that are read before it.

        Args:
          wait: int[num_ranks], how many beats a value waits on each rank.
          later: The values for the beats after this one, without the last.
          arrived: The value.
        """
        upcoming = []
        for number, value in enumerate(later):
            if (wait == number).any():
                is_here = jnp.asarray(wait == number)[lax.axis_index(self.rank.stages.axis)]
                value = jax.tree.map(partial(jnp.where, is_here), arrived, value)
            upcoming.append(value)
        return [*upcoming, arrived]

    def _embed(self, x: PyTree) -> PyTree:
        is_first = self.f_row["stage"] == 0
        if not self.rank.functions.embeds_by_look_up:
            return lax.cond(is_first, lambda: embed(self.rank, self.f_row), lambda: x)
        # On TPUs XLA fetches the weights of matmuls that follow a conditional late.
        embedded = embed(self.rank, self.f_row)
        return jax.tree.map(lambda a, b: jnp.where(is_first, a, b), embedded, x)

    def _order(self, x: PyTree) -> Order:
        """Chooses the order in which the layers of the two stages run."""
        rank, stages = self.rank, self.rank.stages
        if not stages.is_unrolled:
            if not rank.settings.runs_side_by_side:
                is_full = rank.settings.full_backward
                return layer_order.LOOPED_FULL_BACKWARD if is_full else layer_order.LOOPED_IN_A_ROW
            has_few_pairs = len(stages.pairs(self.forward, self.backward)) <= _MAX_PAIRS
            return layer_order.LOOPED if has_few_pairs else layer_order.LOOPED_IN_A_ROW
        layers = stages.layers_of(self.i_row["stage"], self.backward)
        num_layers, always = len(layers), [layer for layer in layers if layer.is_there is True]
        if not rank.settings.runs_side_by_side:
            order = layer_order.in_a_row(num_layers)
        elif rank.settings.communicates:
            order = layer_order.side_by_side(num_layers, num_held=len(always), all_wait=False)
        else:
            flops = [self._weight_grad_flops(layer) for layer in always]
            num_held = _num_held(rank, always, flops, x)
            order = layer_order.side_by_side(
                num_layers,
                num_held=num_held,
                reads_arrivals=_can_hide(
                    sum(flops[1:num_held]), (x, pick(x)), rank.settings.device_kind, times=2
                ),
            )
            sizes = [stages.sizes_of(chunk) for chunk in (self.forward, self.backward)]
            if max(map(len, sizes)) > 1 and not _one_hides(rank, flops, x):
                # Around a loop of one trip or none XLA runs all of F first, and I, whose values
                # fill fast memory, takes long (TPU v5e, an MLP of width 1024: 2.4 % more cycles).
                # Where one W hides the transfers, waiting costs 1.5 % (width 2048).
                order = layer_order.hold_last_forward(order, num_forward=max(sizes[0]))
        return layer_order.join_backwards(order, num_always=len(always))

    def _weight_grad_flops(self, layer: Layer) -> int:
        """Counts the FLOPs of a layer's weight grad; nothing runs."""
        params, ctx = self.rank.read_layer(self.i_row, self.backward, layer)
        block = self.rank.gradients.block[layer.kind]
        return contraction_flops(block.weight_grad, params, ctx, block.weight_residual, block.stash)

    def _run_order(
        self, order: Order, state: State, x: PyTree, cotangent: list[jax.Array]
    ) -> tuple[State, _Transfers]:
        """Interprets an order."""
        transfers, flow = _Transfers(), Flow(x=x, dx=cotangent)
        run = self._run_steps if self.rank.stages.is_unrolled else self._run_loops
        return run(order, state, flow, transfers), transfers

    def _run_loops(self, order: Order, state: State, flow: Flow, transfers: _Transfers) -> State:
        """Interprets an order of loops over the layers."""
        work = replace(self.work, is_beside=False)
        for item in order:
            if not isinstance(item, Loop):
                self._transfer(item, flow, transfers)
            elif item.actions == "IF":
                state, flow = self._run_pairs(state, flow)
            elif item.actions == "F":
                state, x = run_forward(work, state, flow.x, True)
                flow = flow._replace(x=x)
            else:
                dx = None if item.actions == "W" else flow.dx
                is_full = item.actions == "IW"
                work_of_item = replace(work, stores=()) if is_full else work
                state, dx = run_backward(work_of_item, item.actions, state, dx, True)
                flow = flow if dx is None else flow._replace(dx=dx)
        return state

    def _run_pairs(self, state: State, flow: Flow) -> tuple[State, Flow]:
        """Runs F of layer j beside I of layer L-1-j in a loop."""
        work, stages, index = self.work, self.rank.stages, self.rank.gradients.index["I"]
        flow = flow._replace(aux=state.aux, shared=state.take_shared(index))

        def both(
            f_layer: Layer | None, i_layer: Layer | None, carry: tuple[Flow, Any]
        ) -> tuple[Flow, dict[Kind, LayerBuffers]]:
            flow, of_kinds = carry
            if i_layer is not None:
                kind = i_layer.kind
                flow, layer_buffers, _ = work.run_input_grad(i_layer, flow, of_kinds[kind])
                of_kinds = {**of_kinds, kind: layer_buffers}
            if f_layer is not None:
                kind = f_layer.kind
                flow, layer_buffers = work.run_forward(f_layer, flow, of_kinds[kind])
                of_kinds = {**of_kinds, kind: layer_buffers}
            # Not the stash: `LayerWork` does not write it in its order in memory either.
            residuals = lay_out(
                {
                    kind: {name: layer_buffers.slots[name] for name in RESIDUALS}
                    for kind, layer_buffers in of_kinds.items()
                }
            )
            return flow, {
                kind: layer_buffers.with_slots(residuals[kind])
                for kind, layer_buffers in of_kinds.items()
            }

        stage_of_each = self.f_row["stage"], self.i_row["stage"]
        chunks, carry = (self.forward, self.backward), (flow, self._take(state, index))
        flow, of_kinds = stages.loop_pairs(chunks, stage_of_each, both, carry)
        return self._put(state, of_kinds, flow), flow

    def _run_steps(self, order: Order, state: State, flow: Flow, transfers: _Transfers) -> State:
        """Interprets an order of straight-line code."""
        rank, work, index = self.rank, self.work, self.rank.gradients.index["IW"]
        flow = flow._replace(
            aux=state.aux, shared=state.take_shared(index), turn=rank.first_turn(self.i_row)
        )
        of_kinds = self._take(state, index)
        f_layers = rank.stages.layers_of(self.f_row["stage"], self.forward)
        i_layers = rank.stages.layers_of(self.i_row["stage"], self.backward)
        held: dict[int, Held] = {}
        for item in order:
            if not isinstance(item, LayerAction):
                self._transfer(item, flow, transfers)
                continue
            layer = (f_layers if item.action == "F" else i_layers)[item.layer]
            if layer.is_there is False:
                continue
            if item.action == "F" and item.waits_for:
                x, dx = lax.optimization_barrier((flow.x, flow.dx))
                flow = flow._replace(x=x, dx=dx)
            layer_buffers = of_kinds[layer.kind]
            if layer.is_there is not True:
                flow, layer_buffers = work.run(item.action, layer, flow, layer_buffers)
            elif item.action == "F":
                flow, layer_buffers = work.run_forward(layer, flow, layer_buffers)
            elif item.action == "I":
                flow, layer_buffers, held[item.layer] = work.run_input_grad(
                    layer, flow, layer_buffers
                )
            else:
                operands = self._held_up(layer, held.pop(item.layer), item.waits_for, transfers)
                flow, layer_buffers = work.run_weight_grad(layer, flow, layer_buffers, operands)
                flow = work.end_turn(layer, flow, layer_buffers)
            of_kinds = {**of_kinds, layer.kind: layer_buffers}
        return self._put(state, of_kinds, flow)

    def _take(self, state: State, index: Any) -> dict[Kind, LayerBuffers]:
        taken = state.take(_TOUCHES, self.backward, index)
        (metrics,) = state.take(("metrics",), self.forward, index)
        return {
            kind: LayerBuffers.of(_TOUCHES, [by_kind[kind] for by_kind in taken])._replace(
                metrics=metrics[kind]
            )
            for kind in self.rank.stages.stacks
        }

    def _put(self, state: State, of_kinds: dict[Kind, LayerBuffers], flow: Flow) -> State:
        def by_kind(names: tuple[str, ...]) -> list[dict[Kind, Any]]:
            entries = {
                kind: layer_buffers.entries(names) for kind, layer_buffers in of_kinds.items()
            }
            return [{kind: of[i] for kind, of in entries.items()} for i in range(len(names))]

        state = state.put(_TOUCHES, self.backward, by_kind(_TOUCHES))
        state = state.put(("metrics",), self.forward, by_kind(("metrics",)))
        assert flow.shared is not None
        return state.put_shared(flow.shared)._replace(aux=flow.aux)

    def _transfer(self, item: object, flow: Flow, transfers: _Transfers) -> None:
        """Starts the beat's transfers, or makes their readers wait for all that ran before."""
        if item == SEND:
            transfers.sent = barriers.row_major((flow.x, flow.dx))
            to_x, to_cotangent = self.pairs
            transfers.arrivals = (
                self._send(transfers.sent[0], to_x),
                self._send(transfers.sent[1], to_cotangent),
            )
        else:
            assert item == RECEIVE
            both = transfers.sent, transfers.arrivals
            transfers.sent, transfers.arrivals = lax.optimization_barrier(both)

    def _send(self, values: PyTree, pairs: Pairs) -> PyTree:
        with jax.named_scope(_scopes.SEND):
            if pairs:
                return lax.ppermute(values, self.rank.stages.axis, pairs)
        return buffers.allocate(values, poison=self.rank.settings.poison)

    def _held_up(self, layer: Layer, held: Held, waits_for: str, transfers: _Transfers) -> Held:
        """Makes a layer's W wait for the transfers, and their readers for the operands of W."""
        if not waits_for:
            return held
        rank = self.rank
        may_wait = rank.gradients.block[layer.kind].stash_may_wait
        if (
            rank.settings.communicates
        ):  # else W may run where an exchange needs it (experts: 1.5 % more cycles)
            may_wait = (True,) * len(may_wait)
        values = transfers.sent if waits_for == SEND else transfers.arrivals
        operands, values = lax.optimization_barrier((pick(held.stash, may_wait), values))
        if waits_for == RECEIVE:
            transfers.arrivals = values
        return held._replace(stash=put_leaves(held.stash, operands, may_wait))


# On TPUs slots are read where the values are needed, by I and again by W, and not copied out first:
# with `dualpipe_jax.compiler_options` a contraction reads a slot as fast as an array. (TPU v5e,
# widths 1024 and 2048: copying values no larger than x took 2 to 3 % more cycles. Without
# xla_msa_use_bundle_aware_cost_model it paid: W took up to 1.6 times as long without it.) On GPUs
# they are copied out: `barriers.copied_out`.
#
# W of a layer follows its I and F, unless it has to hide the transfers at the end: the last W does
# if it takes long enough, else as many of the last W's as hide them, the very last not counted.
# These all wait for the transfers' start. (Four layers of an MLP block, width 2048: 2 % fewer
# cycles than if every W waits. On CPUs, where none waits: 3 % less CPU time with eight layers. If
# the next I waited for W, as on CPUs, a TPU's memory would hold 9 % less at width 1024, four
# layers, for 0.7 % more cycles.)
# Where blocks have collectives of their own, which W may have to hide, or layers are of several
# kinds, every W is at the end; and with collectives only the last one waits.
#
# If the other W's hide the transfers, the last one waits for the values that arrive: these come
# from a TPU's memory while it computes, where the next beat's first matmuls would otherwise wait
# for them (width 1024, two layers: 4 % fewer cycles; before the last contraction only: 1 %).
def _num_held(rank: Rank, layers: Sequence[Layer], flops: Sequence[int], x: PyTree) -> int:
    """Decides how many weight grads run after the transfers have started.

    Args:
      rank: The rank.
      layers: The layers of the stage that runs backwards.
      flops: The FLOPs of their weight grads.
      x: The activation that is sent, or avals of it.
    """
    if not layers or len({layer.kind for layer in layers}) > 1:
        return len(layers)
    if _one_hides(rank, flops, x):
        return 1
    enough = (
        held
        for held in range(2, len(layers))
        if _can_hide((held - 1) * flops[-1], (x,), rank.settings.device_kind, times=2)
    )
    return next(enough, len(layers))


def _one_hides(rank: Rank, flops: Sequence[int], x: PyTree) -> bool:
    """Whether the weight grad of a stage's last layer hides the transfers alone."""
    return bool(flops) and _can_hide(flops[-1], (x,), rank.settings.device_kind, times=2.5)


def _can_hide(flops: int, arrivals: PyTree, device_kind: str | None, *, times: float) -> bool:
    """Whether contractions are known to take at least `times` as long as the transfers.

    Args:
      flops: The FLOPs of the contractions.
      arrivals: The values that arrive at the same time, from each side.
      device_kind: As `find_device` takes it.
      times: The factor.
    """
    device = find_device(device_kind)
    num_bytes = max(sum(leaf.nbytes for leaf in jax.tree.leaves(side)) for side in arrivals)
    return device is not None and flops / device.peak_flops >= times * num_bytes / device.link
