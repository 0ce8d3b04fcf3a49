"""The F, I and W of a beat with layers unrolled, and the order in which they touch the slots.

Data alone orders the work: XLA is free to run F of a layer beside I of another, and W beside both
and beside the next beat's F. What could order it falsely is a slot buffer, of which every layer has
its own: where XLA does not see whether a read or a write of a buffer comes first, it copies it, so
that the order has to be said, and then each waits for the other. Two ways:

Interleaved, for devices that overlap transfers and compute: F of layer j is beside I of layer
L-1-j, so that what one waits for in the other has its turn earlier anyway. A block's own
all-to-alls so have the other direction's compute to hide behind. A beat of four layers:

    F  0 1 2 3 -> x to the neighbour        layers 0, 1: F writes, then I reads
    I  3 2 1 0 -> cotangent to it           layers 3, 2: I reads, then F writes
    W          3 2 1 0                      x and cotangent travel meanwhile

One after the other, for CPUs: F of all layers, then I, then W, so that all reads of a beat come
after its writes, and only the next beat's writes have to wait.

How the order is said is `order.py`'s matter.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from dualpipe_jax._devices import find_device
from dualpipe_jax._executor import accumulators, order, registers
from dualpipe_jax._executor.layout import Layer
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.state import State

PyTree = Any
# Runs W: `(state, what is sent, what arrives) -> (state, what was sent, what has arrived)`. Whoever
# reads those waits for the transfers, so that W hides them, and not what the end ranks alone run.
WeightGrads = Callable[[State, PyTree, PyTree], tuple[State, PyTree, PyTree]]
_NAMES = "residual", "weight_residual"


def run_beat(
    rank: Rank,
    chunks: tuple[int, int],
    state: State,
    x: PyTree,
    cotangent: list[jax.Array],
    f_row: Row,
    i_row: Row,
) -> tuple[State, PyTree, list[jax.Array], WeightGrads]:
    """Runs F and I of a beat.

    Args:
      rank: The rank.
      chunks: The chunk that is forward, and the one that is backward.
      state: What the rank carries.
      x: What F reads.
      cotangent: What I reads.
      f_row: The row of F's tick.
      i_row: The row of I's tick.

    Returns:
      The state, what F made, what I made, and the function that runs W. What W needs of I is kept
      without a slot.
    """
    layout, gradients = rank.layout, rank.gradients
    forward, backward = chunks
    residual, weight_residual = dict(state.residual), dict(state.weight_residual)
    buffers = residual, weight_residual
    aux, dx, size_of_x = state.aux, cotangent, _size(x)
    metrics = dict(state.block_metrics[forward])
    taken, shared = state.take_grads(backward, gradients.early)
    grads = dict(taken)
    stashed: list[tuple[Layer, Any, Any]] = []

    def run_forward(layer: Layer) -> Any:
        nonlocal x, aux
        x, aux_of_layer, *kept = rank.forward_of(layer, x, f_row, forward)
        aux, metrics[layer.kind] = accumulators.add_aux(
            aux, metrics[layer.kind], aux_of_layer, layer=layer.place
        )
        return kept

    def keep(layer: Layer, kept: Any) -> None:
        for buffer, name, values in zip(buffers, _NAMES, kept, strict=True):
            buffer[layer.kind] = registers.write_layer(
                buffer[layer.kind], values, layer.index, f_row[name]
            )

    def run_input_grad(layer: Layer) -> None:
        nonlocal dx, shared
        kept, kept_longer = (
            order.copied_out(
                registers.read_layer(buffer[layer.kind], layer.index, i_row[name]), small=size_of_x
            )
            for buffer, name in zip(buffers, _NAMES, strict=True)
        )
        dx, values, _, early = rank.input_grad_of(layer, dx, kept, kept_longer, i_row, backward)
        stashed.append((layer, kept_longer, values))
        if rank.interleaves:
            for buffer in buffers:
                buffer[layer.kind] = registers.pass_on(
                    buffer[layer.kind], layer.index, after=(dx, values, early)
                )
        places = gradients.early[layer.kind]
        grads[layer.kind], shared = accumulators.add(
            grads[layer.kind], shared, early, places=places, layer=layer.place
        )

    f_layers, i_layers = layout.layers_of(f_row["stage"]), layout.layers_of(i_row["stage"])[::-1]
    if rank.interleaves:
        for f_layer, i_layer in zip(f_layers, i_layers, strict=True):
            run_input_grad(i_layer)
            kept = run_forward(f_layer)
            # Each hides the other's collectives only if neither runs ahead by layers; and what is
            # kept, if written earlier, would be what a GPU runs beside them in a matmul's place.
            x, dx, kept = order.wait_for((x, dx, kept), (x, dx))
            keep(f_layer, kept)
    else:
        for layer in f_layers:
            keep(layer, run_forward(layer))
        for layer in i_layers:
            run_input_grad(layer)
    state = state._replace(residual=residual, weight_residual=weight_residual)
    state = state.put_aux(forward, aux, metrics)
    state = state.put_grads(backward, gradients.early, (grads, shared))

    def weight_grads(state: State, sent: PyTree, arrivals: PyTree) -> tuple[State, PyTree, PyTree]:
        return _run_weight_grads(rank, backward, state, sent, arrivals, stashed, i_row)

    return state, x, dx, weight_grads


# On TPUs slots are read where the values are needed, by I and again by W, and not copied out first:
# with `dualpipe_jax.compiler_options` a contraction reads a slot as fast as an array. (TPU v5e,
# widths 1024 and 2048: copying what is no larger than x took 2 to 3 % more cycles. Without
# xla_msa_use_bundle_aware_cost_model it paid: W took up to 1.6 times as long without it.) On GPUs
# they are copied out: `order.copied_out`.
#
# What arrives from the neighbours is waited for before the last layer's W, if that of the others
# hides it: behind it, it comes from a TPU's memory while W computes, where the next beat's first
# matmuls would else wait for it (width 1024, two layers: 4 % fewer cycles; before the last
# contraction only: 1 %). If it does not, all of W waits for what is sent, and hides it; but where
# blocks have collectives of their own, which W may have to hide, only the last layer's does.
def _run_weight_grads(
    rank: Rank,
    chunk: int,
    state: State,
    sent: PyTree,
    arrivals: PyTree,
    stashed: list[tuple[Layer, Any, Any]],
    row: Row,
) -> tuple[State, PyTree, PyTree]:
    """Runs W of the layers in `stashed`, each with what I copied out and I's stash."""
    size_of_x = _size(sent[0])
    buffers = dict(state.weight_residual)
    taken, shared = state.take_grads(chunk, rank.gradients.late)
    grads = dict(taken)

    flops = sum(
        rank.weight_grad_flops(layer, kept, values, row, chunk)
        for layer, kept, values in stashed[:-1]
    )
    others_hide = not rank.communicates and _can_hide(flops, arrivals, rank.device_kind)
    for number, (layer, copied, values) in enumerate(stashed):
        kind = layer.kind
        kept = registers.read_layer(buffers[kind], layer.index, row["weight_residual"])
        kept = order.copied_or_read(copied, kept, small=size_of_x)
        is_last = number == len(stashed) - 1
        if others_hide and is_last:
            values, arrivals = lax.optimization_barrier((values, arrivals))
        elif not others_hide and (is_last or not rank.communicates):
            values, _ = lax.optimization_barrier((values, sent))
        late = rank.weight_grad_of(layer, kept, values, row, chunk, "stash")
        places = rank.gradients.late[kind]
        grads[kind], shared = accumulators.add(
            grads[kind], shared, late, places=places, layer=layer.place
        )
        if rank.interleaves:
            sums = [total[layer.place] for total in grads[kind]]
            buffers[kind] = registers.pass_on(buffers[kind], layer.index, after=sums)
    if not others_hide:
        sent, arrivals = lax.optimization_barrier((sent, arrivals))
    state = state._replace(weight_residual=buffers)
    return state.put_grads(chunk, rank.gradients.late, (grads, shared)), sent, arrivals


def _size(x: PyTree) -> int:
    return max((leaf.nbytes for leaf in jax.tree.leaves(x)), default=0)


def _can_hide(flops: int, arrivals: PyTree, device_kind: str | None) -> bool:
    """Whether contractions are known to take twice as long as the arrivals, one from each side."""
    device = find_device(device_kind)
    num_bytes = max(sum(leaf.nbytes for leaf in jax.tree.leaves(each)) for each in arrivals)
    return device is not None and flops / device.peak_flops >= 2 * num_bytes / device.link


def after_beat(row: Row, state: State, cotangent: list[jax.Array]) -> Row:
    """Has a row name the slots that F writes only when all reads of the beat before are done.

    Every read of a beat goes into a weight grad, or into the cotangent that leaves the stage.
    """
    made = state.block_grads, state.ends_grads, state.shared_grads, cotangent
    zero = order.zero_after(made)
    return {**row, **{name: row[name] + zero for name in _NAMES}}
