"""Forwards alone, from both ends: `evaluate` gives the loss, `apply` the outputs of every row."""

from collections.abc import Callable
from typing import Any

import jax

from dualpipe_jax._api.build import Builder, block_of, check_axes, without_derivative
from dualpipe_jax._api.programs import ForwardOnly
from dualpipe_jax._api.users_tree import Form, Options, as_canonical, convert_options
from dualpipe_jax._errors import brief
from dualpipe_jax._model import call_checks
from dualpipe_jax._model.types import (
    AxisNames,
    Batch,
    Context,
    Mesh,
    Model,
    Output,
    Params,
    PyTree,
)
from dualpipe_jax._schedule.stage_sizes import LayersPerStage, stage_sizes


def evaluate(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str = "pipe",
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: LayersPerStage = None,
) -> Callable[..., Any]:
    """Makes the pipelined loss of a model, without gradients: forwards from both ends.

    Arguments are as for `value_and_grad`, by the same names. A rank has one stage of each
    direction, so that layers_per_stage has a number for each rank.

    Returns:
      `(params, batch, *, rng=None) -> loss`, a scalar of at least float32, or `(loss, metrics)`
      with `model.has_aux`, or `(loss, Metrics)` if blocks return metrics; equal to
      `sequential(model, num_microbatches=...)`. It keeps no activations for a backward, so that
      `jax.grad` cannot differentiate it; `value_and_grad` gives gradients.

    Raises:
      ValueError: As `value_and_grad`.
      TypeError: As `value_and_grad`.
    """
    build = _builder(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
        param_specs=param_specs,
        layers_per_stage=layers_per_stage,
    )

    def loss_fn(params: Params, batch: Batch, *, rng: jax.Array | None = None) -> Any:
        params, form = _canonical(model, params, batch)
        return form.result(_run(build, params, batch, rng))

    return loss_fn


def apply(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str = "pipe",
    output: Output | None = None,
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: LayersPerStage = None,
) -> Callable[..., PyTree]:
    """Makes the pipelined forward that returns a model's outputs, such as logits.

    Head and weight of the model are not used, and the Aux of blocks is left out. `output`,
    `(ends, x, ctx) -> outputs`, takes the place of head, with the same context: outputs are any
    pytree of arrays whose leading dim is the microbatch's rows. None returns x, the output of the
    last block. All other arguments are as for `evaluate`. On all devices of one of manual_axes that
    is not one of batch_axes, the outputs must be the same.

    Returns:
      `(params, batch, *, rng=None) -> outputs`, each leaf `[B, ...]` in the order of the batch.
      The leading dim is sharded over batch_axes and, if the size of `axis` divides
      num_microbatches, over `axis` too, so that no device ever holds more than its shard of the
      outputs: outputs of the last stage are sent round the ring of ranks, each to its rank.
      Otherwise the outputs are gathered over `axis` once, at the end. Nothing is kept for a
      backward, so that `jax.grad` cannot differentiate it.

    Raises:
      ValueError: As `value_and_grad`; from the function, when traced, if outputs do not have the
        microbatch's rows as their leading dim.
      TypeError: As `value_and_grad`.
    """
    if output is not None and not callable(output):
        raise TypeError(
            f"output={brief(output)}: must be a function (ends, x, ctx) -> outputs, or None for x"
        )
    build = _builder(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
        param_specs=param_specs,
        layers_per_stage=layers_per_stage,
        output=_last_x if output is None else output,
    )

    def apply_fn(params: Params, batch: Batch, *, rng: jax.Array | None = None) -> PyTree:
        params, _ = _canonical(model, params, batch)
        return _run(build, params, batch, rng)

    return apply_fn


def _builder(
    model: Model,
    *,
    num_microbatches: int,
    param_specs: PyTree,
    layers_per_stage: LayersPerStage,
    output: Output | None = None,
    **axes_options: Any,
) -> Builder:
    axes = check_axes(model, num_microbatches=num_microbatches, **axes_options)
    num_ranks = axes.mesh.shape[axes.axis]
    options = convert_options(model, Options(param_specs), manual_axes=axes.manual_axes)
    return Builder(
        model,
        axes=axes,
        program=ForwardOnly(num_ranks=num_ranks, num_microbatches=num_microbatches),
        block=block_of(model, "none"),
        param_specs=options.param_specs,
        layers_per_stage=stage_sizes(layers_per_stage, num_stages=num_ranks, where=", one a rank"),
        output=output,
    )


def _canonical(model: Model, params: PyTree, batch: Batch) -> tuple[Params, Form]:
    call_checks.have_values(params=params, batch=batch)
    return as_canonical(model, params)


def _run(build: Builder, params: Params, batch: Batch, rng: jax.Array | None) -> Any:
    params, batch = call_checks.values(params, batch)
    step = build(params, batch, rng)
    return without_derivative(step(without_derivative(params), batch, rng)[0])


def _last_x(ends: PyTree, x: PyTree, ctx: Context) -> PyTree:
    """Returns the output of the last block."""
    del ends, ctx
    return x
