"""The plain meaning of a model: microbatches one after the other, on one device, no pipeline.

Every schedule must reproduce it; `jax.grad` can differentiate it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._api.users_tree import Options, as_canonical, convert_options
from dualpipe_jax._leaves.specs import find_overwritten
from dualpipe_jax._model import call_checks, checks, returns, semantics
from dualpipe_jax._model.kinds import (
    Kind,
    blocks_of,
    indices_in_stack,
    kinds_of,
    runs_of,
    stacks_of,
    unwrap_stacks,
)
from dualpipe_jax._model.types import Batch, Model, Params, ParamsMask, PyTree

# Layers run in a loop for each run of one kind; with more runs, in one loop for all.
_MAX_RUNS = 8


def sequential(
    model: Model, *, num_microbatches: int, overwrite: ParamsMask | None = None
) -> Callable[..., Any]:
    """Makes the loss function that the pipeline computes, without the pipeline.

    Args:
      model: The model.
      num_microbatches: The number of equal parts into which the leading dim of the batch is split.
      overwrite: Which parameters are overwritten by their gradients, as for `value_and_grad`:
        `jax.grad` of the loss gives these the largest new value over all microbatches, not the sum.

    Returns:
      `(params, batch, *, rng=None) -> loss`, or `(loss, metrics)` with `model.has_aux`, or
      `(loss, Metrics)` if blocks return metrics. The loss is a scalar of at least float32.
      `jax.grad` of it keeps all activations of the batch.

    Raises:
      ValueError: If an argument has a bad value; from the function, as from that of
        `value_and_grad`.
      TypeError: If an argument has a wrong type.
    """
    checks.is_model(model)
    checks.positive_int("num_microbatches", num_microbatches)

    options = convert_options(model, Options(overwrite=overwrite))

    def loss_of(params: Params, batch: Batch, rng: jax.Array | None) -> Any:
        return _loss_of(
            model,
            params,
            batch,
            rng,
            num_microbatches=num_microbatches,
            overwrite=options.overwrite,
        )

    def loss_fn(params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Any:
        call_checks.have_values(params=params, batch=batch)
        params, form = as_canonical(model, params)
        # Arrays of a pipeline may be sharded over Explicit axes, over which a scan cannot step.
        params, batch = call_checks.values(params, batch)
        leaves = jax.tree.leaves((params, batch))
        types = [jax.typeof(leaf) for leaf in leaves if isinstance(leaf, jax.Array)]
        mesh = next((t.sharding.mesh for t in types if t.sharding.mesh.explicit_axes), None)
        run: Any = loss_of
        if mesh is not None:
            replicated = jax.NamedSharding(mesh, jax.P())
            run = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=replicated)
        return form.result(run(params, batch, rng))

    return loss_fn


class _Sums(NamedTuple):
    """Holds sums over microbatches."""

    loss: jax.Array
    aux: jax.Array | None
    metrics: PyTree
    blocks: dict[Kind, PyTree]  # metrics of blocks, stacked by layer


def _loss_of(
    model: Model,
    params: Params,
    batch: Batch,
    rng: jax.Array | None,
    *,
    num_microbatches: int,
    overwrite: ParamsMask | None,
) -> Any:
    kinds = kinds_of(model, call_checks.num_layers(params, model.layout))
    call_checks.key(rng)
    call_checks.batch(batch, num_microbatches=num_microbatches)
    batches = semantics.split(batch, num_microbatches)
    params_of = _params_of(params, find_overwritten(params, overwrite), num_microbatches)
    zeros = _zeros_for(model, kinds, params, batches, rng)
    total_weight = semantics.total_weight(model, batches)

    def step(sums: _Sums, index: jax.Array) -> tuple[_Sums, None]:
        microbatch, key = semantics.take(batches, index), semantics.microbatch_key(rng, index)
        return _add_microbatch(model, kinds, params_of(index), microbatch, key, sums), None

    sums, _ = lax.scan(step, zeros, jnp.arange(num_microbatches, dtype=jnp.int32))
    loss = semantics.loss_of_sums(sums.loss, sums.aux, total_weight, num_microbatches)
    return semantics.result(model, loss, sums.metrics, unwrap_stacks(model, sums.blocks))


def _zeros_for(
    model: Model,
    kinds: tuple[Kind, ...],
    params: Params,
    batches: Batch,
    rng: jax.Array | None,
) -> _Sums:
    """Checks the model's functions, and makes zeros for the sums of their outputs."""
    stacks = stacks_of(model, params["blocks"])
    layers, microbatch = jax.eval_shape(lambda *trees: semantics.take(trees, 0), stacks, batches)
    outside = {part: tree for part, tree in params.items() if part != "blocks"}
    outs = returns.check(model, outside, layers, microbatch, rng)
    of_blocks = {}
    for kind, aux in outs.aux.items():
        count = kinds.count(kind)
        of_blocks[kind] = jax.tree.map(
            lambda a, count=count: jax.ShapeDtypeStruct((count, *a.shape), a.dtype), aux.metrics
        )
    return _Sums(*semantics.zeros_for_sum((outs.loss, outs.aux_sum, outs.metrics, of_blocks)))


def _add_microbatch(
    model: Model,
    kinds: tuple[Kind, ...],
    params: Params,
    microbatch: Batch,
    key: jax.Array | None,
    sums: _Sums,
) -> _Sums:
    """Runs embed, all layers and head, and adds their outputs to the sums."""
    ends, shared, num_layers = params["ends"], params.get("shared"), len(kinds)
    blocks = blocks_of(model)

    def run_layer(kind: Kind, layer: PyTree, index: Any, index_in_stack: Any, carry: Any) -> Any:
        x, aux_sum, of_blocks = carry
        ctx = semantics.context(microbatch, key, index, is_layer=True, shared=shared)
        x, aux = semantics.block_outputs(model, blocks[kind](layer, x, ctx))
        if aux.loss is not None:
            aux_sum = semantics.add(aux_sum, aux.loss)
        metrics = lax.stop_gradient(aux.metrics)
        of_kind = semantics.add_at(of_blocks[kind], metrics, index_in_stack)
        return semantics.strong(x), aux_sum, {**of_blocks, kind: of_kind}

    x = model.embed(ends, semantics.context(microbatch, key, num_layers, shared=shared))
    carry = semantics.strong(x), sums.aux, sums.blocks
    stacks = stacks_of(model, params["blocks"])
    x, aux_sum, of_blocks = _run_layers(run_layer, kinds, stacks, carry)
    out = model.head(ends, x, semantics.context(microbatch, key, num_layers + 1, shared=shared))
    loss, metrics = semantics.head_outputs(model, out)
    loss_sum, metrics_sum = semantics.add((sums.loss, sums.metrics), (loss, metrics))
    return _Sums(loss_sum, aux_sum, metrics_sum, of_blocks)


def _params_of(
    params: Params, overwritten: PyTree, num_microbatches: int
) -> Callable[[jax.Array], Params]:
    """Makes the function that gives each microbatch its parameters.

    Overwritten leaves are copied for each microbatch, so that their gradients are not added up; all
    other leaves are the same for all microbatches.
    """
    copies = jax.tree.map(
        lambda leaf, flag: _copies(leaf, num_microbatches) if flag else (), params, overwritten
    )

    def params_of(index: jax.Array) -> Params:
        return jax.tree.map(
            lambda leaf, flag, copy: semantics.take(copy, index) if flag else leaf,
            params,
            overwritten,
            copies,
        )

    return params_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copies(leaf: jax.Array, count: int) -> jax.Array:
    """Makes `count` copies, `[count, ...]`, whose cotangents become the largest of them."""
    return jnp.broadcast_to(leaf, (count, *leaf.shape))


_copies.defvjp(
    lambda leaf, count: (_copies(leaf, count), None), lambda count, _, copies: (copies.max(axis=0),)
)


def _run_layers(
    run: Callable[..., Any], kinds: tuple[Kind, ...], stacks: dict[Kind, PyTree], carry: Any
) -> Any:
    """Calls `run(kind, layer_params, index, index_in_stack, carry) -> carry` for each layer."""
    indices, runs = indices_in_stack(kinds), runs_of(kinds)
    if len(runs) > _MAX_RUNS:
        return _run_layers_by_switch(run, kinds, stacks, carry)

    def scan_run(kind: Kind, first: int, count: int, carry: Any) -> Any:
        start = indices[first]
        layers = jax.tree.map(lambda leaf: leaf[start : start + count], stacks[kind])
        in_model, in_stack = (
            jnp.arange(begin, begin + count, dtype=jnp.int32) for begin in (first, start)
        )
        return lax.scan(
            lambda carry, layer: (run(kind, *layer, carry), None),
            carry,
            (layers, in_model, in_stack),
        )[0]

    first = 0
    for kind, count in runs:
        carry = scan_run(kind, first, count, carry)
        first += count
    return carry


def _run_layers_by_switch(
    run: Callable[..., Any], kinds: tuple[Kind, ...], stacks: dict[Kind, PyTree], carry: Any
) -> Any:
    """As `_run_layers`, but the program has each kind's block once, however often kinds change."""

    def step(carry: Any, row: jax.Array) -> tuple[Any, None]:
        number, index_in_stack, index = row

        def branch(kind: Kind) -> Callable[[Any], Any]:
            def run_kind(carry: Any) -> Any:
                layer = semantics.take(stacks[kind], index_in_stack)
                return run(kind, layer, index, index_in_stack, carry)

            return run_kind

        return lax.switch(number, [branch(kind) for kind in stacks], carry), None

    numbers = {kind: number for number, kind in enumerate(stacks)}
    order = [numbers[kind] for kind in kinds]
    rows = np.stack([order, indices_in_stack(kinds), range(len(kinds))], axis=1)
    return lax.scan(step, carry, jnp.asarray(rows, jnp.int32))[0]
