"""The program of one device: parameters in, the ticks run, sums and gradients out.

One `lax.scan` runs the ticks of the tables. If they have a steady phase, beats that are the same
straight-line code on all ranks, a scan of its own runs it, at its place among the ticks. Program
size does not depend on their lengths.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax import _scopes
from dualpipe_jax._executor import buffers
from dualpipe_jax._executor.beats import Beat, after_beat
from dualpipe_jax._executor.buffers import lay_out, when
from dualpipe_jax._executor.deliver import Delivery
from dualpipe_jax._executor.rank import Rank, Row, Settings
from dualpipe_jax._executor.state import State, empty_after, empty_state, one_stash
from dualpipe_jax._executor.ticks import make_tick, rows_of, spare_slots, store_arrivals
from dualpipe_jax._executor.trace import Functions
from dualpipe_jax._leaves.gradient import accumulated, combine, gradients_of
from dualpipe_jax._leaves.leaf import Leaf
from dualpipe_jax._leaves.pick import pick, put_leaves
from dualpipe_jax._leaves.rules import SUM
from dualpipe_jax._model import semantics, varying
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT
from dualpipe_jax._schedule.tables import Steady


def run(
    settings: Settings,
    traced: Functions,
    params: PyTree,
    batch: PyTree,
    rng: Any,
    loss_scale: Any,
) -> tuple[Any, Any]:
    """Runs the step on one device.

    Args:
      settings: The settings of the step.
      traced: The model's functions as this device runs them.
      params: This device's part of the parameters, blocks as stacks by kind.
      batch: Its shard of the batch.
      rng: The step's key, or None.
      loss_scale: The factor of all cotangents, a scalar, or None.

    Returns:
      `(loss, metrics)`, or outputs; and the blocks' metrics by kind and the gradients, or None.
    """
    batches = semantics.split(batch, settings.tables.num_microbatches)
    params = jax.tree.map(Leaf.gather, traced.leaves, params)
    rank, state, weight = start(settings, traced, params, batches, rng, loss_scale)
    rows, steady = rows_of(settings.tables, settings.columns, settings.axis), settings.tables.steady
    tick = make_tick(rank, settings.tables)
    if settings.delivery is not None:
        none = dict.fromkeys(settings.stages.stacks)
        return _deliver(settings.delivery, tick, state, rows), (none, None)
    if steady is None:
        state, _ = lax.scan(lambda state, row: (tick(state, row), None), state, rows)
        return _finish(rank, params, state, weight)

    # One scan over the ticks before and after the beats, so that the program has a tick once.
    assert steady.first_tick > 0, "the values that the first backward reads are made before it"
    run_steady = make_steady(rank, steady, rows)
    ramp = np.delete(np.arange(settings.tables.num_ticks), steady.ticks)

    def tick_or_steady(state: State, row: Any) -> tuple[State, None]:
        is_before, row = row
        return when(is_before, run_steady, tick(state, row)), None

    ramp_rows = {name: column[ramp] for name, column in rows.items()}
    is_before = jnp.asarray(ramp == steady.first_tick - 1)
    state, _ = lax.scan(tick_or_steady, state, (is_before, ramp_rows))
    return _finish(rank, params, state, weight)


def make_steady(rank: Rank, steady: Steady, rows: Row) -> Callable[[State], State]:
    """Makes the function that runs all beats, a period in a trip of one `lax.scan`.

    Args:
      rank: The rank.
      steady: The beats.
      rows: This rank's rows of the tables, int32[num_ticks] for each column.
    """
    ticks_per_trip, poison = steady.period * TICKS_PER_BEAT, rank.settings.poison
    # (A beat's transfers are those of `Steady`.)
    in_steady = {n: column[steady.ticks] for n, column in rows.items() if n != "exchange"}
    trips = {name: column.reshape(-1, ticks_per_trip) for name, column in in_steady.items()}

    def tick_of(rows: Row, tick: int) -> Row:
        return {name: column[tick] for name, column in rows.items()}

    def one_period(carry: tuple[State, list, list], rows: Row) -> tuple[Any, None]:
        state, xs, cotangents = carry
        for number in range(steady.period):
            with jax.named_scope(_scopes.of_beat(number)), jax.named_scope(_scopes.STEADY):
                f_row, i_row = (tick_of(rows, TICKS_PER_BEAT * number + i) for i in range(2))
                if number > 0 and not rank.settings.runs_side_by_side:
                    f_row = after_beat(f_row, state, cotangents)
                beat = Beat(rank, steady, number, f_row, i_row)
                state, xs, cotangents = beat.run(state, xs, cotangents)
        return (state, xs, cotangents), None

    def entry_slots(state: State, wait: np.ndarray, rows: list[Row]) -> list[jax.Array]:
        """Finds the slots of the values that the first beats read, and that came before."""
        # A rank that embeds needs no x, and reads the last slot, the spare.
        slots = [spare_slots(state, rows[0], "read")["read"]]
        for beat, row in enumerate(rows[1:], start=1):  # for ranks on which values wait
            is_here = jnp.asarray(wait >= beat)[lax.axis_index(rank.stages.axis)]
            read = jnp.where(is_here, row["read"], -1)
            slots.append(spare_slots(state, {"read": read}, "read")["read"])
        return slots

    def run(state: State) -> State:
        waits = steady.x_wait, steady.cotangent_wait
        first = [
            [tick_of(in_steady, TICKS_PER_BEAT * beat + tick) for beat in range(1 + wait.max())]
            for tick, wait in enumerate(waits)
        ]
        state = store_arrivals(state, first[0][0], state.messages)
        slots = [entry_slots(state, wait, rows) for wait, rows in zip(waits, first, strict=True)]
        xs, cotangents = (
            [buffers.read(state.received, slot) for slot in of_kind] for of_kind in slots
        )
        if poison:
            for slot in itertools.chain(*slots):
                state = state._replace(received=buffers.poison(state.received, slot))
        # An idle buffer takes no memory in the beats: it ends here, and is made again after them.
        idle = {name: state.slots[name] for name in rank.stages.idle_in(steady)}
        in_beats: dict[str, Any] = {
            name: {kind: buffer.with_arrays() for kind, buffer in by_kind.items()}
            for name, by_kind in idle.items()
        }
        if rank.stashes_in_beats:
            # In the beats alone: in ticks W of a layer runs right after its I.
            idle["stash"] = state.slots["stash"]
            stash = one_stash(rank.gradients, rank.stages, state.slots["stash"])
            in_beats["stash"] = empty_after(stash, after=(xs, cotangents), poison=poison)
        state = state.with_slots(in_beats)
        carry = _laid_out(state), xs, [pick(cotangent) for cotangent in cotangents]
        (state, xs, cotangents), _ = lax.scan(one_period, carry, trips)
        state = _laid_out(state)
        state = state.with_slots(empty_after(idle, after=(xs, cotangents), poison=poison))
        return _leave(rank, steady, state, xs, cotangents)

    return run


def _laid_out(state: State) -> State:
    """Gives a state's slots the layouts that they have in ticks."""
    return state._replace(slots=lay_out(state.slots))


def _leave(
    rank: Rank, steady: Steady, state: State, xs: list[PyTree], cotangents: list[list]
) -> State:
    """Stores the values that are read after the last beat where the tables have them."""
    last = jax.tree.leaves(state.received)[0].shape[0] - 1
    me = lax.axis_index(rank.stages.axis)
    received = state.received
    of_cotangents = [put_leaves(xs[0], cotangent) for cotangent in cotangents]
    for values, slots in ((xs, steady.x_slot), (of_cotangents, steady.cotangent_slot)):
        for value, of_ranks in zip(values, slots, strict=True):
            slot = jnp.asarray(np.where(of_ranks < 0, last, of_ranks), jnp.int32)[me]
            received = buffers.write(received, value, slot)
    nothing = buffers.allocate(xs[0], poison=rank.settings.poison)
    return state._replace(received=received, messages=(nothing, nothing))


def _deliver(delivery: Delivery, tick: Callable[..., State], state: State, rows: Row) -> PyTree:
    """Runs all ticks; after each of them outputs move by a rank."""
    now, later = delivery.rows()

    def tick_and_move(state: State, row: tuple[Row, jax.Array]) -> tuple[State, None]:
        state = tick(state, row[0])
        assert state.mail is not None
        return state._replace(mail=delivery.move(state.mail, row[1])), None

    state, _ = lax.scan(tick_and_move, state, (rows, now))
    assert state.mail is not None
    return delivery.finish(state.mail, later)


def start(
    settings: Settings,
    traced: Functions,
    params: PyTree,
    batches: PyTree,
    rng: Any,
    loss_scale: Any,
) -> tuple[Rank, State, Any]:
    """Brings the parameters to their ranks, and makes empty buffers."""
    model, tables, stages = settings.model, settings.tables, settings.stages
    chunks = [
        {kind: (stack, traced.casts(kind, stack)) for kind, stack in chunk.items()}
        for chunk in stages.fetch(params["blocks"])
    ]
    # Unrolled layers have arrays of their own: none is cut out of a stack again in every tick,
    # and none waits for another.
    if stages.is_unrolled:
        chunks = [stages.unstack(number, chunk) for number, chunk in enumerate(chunks)]
    weight = None if settings.output else semantics.total_weight(model, batches)
    if weight is not None:
        weight = varying.sum_over(weight, settings.batch_axes)
    count = tables.num_microbatches * settings.num_shards
    outs, total = traced.outputs, jnp.asarray(count)

    def cotangent(loss: Any, total: jax.Array) -> jax.Array | None:
        return None if loss is None else semantics.loss_cotangent(loss, total, loss_scale)

    rank = Rank(
        settings=settings,
        functions=traced,
        chunks=chunks,
        shared_casts={
            kind: traced.casts(kind, params.get("shared"), after=stack)
            for kind, stack in params["blocks"].items()
        },
        outside={part: tree for part, tree in params.items() if part != "blocks"},
        microbatches=batches,
        rng=rng,
        shard=lax.axis_index(settings.batch_axes) if settings.num_shards > 1 else None,
        loss_cotangent=cotangent(outs.loss, total if weight is None else weight),
        aux_cotangent={kind: cotangent(aux.loss, total) for kind, aux in outs.aux.items()},
    )
    state = empty_state(
        traced,
        stages,
        params,
        slots=settings.slots,
        on_host=settings.on_host(traced),
        has_beats=tables.steady is not None,
        delivery=settings.delivery,
        is_lazy=tables.is_lazy,
        poison=settings.poison,
    )
    return rank, state, weight


def _finish(rank: Rank, params: PyTree, state: State, weight: Any) -> tuple[Any, Any]:
    """Sums over ranks and shards, and brings the sums of layers back into their stacks."""
    settings = rank.settings
    sums = state.loss, state.aux, state.metrics
    loss, aux, metrics = varying.sum_over(sums, (settings.axis, *settings.batch_axes))
    count = settings.tables.num_microbatches * settings.num_shards
    loss = semantics.loss_of_sums(loss, aux, weight, count)
    grads = None
    if not settings.tables.forward_only:
        grads = _collect_gradients(rank, params, state)
    return (loss, metrics), (_collect_metrics(rank, settings.batch_axes, state), grads)


def _collect_gradients(rank: Rank, params: dict[str, PyTree], state: State) -> dict[str, PyTree]:
    """Sums gradients over ranks and shards, and returns those of layers to the layers' ranks.

    Returns:
      A tree like `params` with a device's part of each gradient; None for a leaf that gets none.
    """
    leaves, stages = rank.gradients.leaves, rank.stages
    outside = {part: tree for part, tree in leaves.items() if part != "blocks"}
    totals = combine(accumulated(outside), [*state.ends_grads, *state.shared_grads])
    num_ends = len(state.ends_grads)
    of_part = {"ends": totals[:num_ends], "shared": totals[num_ends:]}
    grads = {part: gradients_of(outside[part], params[part], of_part[part]) for part in outside}

    of_kind = {kind: accumulated(stack) for kind, stack in leaves["blocks"].items()}
    rules = {kind: [gradient.leaf.rule for gradient in of] for kind, of in of_kind.items()}
    blocks = {}
    for kind, sums in stages.collect(state.block_grads, rules).items():
        blocks[kind] = gradients_of(
            leaves["blocks"][kind],
            params["blocks"][kind],
            combine(of_kind[kind], sums),
            num_layers=stages.stacks[kind].shard_layers,
        )
    return {**grads, "blocks": blocks}


def _collect_metrics(rank: Rank, batch_axes: tuple[str, ...], state: State) -> dict[Kind, PyTree]:
    """Sums the blocks' metrics over shards, and stacks each kind's where its layers are."""
    metrics = {kind: aux.metrics for kind, aux in rank.functions.outputs.aux.items()}
    rules = {kind: [SUM] * len(jax.tree.leaves(tree)) for kind, tree in metrics.items()}
    stacks = {}
    for kind, leaves in rank.stages.collect(state.block_metrics, rules).items():
        summed = varying.sum_over(leaves, batch_axes)
        stacks[kind] = jax.tree.unflatten(jax.tree.structure(metrics[kind]), summed)
    return stacks
