"""The program of one device: parameters in, the ticks run, sums and gradients out.

The tables run in one `lax.scan` over their ticks, and the straight-line run of beats, where they
have one, in a scan of its own that begins when its tick has come; program size does not depend on
their lengths.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._executor import collect
from dualpipe_jax._executor.actions import Rank, Row
from dualpipe_jax._executor.beats import make_run
from dualpipe_jax._executor.buffers import when
from dualpipe_jax._executor.delivery import Delivery
from dualpipe_jax._executor.functions import Functions
from dualpipe_jax._executor.seeds import make_seeds
from dualpipe_jax._executor.settings import Settings
from dualpipe_jax._executor.start import empty_state
from dualpipe_jax._executor.state import State
from dualpipe_jax._executor.ticks import make_tick, rows_of
from dualpipe_jax._leaves.explicit_axes import device_kind_of
from dualpipe_jax._leaves.plan import Plan
from dualpipe_jax._model import semantics, varying
from dualpipe_jax._model.types import PyTree


def run(
    settings: Settings,
    traced: Functions,
    plan: Plan,
    params: PyTree,
    batch: PyTree,
    rng: Any,
    loss_scale: Any,
) -> tuple[Any, Any]:
    """The program of one device."""
    batches = semantics.split(batch, settings.tables.num_microbatches)
    params = plan.gather(params)
    rank, state, weight = start(settings, traced, plan, params, batches, rng, loss_scale)
    rows, steady = rows_of(settings.tables, settings.columns, settings.axis), settings.tables.steady
    tick = make_tick(rank, settings.tables)
    if settings.delivery is not None:
        none = dict.fromkeys(settings.layout.stacks)
        return _deliver(settings, settings.delivery, tick, state, rows), (none, None)
    if steady is None:
        state, _ = lax.scan(lambda state, row: (tick(state, row), None), state, rows)
        return _finish(settings, rank, plan, params, state, weight)

    # One scan over the ticks before and after the run, so that they stand in the program once.
    assert steady.first_tick > 0, "what the run's first backward reads is made before it"
    run = make_run(rank, steady, rows)
    ramp = np.delete(np.arange(settings.tables.num_ticks), steady.ticks)

    def tick_or_run(state: State, row: Any) -> tuple[State, None]:
        is_before_run, row = row
        return when(is_before_run, run, tick(state, row)), None

    ramp_rows = {name: column[ramp] for name, column in rows.items()}
    is_before_run = jnp.asarray(ramp == steady.first_tick - 1)
    state, _ = lax.scan(tick_or_run, state, (is_before_run, ramp_rows))
    return _finish(settings, rank, plan, params, state, weight)


def _deliver(
    settings: Settings, delivery: Delivery, tick: Callable[..., State], state: State, rows: Row
) -> PyTree:
    """Runs all ticks, outputs moving on after each."""
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
    plan: Plan,
    params: PyTree,
    batches: PyTree,
    rng: Any,
    loss_scale: Any,
) -> tuple[Rank, State, Any]:
    """Brings the parameters to their ranks, and makes empty buffers."""
    model, tables, layout = settings.model, settings.tables, settings.layout
    chunks = [
        {kind: (stack, traced.casts(kind, stack)) for kind, stack in chunk.items()}
        for chunk in layout.fetch(params["blocks"])
    ]
    # Unrolled layers have arrays of their own: none is cut out of a stack again in every tick,
    # and none waits for another.
    is_apart = layout.is_unrolled
    if is_apart:
        chunks = [layout.unstack(chunk) for chunk in chunks]
    weight = None if settings.output else semantics.total_weight(model, batches)
    if weight is not None:
        weight = varying.sum_over(weight, settings.batch_axes)
    count = tables.num_microbatches * settings.num_shards
    loss_seed, aux_seed = make_seeds(traced.outputs, count=count, weight=weight, scale=loss_scale)
    rank = Rank(
        functions=traced,
        layout=layout,
        chunks=chunks,
        shared_casts={
            kind: traced.casts(kind, params.get("shared"), after=stack)
            for kind, stack in params["blocks"].items()
        },
        outside={part: tree for part, tree in params.items() if part != "blocks"},
        microbatches=batches,
        rng=rng,
        shard=lax.axis_index(settings.batch_axes) if settings.num_shards > 1 else None,
        loss_seed=loss_seed,
        aux_seed=aux_seed,
        delivery=settings.delivery,
        full_backward=settings.full_backward,
        defers=settings.defers,
        takes_turns=settings.takes_turns,
        interleaves=settings.platform != "cpu",
        communicates=bool(settings.manual_axes),
        device_kind=device_kind_of(settings.mesh),
        poison=settings.poison,
    )
    state = empty_state(
        traced,
        layout,
        params,
        slots=settings.slots,
        wanted=plan.wanted,
        delivery=settings.delivery,
        is_lazy=tables.is_lazy,
        poison=settings.poison,
    )
    return rank, state, weight


def _finish(
    settings: Settings, rank: Rank, plan: Plan, params: PyTree, state: State, weight: Any
) -> tuple[Any, Any]:
    """Sums over ranks and shards, and brings what belongs to layers back to their places."""
    sums = state.loss, state.aux, state.metrics
    loss, aux, metrics = varying.sum_over(sums, (settings.axis, *settings.batch_axes))
    count = settings.tables.num_microbatches * settings.num_shards
    loss = semantics.loss_of_sums(loss, aux, weight, count)
    grads = None
    if not settings.tables.forward_only:
        grads = collect.gradients(rank, plan, params, state)
    return (loss, metrics), (collect.block_metrics(rank, plan, state), grads)
