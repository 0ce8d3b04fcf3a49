"""Forwards alone, from both ends: `evaluate` gives the loss, `apply` what comes out, row by row."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from dualpipe_jax import _microbatches, _outputs, _validate
from dualpipe_jax._build import Axes, Builder, block_of
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.forward_only import forward_only
from dualpipe_jax._stage_sizes import stage_sizes
from dualpipe_jax._types import Context, Model, PyTree


def evaluate(
    model: Model,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    num_microbatches: int,
    axis: str = "pipe",
    layers_per_stage: Sequence[int] | None = None,
    batch_axes: str | tuple[str, ...] = (),
    manual_axes: str | tuple[str, ...] = (),
    param_specs: PyTree = None,
) -> Callable[..., Any]:
    """Makes the pipelined loss of a model, without gradients: forwards from both ends.

    Args:
      model: The model, as pure functions.
      mesh: The devices.
      num_microbatches: Microbatches of the batch (on each shard of it), over both directions.
      axis: The mesh axis over which the layers are spread.
      layers_per_stage: How many layers each rank has of a direction's, in model order; None spreads
        them evenly.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded.
      manual_axes: Mesh axes of which the model's functions use collectives by name.
      param_specs: How params lie over the manual axes, and outside of blocks over `axis`, as for
        `value_and_grad`.

    Returns:
      `(params, batch, *, rng=None) -> loss`, or `(loss, metrics)` with `model.has_aux`, or
      `(loss, Metrics)` if blocks give metrics; equal to `sequential(model, num_microbatches=...)`.
      It keeps no activations for a backward, so that `jax.grad` cannot go through it;
      `value_and_grad` is for that.

    Raises:
      ValueError: As `value_and_grad`.
      TypeError: As `value_and_grad`.
    """
    build = _builder(
        model, mesh, num_microbatches, axis, layers_per_stage, batch_axes, manual_axes, param_specs
    )

    def loss_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> Any:
        params, batch = _microbatches.as_arrays(params), _microbatches.as_arrays(batch)
        step = build(params, batch, rng)
        return step(_outputs.without_derivative(params), batch, rng)[0]

    return loss_fn


def apply(
    model: Model,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    num_microbatches: int,
    axis: str = "pipe",
    layers_per_stage: Sequence[int] | None = None,
    output: Callable[..., PyTree] | None = None,
    batch_axes: str | tuple[str, ...] = (),
    manual_axes: str | tuple[str, ...] = (),
    param_specs: PyTree = None,
) -> Callable[..., PyTree]:
    """Makes the pipelined forward of a model whose outputs are wanted: forwards from both ends.

    Of the model, head and weight are not used, and what blocks give beside x is left out.

    Args:
      model: The model, as pure functions.
      mesh: The devices.
      num_microbatches: Microbatches of the batch (on each shard of it), over both directions.
      axis: The mesh axis over which the layers are spread.
      layers_per_stage: How many layers each rank has of a direction's, in model order; None spreads
        them evenly.
      output: `(ends, x, ctx) -> outputs`, in the place of head, with head's context: any pytree of
        arrays whose leading dim is the microbatch's rows, such as logits. None for x itself, as it
        leaves the last block.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded.
      manual_axes: Mesh axes of which the model's functions use collectives by name. Over one that
        is not one of batch_axes, all devices must come to the same outputs.
      param_specs: How params lie over the manual axes, and outside of blocks over `axis`, as for
        `value_and_grad`.

    Returns:
      `(params, batch, *, rng=None) -> outputs`, each leaf `[B, ...]` in the order of the batch.
      The leading dim leaves sharded over batch_axes and, if num_microbatches divides by the size of
      `axis`, over `axis` too, so that no device ever holds more than its part of the outputs:
      what the last stage makes travels on, round the ring of ranks, to where it stays. Otherwise it
      is gathered over `axis` once, at the end. Nothing is kept for a backward, so that `jax.grad`
      cannot go through it.

    Raises:
      ValueError: As `value_and_grad`; from the function, when traced, if outputs do not have the
        microbatch's rows as their leading dim.
      TypeError: As `value_and_grad`.
    """
    if output is not None and not callable(output):
        raise TypeError(
            f"output={output!r}: must be a function (ends, x, ctx) -> outputs, or None for x"
        )
    build = _builder(
        model,
        mesh,
        num_microbatches,
        axis,
        layers_per_stage,
        batch_axes,
        manual_axes,
        param_specs,
        output=_hidden if output is None else output,
    )

    def apply_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> PyTree:
        params, batch = _microbatches.as_arrays(params), _microbatches.as_arrays(batch)
        return build(params, batch, rng)(params, batch, rng)[0]

    return apply_fn


def _builder(
    model: Any,
    mesh: Any,
    num_microbatches: Any,
    axis: Any,
    layers_per_stage: Any,
    batch_axes: Any,
    manual_axes: Any,
    param_specs: Any,
    **more: Any,
) -> Builder:
    """Checks what the user gave, and compiles the order of forwards from both ends."""
    _validate.is_model(model)
    axes = Axes.checked(mesh, axis, batch_axes, manual_axes)
    _validate.positive_int("num_microbatches", num_microbatches)
    num_ranks = mesh.shape[axis]
    program = forward_only(num_ranks=num_ranks, num_microbatches=num_microbatches)
    return Builder(
        axes=axes,
        tables_of=lambda **_: compile_program(program).tables,
        has_full_backward=lambda **_: False,
        model=model,
        block=block_of(model, "none"),
        param_specs=param_specs,
        # Of forwards alone each rank has one stage of a direction.
        layers_per_stage=stage_sizes(layers_per_stage, num_stages=num_ranks, where=", one a rank"),
        **more,
    )


def _hidden(ends: PyTree, x: PyTree, ctx: Context) -> PyTree:
    """Gives the hidden states, of what the last block made."""
    del ends, ctx
    return x
