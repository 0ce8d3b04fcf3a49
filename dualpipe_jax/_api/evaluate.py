"""Forwards alone, from both ends: `evaluate` gives the loss, `apply` what comes out, row by row."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from dualpipe_jax._api.build import Builder, block_of, checked
from dualpipe_jax._api.programs import Forward
from dualpipe_jax._model import returns, semantics
from dualpipe_jax._model.types import AxisNames, Context, Mesh, Model, PyTree
from dualpipe_jax._schedule.stage_sizes import stage_sizes


def evaluate(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str = "pipe",
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: Sequence[int] | None = None,
) -> Callable[..., Any]:
    """Makes the pipelined loss of a model, without gradients: forwards from both ends.

    Arguments are those of `value_and_grad` with the same names; a rank has one stage of each
    direction, in layers_per_stage as well.

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
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
        param_specs=param_specs,
        layers_per_stage=layers_per_stage,
    )

    def loss_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> Any:
        params, batch = semantics.as_arrays(params), semantics.as_arrays(batch)
        step = build(params, batch, rng)
        return step(returns.without_derivative(params), batch, rng)[0]

    return loss_fn


def apply(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str = "pipe",
    output: Callable[..., PyTree] | None = None,
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    layers_per_stage: Sequence[int] | None = None,
) -> Callable[..., PyTree]:
    """Makes the pipelined forward of a model whose outputs are wanted: forwards from both ends.

    Head and weight of the model are not used, and all that blocks give beside x is left out. In the
    place of head is `output`, `(ends, x, ctx) -> outputs`, with head's context: any pytree of
    arrays whose leading dim is the microbatch's rows, such as logits. None is for x itself, as it
    leaves the last block. All other arguments are those of `evaluate`. Over one of manual_axes that
    is not one of batch_axes, all devices must come to the same outputs.

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
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
        param_specs=param_specs,
        layers_per_stage=layers_per_stage,
        output=_hidden if output is None else output,
    )

    def apply_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> PyTree:
        params, batch = semantics.as_arrays(params), semantics.as_arrays(batch)
        step = build(params, batch, rng)
        return step(returns.without_derivative(params), batch, rng)[0]

    return apply_fn


def _builder(
    model: Model,
    *,
    num_microbatches: int,
    param_specs: PyTree,
    layers_per_stage: Sequence[int] | None,
    output: Callable[..., PyTree] | None = None,
    **where: Any,
) -> Builder:
    axes = checked(model, num_microbatches=num_microbatches, **where)
    num_ranks = axes.mesh.shape[axes.axis]
    return Builder(
        model,
        axes=axes,
        program=Forward(num_ranks=num_ranks, num_microbatches=num_microbatches),
        block=block_of(model, "none"),
        param_specs=param_specs,
        layers_per_stage=stage_sizes(layers_per_stage, num_stages=num_ranks, where=", one a rank"),
        output=output,
    )


def _hidden(ends: PyTree, x: PyTree, ctx: Context) -> PyTree:
    """Gives the hidden states, of what the last block made."""
    del ends, ctx
    return x
