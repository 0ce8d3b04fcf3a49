"""The plain meaning of a model: microbatches one after the other, on one device, no pipeline.

What every schedule must reproduce, differentiable by `jax.grad`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax import _microbatches, _validate
from dualpipe_jax._types import Model, PyTree


def sequential(model: Model, *, num_microbatches: int) -> Callable[..., Any]:
    """Makes the loss function that the pipeline computes, without the pipeline.

    Args:
      model: The model.
      num_microbatches: Into how many parts the leading dim of the batch is cut.

    Returns:
      `(params, batch, *, rng=None) -> loss`, or `(loss, metrics)` with `model.has_aux`. The loss
      is a scalar of at least float32. `jax.grad` of it keeps all activations of the batch.

    Raises:
      ValueError: when called, if an argument does not fit the contract (see `value_and_grad`).
    """
    _validate.is_model(model)
    _validate.positive_int("num_microbatches", num_microbatches)

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
        params, batch = _microbatches.as_arrays(params), _microbatches.as_arrays(batch)
        num_layers = _validate.num_layers(params)
        _validate.key(rng)
        _validate.batch(batch, num_microbatches=num_microbatches)
        batches = _microbatches.split(batch, num_microbatches)
        layer, microbatch = jax.eval_shape(
            lambda *trees: _microbatches.take(trees, 0), params["blocks"], batches
        )
        outside = {part: tree for part, tree in params.items() if part != "blocks"}
        outs = _validate.outputs(model, outside, layer, microbatch, rng)
        shared = params.get("shared")
        total_weight = _microbatches.total_weight(model, batches)

        def run_layer(carry: tuple, layer: tuple, *, microbatch: PyTree, key: Any) -> Any:
            x, aux_sum = carry
            block_params, index = layer
            ctx = _microbatches.context(microbatch, key, index, is_layer=True, shared=shared)
            outputs = model.block(block_params, x, ctx)
            x, aux = _microbatches.block_outputs(model, outputs)
            if aux is not None:
                aux_sum = _microbatches.add(aux_sum, aux)
            return (_microbatches.strong(x), aux_sum), None

        def step(sums: tuple, index: jax.Array) -> tuple[tuple, None]:
            loss_sum, aux_sum, metrics_sum = sums
            microbatch = _microbatches.take(batches, index)
            key = _microbatches.microbatch_key(rng, index)
            ends = params["ends"]
            ctx = _microbatches.context(microbatch, key, num_layers, shared=shared)
            x = model.embed(ends, ctx)
            layers = params["blocks"], jnp.arange(num_layers, dtype=jnp.int32)
            (x, aux_sum), _ = lax.scan(
                lambda carry, layer: run_layer(carry, layer, microbatch=microbatch, key=key),
                (_microbatches.strong(x), aux_sum),
                layers,
            )
            ctx = _microbatches.context(microbatch, key, num_layers + 1, shared=shared)
            out = model.head(ends, x, ctx)
            loss, metrics = _microbatches.head_outputs(model, out)
            sums = _microbatches.add((loss_sum, metrics_sum), (loss, metrics))
            return (sums[0], aux_sum, sums[1]), None

        zeros = _microbatches.zeros_for_sum((outs.loss, outs.aux, outs.metrics))
        (loss, aux, metrics), _ = lax.scan(
            step, zeros, jnp.arange(num_microbatches, dtype=jnp.int32)
        )
        return _microbatches.result(model, loss, aux, metrics, total_weight, num_microbatches)

    return loss_fn
