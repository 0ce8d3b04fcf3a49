"""The plain meaning of a model: microbatches one after the other, on one device, no pipeline.

What every schedule must reproduce, differentiable by `jax.grad`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._leaves.specs import find_overwritten
from dualpipe_jax._model import checks, returns, semantics
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Model, PyTree

# Layers run in a loop for each run of one kind; where kinds change more often, in one for all.
_MAX_RUNS = 8


def sequential(
    model: Model,
    *,
    num_microbatches: int,
    overwrite: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> Callable[..., Any]:
    """Makes the loss function that the pipeline computes, without the pipeline.

    Args:
      model: The model.
      num_microbatches: Into how many parts the leading dim of the batch is cut.
      overwrite: Which parameters their gradients overwrite, as for `value_and_grad`: `jax.grad` of
        the loss is for them the largest of what microbatches give, not the sum.

    Returns:
      `(params, batch, *, rng=None) -> loss`, or `(loss, metrics)` with `model.has_aux`, or
      `(loss, Metrics)` if blocks give metrics. The loss is a scalar of at least float32.
      `jax.grad` of it keeps all activations of the batch.

    Raises:
      ValueError: when called, if an argument does not fit the contract (see `value_and_grad`).
    """
    checks.is_model(model)
    checks.positive_int("num_microbatches", num_microbatches)

    def loss_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> Any:
        # Arrays may come from a pipeline, laid over Explicit axes, over which a scan cannot step.
        leaves = jax.tree.leaves((params, batch))
        types = [jax.typeof(leaf) for leaf in leaves if isinstance(leaf, jax.Array)]
        mesh = next((t.sharding.mesh for t in types if t.sharding.mesh.explicit_axes), None)
        run: Any = loss_of
        if mesh is not None:
            replicated = jax.NamedSharding(mesh, jax.P())
            run = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=replicated)
        return run(params, batch, rng)

    def loss_of(params: PyTree, batch: PyTree, rng: jax.Array | None) -> Any:
        params, batch = semantics.as_arrays(params), semantics.as_arrays(batch)
        num_layers = checks.num_layers(params, model.layout)
        checks.key(rng)
        checks.batch(batch, num_microbatches=num_microbatches)
        batches = semantics.split(batch, num_microbatches)
        params_of = _params_of(params, find_overwritten(params, overwrite), num_microbatches)
        stacks = _kinds.stacks_of(model, params["blocks"])
        layers, microbatch = jax.eval_shape(
            lambda *trees: semantics.take(trees, 0), stacks, batches
        )
        outside = {part: tree for part, tree in params.items() if part != "blocks"}
        outs = returns.check(model, outside, layers, microbatch, rng)
        shared = params.get("shared")
        total_weight = semantics.total_weight(model, batches)

        blocks, kinds = _kinds.blocks_of(model), _kinds.kinds_of(model, num_layers)

        def run_layer(
            kind: Kind,
            layer: PyTree,
            index: Any,
            place: Any,
            carry: Any,
            *,
            microbatch: PyTree,
            key: Any,
        ) -> Any:
            x, aux_sum, of_blocks = carry
            ctx = semantics.context(microbatch, key, index, is_layer=True, shared=shared)
            x, aux = semantics.block_outputs(model, blocks[kind](layer, x, ctx))
            if aux.loss is not None:
                aux_sum = semantics.add(aux_sum, aux.loss)
            metrics = lax.stop_gradient(aux.metrics)
            of_kind = semantics.add_at(of_blocks[kind], metrics, place)
            return semantics.strong(x), aux_sum, {**of_blocks, kind: of_kind}

        def step(sums: tuple, index: jax.Array) -> tuple[tuple, None]:
            loss_sum, aux_sum, metrics_sum, of_blocks = sums
            microbatch = semantics.take(batches, index)
            key = semantics.microbatch_key(rng, index)
            mine = params_of(index)
            ends, stacks = mine["ends"], _kinds.stacks_of(model, mine["blocks"])
            ctx = semantics.context(microbatch, key, num_layers, shared=shared)
            x = model.embed(ends, ctx)
            run = functools.partial(run_layer, microbatch=microbatch, key=key)
            carry = semantics.strong(x), aux_sum, of_blocks
            x, aux_sum, of_blocks = _fold(run, kinds, stacks, carry)
            ctx = semantics.context(microbatch, key, num_layers + 1, shared=shared)
            out = model.head(ends, x, ctx)
            loss, metrics = semantics.head_outputs(model, out)
            sums = semantics.add((loss_sum, metrics_sum), (loss, metrics))
            return (sums[0], aux_sum, sums[1], of_blocks), None

        of_layers = {
            kind: jax.tree.map(
                lambda a: jax.ShapeDtypeStruct((kinds.count(kind), *a.shape), a.dtype),  # noqa: B023
                aux.metrics,
            )
            for kind, aux in outs.aux.items()
        }
        zeros = semantics.zeros_for_sum((outs.loss, outs.aux_sum, outs.metrics, of_layers))
        (loss, aux, metrics, of_blocks), _ = lax.scan(
            step, zeros, jnp.arange(num_microbatches, dtype=jnp.int32)
        )
        loss = semantics.loss_of_sums(loss, aux, total_weight, num_microbatches)
        of_blocks = _kinds.by_layout(model, of_blocks)
        return semantics.result(model, loss, metrics, of_blocks)

    return loss_fn


def _params_of(
    params: PyTree, overwritten: PyTree, num_microbatches: int
) -> Callable[[jax.Array], PyTree]:
    """Makes the function that gives each microbatch its parameters.

    They are the same for all, but leaves that are overwritten are copies of each microbatch's own,
    so that what it gives them is not added to what others give.
    """
    copies = jax.tree.map(
        lambda leaf, flag: _copies(leaf, num_microbatches) if flag else (), params, overwritten
    )

    def params_of(index: jax.Array) -> PyTree:
        return jax.tree.map(
            lambda leaf, flag, each: semantics.take(each, index) if flag else leaf,
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


def _fold(
    run: Callable[..., Any], kinds: tuple[Kind, ...], stacks: dict[Kind, PyTree], carry: Any
) -> Any:
    """Runs `run(kind, parameters, index, place in the kind, carry) -> carry` for all, in order."""
    places, runs = _kinds.places_of(kinds), _kinds.runs_of(kinds)
    if len(runs) > _MAX_RUNS:
        return _fold_by_switch(run, kinds, stacks, carry)

    def fold_run(kind: Kind, first: int, count: int, carry: Any) -> Any:
        start = places[first]
        layers = jax.tree.map(lambda leaf: leaf[start : start + count], stacks[kind])
        indices, of_kind = (
            jnp.arange(begin, begin + count, dtype=jnp.int32) for begin in (first, start)
        )
        return lax.scan(
            lambda carry, layer: (run(kind, *layer, carry), None), carry, (layers, indices, of_kind)
        )[0]

    first = 0
    for kind, count in runs:
        carry = fold_run(kind, first, count, carry)
        first += count
    return carry


def _fold_by_switch(
    run: Callable[..., Any], kinds: tuple[Kind, ...], stacks: dict[Kind, PyTree], carry: Any
) -> Any:
    """As `_fold`, but each kind stands in the program once, however often kinds change."""

    def step(carry: Any, row: jax.Array) -> tuple[Any, None]:
        number, place, index = row

        def branch(kind: Kind) -> Callable[[Any], Any]:
            def run_kind(carry: Any) -> Any:
                layer = semantics.take(stacks[kind], place)
                return run(kind, layer, index, place, carry)

            return run_kind

        return lax.switch(number, [branch(kind) for kind in stacks], carry), None

    numbers = {kind: number for number, kind in enumerate(stacks)}
    order = [numbers[kind] for kind in kinds]
    rows = np.stack([order, _kinds.places_of(kinds), range(len(kinds))], axis=1)
    return lax.scan(step, carry, jnp.asarray(rows, jnp.int32))[0]
