"""The actions of a rank over all layers of a stage, each a loop or layers in a row.

`Rank` has them for one layer. Slot buffers and accumulators pass through the loops and are updated
in place; an action that is not on leaves all of them as they are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from dualpipe_jax import _scopes
from dualpipe_jax._executor import accumulators
from dualpipe_jax._executor import buffers as registers
from dualpipe_jax._executor.actions import Rank, Row
from dualpipe_jax._executor.buffers import when
from dualpipe_jax._executor.rows import RESIDUALS, in_rows
from dualpipe_jax._executor.stages import Layer
from dualpipe_jax._executor.start import empty_after
from dualpipe_jax._executor.state import State
from dualpipe_jax._schedule.ir import DEFERRED

PyTree = Any


def forward(
    rank: Rank, state: State, x: PyTree, row: Row, chunk: int, is_on: Any
) -> tuple[State, PyTree]:
    """Runs a stage forward, if `is_on`; else x comes back as it is."""

    def run(layer: Layer, carry: Any, buffers: Any) -> Any:
        x, aux_sum = carry
        residual, weight_residual, metrics = buffers
        if rank.functions.gradients is None:
            (params, _), ctx = rank.read_layer(row, chunk, layer)
            x, aux = rank.functions.block[layer.kind](params, x, ctx)
        else:
            x, aux, kept, kept_longer = rank.forward_of(layer, x, row, chunk)
            kept, kept_longer = _like_slots(
                rank, is_on, layer, residual=kept, weight_residual=kept_longer
            )
            residual = registers.write_layer(residual, kept, layer.index, row["residual"])
            weight_residual = registers.write_layer(
                weight_residual, kept_longer, layer.index, row["weight_residual"]
            )
        aux_sum, metrics = accumulators.add_aux(aux_sum, metrics, aux, layer=layer.place)
        return (x, aux_sum), (residual, weight_residual, metrics)

    buffers = state.residual, state.weight_residual, state.block_metrics[chunk]
    leave = _in_rows(rank, *RESIDUALS, "metrics")
    out = rank.layout.loop(row["stage"], is_on, run, (x, state.aux), buffers, leave=leave)
    (x, aux), (residual, weight_residual, metrics) = out
    state = state._replace(residual=residual, weight_residual=weight_residual)
    return state.put_aux(chunk, aux, metrics), x


# B: I and W of a layer, then of the one before it, and nothing in between waits in a slot
def backward(
    rank: Rank, state: State, dy: list[jax.Array], row: Row, chunk: int, is_on: Any
) -> tuple[State, list[jax.Array]]:
    """Runs a stage's full backward, if `is_on`; else dy comes back as it is.

    Given two `is_on`, they are of the last layers and of the first ones, in halves.
    """
    places = rank.gradients.both

    def run(layer: Layer, carry: Any, buffers: Any) -> Any:
        (dy, shared, turn), (residual, weight_residual, grads) = carry, buffers
        mine = rank.in_turn(row, turn)
        kept = registers.read_layer(residual, layer.index, mine["residual"])
        kept_longer = registers.read_layer(weight_residual, layer.index, mine["weight_residual"])
        kept, kept_longer = _like_slots(
            rank, is_on, layer, residual=kept, weight_residual=kept_longer
        )
        dx, values, _, early = rank.input_grad_of(layer, dy, kept, kept_longer, row, chunk)
        late = rank.weight_grad_of(layer, kept_longer, values, row, chunk, "stash")
        residual, weight_residual = (
            registers.pass_on(buffers, layer.index) for buffers in (residual, weight_residual)
        )
        for of, gradients in ((rank.gradients.early, early), (rank.gradients.late, late)):
            grads, shared = accumulators.add(
                grads,
                shared,
                gradients,
                places=of[layer.kind],
                layer=layer.place,
                taken=places[layer.kind],
            )
        turn = rank.next_turn(turn, layer, grads, dx)
        return (dx, shared, turn), (residual, weight_residual, grads)

    grads, shared = state.take_grads(chunk, places)
    buffers = state.residual, state.weight_residual, grads
    leave = _in_rows(rank, *RESIDUALS, "grads")
    with jax.named_scope(_scopes.FULL_BACKWARD):
        (dx, shared, _), (residual, weight_residual, grads) = rank.layout.loop(
            row["stage"],
            is_on,
            run,
            (dy, shared, rank.first_turn(row)),
            buffers,
            reverse=True,
            leave=leave,
        )
    state = state._replace(residual=residual, weight_residual=weight_residual)
    return state.put_grads(chunk, places, (grads, shared)), dx


def input_grad(
    rank: Rank,
    state: State,
    dy: list[jax.Array],
    row: Row,
    chunk: int,
    is_on: Any,
    target: str = "stash",
) -> tuple[State, list[jax.Array]]:
    """Runs a stage's input grad, if `is_on`; else dy comes back as it is.

    What W needs goes to `target`, to `stash` or to `deferred`; if to `stash`, what a deferred W
    needs goes to `deferred` besides.
    """

    def run(layer: Layer, carry: Any, buffers: Any) -> Any:
        dy, shared, turn = carry
        stash, deferred, residual, weight_residual, grads = buffers
        mine = rank.in_turn(row, turn)
        kept = registers.read_layer(residual, layer.index, mine["residual"])
        kept_longer = registers.read_layer(weight_residual, layer.index, mine["weight_residual"])
        kept, kept_longer = _like_slots(
            rank, is_on, layer, residual=kept, weight_residual=kept_longer
        )
        dx, values, put_off, early = rank.input_grad_of(layer, dy, kept, kept_longer, row, chunk)
        values, put_off = _like_slots(rank, is_on, layer, stash=values, deferred=put_off)

        def put(buffers: Any) -> Any:
            return registers.write_layer(buffers, put_off, layer.index, row[DEFERRED])

        if target == DEFERRED:
            deferred = put(deferred)
        else:
            stash = registers.write_layer(stash, values, layer.index, row["stash"])
            if "is_deferred" in row:  # not in a run of beats, nor without slots for it
                deferred = when(row["is_deferred"] > 0, put, deferred)
        residual, weight_residual = (
            registers.pass_on(buffers, layer.index) for buffers in (residual, weight_residual)
        )
        places = rank.gradients.early[layer.kind]
        grads, shared = accumulators.add(grads, shared, early, places=places, layer=layer.place)
        turn = rank.next_turn(turn, layer, grads, dx)
        return (dx, shared, turn), (stash, deferred, residual, weight_residual, grads)

    grads, shared = state.take_grads(chunk, rank.gradients.early)
    buffers = state.stash, state.deferred, state.residual, state.weight_residual, grads
    leave = _in_rows(rank, "stash", "deferred", *RESIDUALS, "grads")
    carry = dy, shared, rank.first_turn(row) if target == DEFERRED else None
    (dx, shared, _), buffers = rank.layout.loop(
        row["stage"], is_on, run, carry, buffers, reverse=True, leave=leave
    )
    stash, deferred, residual, weight_residual, grads = buffers
    state = state._replace(
        stash=stash, deferred=deferred, residual=residual, weight_residual=weight_residual
    )
    return state.put_grads(chunk, rank.gradients.early, (grads, shared)), dx


def weight_grad(
    rank: Rank, state: State, row: Row, chunk: int, is_on: Any, source: str = "stash"
) -> State:
    """Runs a stage's weight grad from a buffer, `stash` or `deferred`, if `is_on`."""

    def run(layer: Layer, carry: Any, buffers: Any) -> Any:
        (shared, turn), (grads, weight_residual, values) = carry, buffers
        mine = rank.in_turn(row, turn)
        kept_longer, stashed = _like_slots(
            rank,
            is_on,
            layer,
            weight_residual=registers.read_layer(
                weight_residual, layer.index, mine["weight_residual"]
            ),
            **{source: registers.read_layer(values, layer.index, mine[source])},
        )
        late = rank.weight_grad_of(layer, kept_longer, stashed, row, chunk, source)
        places = rank.gradients.late[layer.kind]
        grads, shared = accumulators.add(grads, shared, late, places=places, layer=layer.place)
        weight_residual, values = (
            registers.pass_on(buffers, layer.index) for buffers in (weight_residual, values)
        )
        turn = rank.next_turn(turn, layer, grads)
        return (shared, turn), (grads, weight_residual, values)

    grads, shared = state.take_grads(chunk, rank.gradients.late)
    buffers = grads, state.weight_residual, getattr(state, source)
    leave = _in_rows(rank, "grads", "weight_residual", source)

    layers = functools.partial(rank.layout.loop, row["stage"], body=run, reverse=True, leave=leave)

    # What recomputes holds the most of all, and no stash is in use beside it.
    def without_stash(loop: Any) -> Any:
        carry, buffers, stash = loop
        carry, buffers = layers(is_on=True, carry=carry, buffers=buffers)
        stash = empty_after(stash, after=(carry, buffers[0]), poison=rank.poison)
        return carry, leave(buffers), *_in_rows(rank, "stash")((stash,))

    carry = shared, rank.first_turn(row) if source == DEFERRED else None
    if source == DEFERRED and not rank.full_backward:
        started = carry, buffers, state.stash
        (shared, _), buffers, stash = when(is_on, without_stash, started)
        state = state._replace(stash=stash)
    else:
        (shared, _), buffers = layers(is_on=is_on, carry=carry, buffers=buffers)
    grads, weight_residual, values = buffers
    changed: dict[str, Any] = {"weight_residual": weight_residual, source: values}
    state = state._replace(**changed)
    return state.put_grads(chunk, rank.gradients.late, (grads, shared))


def _in_rows(rank: Rank, *names: str) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Has buffers that stand in this order lie as `rows.in_rows` says."""

    def run(buffers: tuple[Any, ...]) -> tuple[Any, ...]:
        placed = in_rows(rank.functions, dict(zip(names, buffers, strict=True)))
        return tuple(placed[name] for name in names)

    return run


def _like_slots(rank: Rank, is_on: Any, layer: Layer, **values: Any) -> tuple[Any, ...]:
    """Does as `like_slots`, but in beats, where `is_on` is True, of unrolled layers."""
    if is_on is True and rank.layout.is_unrolled:
        return tuple(values.values())
    return rank.like_slots(layer, **values)
