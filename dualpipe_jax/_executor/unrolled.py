"""The F, I and W of a beat with layers unrolled, and the order in which they touch the slots.

Data alone orders the work: XLA is free to run F of a layer beside I of another, and W beside both
and beside the next beat's F. What could order it falsely is a slot buffer, of which every layer has
its own: where XLA does not see whether a read or a write of a buffer comes first, it copies it, so
that the order has to be said, and then each waits for the other. Two ways:

Interleaved, for devices that overlap transfers and compute: F of layer j is beside I of layer
L-1-j, so that what one waits for in the other has its turn earlier anyway. A block's own
all-to-alls so have the other direction's compute to hide behind. A beat of four layers:

    F  0   1   2 3 -> x to the neighbour    layers 0, 1: F writes, then I reads
    I  3   2   1 0 -> cotangent to it       layers 3, 2: I reads, then F writes
    W    3   2       1 0                    of the last layers: x and cotangent travel meanwhile

One after the other, for CPUs: F of all layers, then of each I and W in its turn, so that all reads
of a beat come after its writes, and only the next beat's writes have to wait.

How the order is said is `order.py`'s matter.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from dualpipe_jax._devices import find_device
from dualpipe_jax._executor import accumulators, barriers, buffers
from dualpipe_jax._executor.accumulators import Places
from dualpipe_jax._executor.actions import Rank, Row
from dualpipe_jax._executor.rows import RESIDUALS
from dualpipe_jax._executor.stages import Layer
from dualpipe_jax._executor.state import State
from dualpipe_jax._leaves.leaves import place, select
from dualpipe_jax._model.kinds import Kind

PyTree = Any
# Runs W: `(state, what is sent, what arrives) -> (state, what was sent, what has arrived)`. Whoever
# reads those waits for the transfers, so that W hides them, and not what the end ranks alone run.
WeightGrads = Callable[[State, PyTree, PyTree], tuple[State, PyTree, PyTree]]


def run_beat(
    rank: Rank,
    chunks: tuple[int, int],
    state: State,
    x: PyTree,
    cotangent: list[jax.Array],
    f_row: Row,
    i_row: Row,
) -> tuple[State, PyTree, list[jax.Array], WeightGrads]:
    """Runs F and I of a beat, and W of the layers that nothing is to wait for.

    Args:
      rank: The rank.
      chunks: The chunk that is forward, and the one that is backward.
      state: What the rank carries.
      x: What F reads.
      cotangent: What I reads.
      f_row: The row of F's tick.
      i_row: The row of I's tick, whose slots W reads as well.

    Returns:
      The state, what F made, what I made, and the function that runs the rest of W. What W needs of
      I is kept without a slot.
    """
    layout, gradients = rank.layout, rank.gradients
    forward, backward = chunks
    aux, dx = state.aux, cotangent
    metrics = dict(state.block_metrics[forward])
    waiting: list[_Waiting] = []

    def run_forward(layer: Layer) -> Any:
        nonlocal x, aux
        x, aux_of_layer, *kept = rank.forward_of(layer, x, f_row, forward)
        aux, metrics[layer.kind] = accumulators.add_aux(
            aux, metrics[layer.kind], aux_of_layer, layer=layer.place
        )
        return kept

    def keep(layer: Layer, kept: Any) -> None:
        nonlocal state
        for name, values in zip(RESIDUALS, kept, strict=True):
            buffer = getattr(state, name)[layer.kind]
            buffer = buffers.write_layer(buffer, values, layer.index, f_row[name])
            state = _with_buffer(state, name, layer, buffer)

    def run_input_grad(layer: Layer) -> None:
        nonlocal dx, state
        kept, kept_longer = (
            barriers.copied_out(
                _read(rank, state, name, layer, i_row), small=rank.functions.size_of_x
            )
            for name in RESIDUALS
        )
        dx, values, _, early = rank.input_grad_of(layer, dx, kept, kept_longer, i_row, backward)
        waiting.append(_Waiting(layer, kept_longer, values))
        if rank.interleaves:
            for name in RESIDUALS:
                state = _pass_on(state, name, layer, after=(dx, values, early))
        state = _add(state, backward, gradients.early, layer, early)

    def run_weight_grads(num_left: int) -> None:
        nonlocal state
        while len(waiting) > num_left:
            state = _run_weight_grad(rank, backward, state, waiting.pop(0), i_row)

    f_layers, i_layers = layout.layers_of(f_row["stage"]), layout.layers_of(i_row["stage"])[::-1]
    if rank.interleaves:
        num_early = 0
        for number, (f_layer, i_layer) in enumerate(zip(f_layers, i_layers, strict=True)):
            run_input_grad(i_layer)
            kept = run_forward(f_layer)
            # Each hides the other's collectives only if neither runs ahead by layers; and what is
            # kept, if written earlier, would be what a GPU runs beside them in a matmul's place.
            x, dx, kept = barriers.wait_for((x, dx, kept), (x, dx))
            keep(f_layer, kept)
            if number == 0:
                num_early = len(i_layers) - _num_held(
                    rank, i_layers, waiting[0], backward, x, i_row
                )
            run_weight_grads(max(0, number + 1 - num_early))
    else:
        for layer in f_layers:
            keep(layer, run_forward(layer))
        row, turn = i_row, rank.first_turn(i_row)
        for layer in i_layers:
            i_row = rank.in_turn(row, turn)
            run_input_grad(layer)
            run_weight_grads(0)
            grads, _ = state.take_grads(backward, gradients.late)
            turn = rank.next_turn(turn, layer, grads[layer.kind], dx)
    state = state.put_aux(forward, aux, metrics)

    def weight_grads(state: State, sent: PyTree, arrivals: PyTree) -> tuple[State, PyTree, PyTree]:
        return _finish_weight_grads(rank, backward, state, sent, arrivals, waiting, i_row)

    return state, x, dx, weight_grads


# On TPUs slots are read where the values are needed, by I and again by W, and not copied out first:
# with `dualpipe_jax.compiler_options` a contraction reads a slot as fast as an array. (TPU v5e,
# widths 1024 and 2048: copying what is no larger than x took 2 to 3 % more cycles. Without
# xla_msa_use_bundle_aware_cost_model it paid: W took up to 1.6 times as long without it.) On GPUs
# they are copied out: `order.copied_out`.
#
# W of a layer follows its I and F, unless it has to hide what is sent at the end: that of the last
# layer if it takes long enough, else that of as many of the last ones as do before the last one.
# All of it then waits for what is sent. (Four layers of an MLP block, width 2048: 2 % fewer cycles
# than if all of W waits. On CPUs, where none waits: 3 % less CPU time with eight layers. To have
# the next I wait for W, as it does there, leaves 9 % less in a TPU's memory at width 1024, four
# layers, and takes 0.7 % more cycles.)
# Where blocks have collectives of their own, which W may have to hide, or layers are of several
# kinds, all of W is at the end; and of the former only the last layer's waits.
#
# If W of the others hides it, what arrives from the neighbours is waited for before the last one's:
# behind it, it comes from a TPU's memory while W computes, where the next beat's first matmuls
# would else wait for it (width 1024, two layers: 4 % fewer cycles; before the last contraction
# only: 1 %).
def _num_held(
    rank: Rank, layers: Sequence[Layer], first: "_Waiting", chunk: int, x: PyTree, row: Row
) -> int:
    """Decides of how many of the last layers W waits until the beat's results are sent.

    Args:
      rank: The rank.
      layers: Those of which I runs.
      first: The first of them, after its I.
      chunk: The chunk that is backward.
      x: What is sent.
      row: The row of I's tick.
    """
    if rank.communicates or len({layer.kind for layer in layers}) > 1:
        return len(layers)
    flops = _flops(rank, first, row, chunk)
    if _can_hide(flops, (x,), rank.device_kind, times=2.5):
        return 1
    enough = (
        held
        for held in range(2, len(layers))
        if _can_hide((held - 1) * flops, (x,), rank.device_kind, times=2)
    )
    return next(enough, len(layers))


def _finish_weight_grads(
    rank: Rank,
    chunk: int,
    state: State,
    sent: PyTree,
    arrivals: PyTree,
    waiting: Sequence["_Waiting"],
    row: Row,
) -> tuple[State, PyTree, PyTree]:
    """Runs W of the layers for which it still waits."""
    flops = sum(_flops(rank, each, row, chunk) for each in waiting[:-1])
    others_hide = not rank.communicates and _can_hide(flops, arrivals, rank.device_kind, times=2)
    for each in waiting:
        is_last = each is waiting[-1]
        if others_hide and is_last:
            each, arrivals = _held_up(rank, each, arrivals)
        elif not others_hide and (is_last or not rank.communicates):
            each, _ = _held_up(rank, each, sent)
        state = _run_weight_grad(rank, chunk, state, each, row)
    if not others_hide:
        sent, arrivals = lax.optimization_barrier((sent, arrivals))
    return state, sent, arrivals


class _Waiting(NamedTuple):
    """A layer whose W is still to run: what I copied out of its slot, and I's stash."""

    layer: Layer
    copied: tuple[jax.Array, ...]
    stash: tuple[jax.Array, ...]


def _held_up(rank: Rank, each: _Waiting, others: PyTree) -> tuple[_Waiting, PyTree]:
    """Has W wait for the others, and whoever reads them for what W reads of I."""
    may_wait = rank.gradients.block[each.layer.kind].stash_may_wait
    if rank.communicates:  # else W may run where an exchange needs it (experts: 1.5 % more cycles)
        may_wait = (True,) * len(may_wait)
    held, others = lax.optimization_barrier((select(each.stash, may_wait), others))
    return each._replace(stash=place(each.stash, held, may_wait)), others


def _run_weight_grad(rank: Rank, chunk: int, state: State, each: _Waiting, row: Row) -> State:
    """Runs a layer's W."""
    layer, name = each.layer, "weight_residual"
    kept = _read(rank, state, name, layer, row)
    kept = barriers.copied_or_read(each.copied, kept, small=rank.functions.size_of_x)
    late = rank.weight_grad_of(layer, kept, each.stash, row, chunk, "stash")
    state = _add(state, chunk, rank.gradients.late, layer, late)
    if rank.interleaves:
        grads, _ = state.take_grads(chunk, rank.gradients.late)
        sums = [total[layer.place] for total in grads[layer.kind]]
        state = _pass_on(state, name, layer, after=sums)
    return state


def _read(rank: Rank, state: State, name: str, layer: Layer, row: Row) -> tuple[jax.Array, ...]:
    """Reads what a slot holds for a layer."""
    parts = getattr(rank.gradients.block[layer.kind], f"{name}_parts")
    buffer = getattr(state, name)[layer.kind]
    return buffers.read_layer(buffer, layer.index, row[name], parts=parts)


def _pass_on(state: State, name: str, layer: Layer, *, after: PyTree) -> State:
    """Hands a layer's slots that were read on to who writes them next, `after` what was made."""
    buffer = getattr(state, name)[layer.kind]
    return _with_buffer(state, name, layer, buffers.pass_on(buffer, layer.index, after=after))


def _with_buffer(state: State, name: str, layer: Layer, buffer: Any) -> State:
    """Returns the state with another buffer for the layer's kind."""
    changed: dict[str, Any] = {name: {**getattr(state, name), layer.kind: buffer}}
    return state._replace(**changed)


def _add(
    state: State, chunk: int, places: dict[Kind, Places], layer: Layer, gradients: list[jax.Array]
) -> State:
    """Adds a layer's gradients to the accumulators at `places`."""
    grads, shared = state.take_grads(chunk, places)
    mine, shared = accumulators.add(
        grads[layer.kind], shared, gradients, places=places[layer.kind], layer=layer.place
    )
    return state.put_grads(chunk, places, ({**grads, layer.kind: mine}, shared))


def _flops(rank: Rank, each: _Waiting, row: Row, chunk: int) -> int:
    return rank.weight_grad_flops(each.layer, each.copied, each.stash, row, chunk)


def _can_hide(flops: int, arrivals: PyTree, device_kind: str | None, *, times: float) -> bool:
    """Whether contractions are known to take so many times as long as the arrivals.

    Args:
      flops: Of the contractions.
      arrivals: What arrives at the same time, from each side.
      device_kind: As `find_device` takes it.
      times: How many times.
    """
    device = find_device(device_kind)
    num_bytes = max(sum(leaf.nbytes for leaf in jax.tree.leaves(each)) for each in arrivals)
    return device is not None and flops / device.peak_flops >= times * num_bytes / device.link


def after_beat(row: Row, state: State, cotangent: list[jax.Array]) -> Row:
    """Has a row name the slots that F writes only when all reads of the beat before are done.

    Every read of a beat goes into a weight grad, or into the cotangent that leaves the stage.
    """
    made = state.block_grads, state.ends_grads, state.shared_grads, cotangent
    zero = barriers.zero_after(made)
    return {**row, **{name: row[name] + zero for name in RESIDUALS}}
