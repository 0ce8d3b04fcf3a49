"""Checks of the outputs of a model's functions: they fit each other, and the mesh.

In: a model, and avals of the arguments of its functions. Out: avals of their outputs.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from dualpipe_jax._errors import is_array, raise_all, short, show
from dualpipe_jax._model import semantics, varying
from dualpipe_jax._model.kinds import Kind, block_name, blocks_of
from dualpipe_jax._model.types import (
    Aux,
    Batch,
    Block,
    Context,
    Model,
    Output,
    PyTree,
    is_on_host,
)
from dualpipe_jax._model.users_call import call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Holds avals of the outputs of a model's functions, and of the context of a block.

    Attributes:
      x: The output of embed and of every block.
      ctx: The context of a block, without shared parameters.
      loss: The loss of head; None if `output` replaces head.
      metrics: The metrics of head, or None.
      aux: The Aux of each kind's block.
      aux_sum: A sum of aux losses of all kinds; None if no block has one.
      weight: The output of weight, or None.
      applied: The output of `output`, or None.
    """

    x: PyTree
    ctx: Context
    loss: Any = None
    metrics: PyTree = None
    aux: dict[Kind, Aux]
    aux_sum: Any = None
    weight: Any = None
    applied: PyTree = None


def check(
    model: Model,
    outside: PyTree,
    layers: dict[Kind, PyTree],
    microbatch: Batch,
    rng: Any,
    shard: Any = None,
    *,
    output: Output | None = None,
    hidden_axes: Iterable[str] = (),
) -> Outputs:
    """Requires the model's functions to fit each other, and returns avals of their outputs.

    All arrays may be avals.

    Args:
      model: The model.
      outside: `ends`, and `shared` if there is one.
      layers: The parameters of one layer of each kind.
      microbatch: A microbatch.
      rng: A key, or None.
      shard: The index of a shard of the batch; None with one shard.
      output: The function that replaces head, if any.
      hidden_axes: The mesh axes that no function may name.

    Raises:
      ValueError: If outputs do not fit, if a function names an axis that it may not name, or if one
        needs a key and there is none.
      TypeError: If a function does not take its arguments, or returns a wrong type.
    """

    def run(
        outside: PyTree, layers: dict[Kind, PyTree], microbatch: Batch, rng: Any, shard: Any
    ) -> Outputs:
        key = semantics.microbatch_key(rng, jnp.int32(0))
        ends_ctx = semantics.context(microbatch, key, 0, shard=shard, shared=outside.get("shared"))
        block_ctx = semantics.context(microbatch, key, 0, is_layer=True, shard=shard)
        return _run_functions(model, outside, layers, ends_ctx, block_ctx, output)

    arguments = outside, layers, microbatch, rng, shard
    try:
        jaxpr, outs = jax.make_jaxpr(run, return_shape=True)(*arguments)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        reason = str(error).split(". ")[0]  # the rest is a fix that does not apply here
        raise ValueError(
            f"model: its functions may name mesh axes only if manual_axes has them ({reason}); add "
            "the axis there too (dualpipe_jax.sequential knows none: give it a model without)"
        ) from error
    except (TypeError, AttributeError) as error:
        # Did a function take None for a key?
        is_rng_needed = rng is None and _runs(
            run, outside, layers, microbatch, jax.random.key(0), shard
        )
        if not is_rng_needed:
            raise
        raise ValueError(
            "rng=None: one of the model's functions uses ctx.rng, so that a key must be given; "
            f"call with rng=jax.random.key(0), say, and with another key in every step ({error})"
        ) from error
    used = varying.named_axes(jaxpr.jaxpr) & set(hidden_axes)
    if used:
        raise ValueError(
            f"model: its functions may name mesh axes only if manual_axes has them, but name "
            f"{sorted(used)}; add these there too (but not the pipeline axis, which is the "
            "library's own)"
        )
    return varying.with_mesh(outs)


def _runs(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be traced."""
    try:
        jax.eval_shape(function, *arguments)
    except (TypeError, AttributeError, ValueError):
        return False
    return True


def _run_functions(
    model: Model,
    outside: PyTree,
    layers: dict[Kind, PyTree],
    ends_ctx: Context,
    block_ctx: Context,
    output: Output | None,
) -> Outputs:
    """Runs each function of the model once, and checks its outputs."""
    ends, microbatch = outside["ends"], ends_ctx.microbatch
    x = _run_embed(model, ends, ends_ctx)
    layer_ctx = dataclasses.replace(block_ctx, shared=ends_ctx.shared)
    aux = {
        kind: _run_block(model, block_name(kind), block, layers[kind], x, layer_ctx)
        for kind, block in blocks_of(model).items()
    }
    if output is not None:
        applied = call("output", "(ends, x, ctx) -> outputs", output, ends, x, ends_ctx)
        applied = _applied(applied, microbatch)
        return Outputs(x=x, ctx=block_ctx, aux=dict.fromkeys(aux, Aux()), applied=applied)
    aux_sum = _sum_in_wider_dtype([kind.loss for kind in aux.values() if kind.loss is not None])
    out = call("model.head", "(ends, x, ctx) -> loss", model.head, ends, x, ends_ctx)
    loss, metrics = _loss_and_metrics(model, out)
    return Outputs(
        x=x,
        ctx=block_ctx,
        loss=loss,
        metrics=metrics,
        aux=aux,
        aux_sum=aux_sum,
        weight=_run_weight(model, microbatch),
    )


def _run_embed(model: Model, ends: PyTree, ctx: Context) -> PyTree:
    x = call("model.embed", "(ends, ctx) -> x", model.embed, ends, ctx)
    x = _require_arrays("model.embed", "x", x)
    if not jax.tree.leaves(x):
        raise ValueError(
            f"model.embed: must return at least one array, x, for the blocks; got {x!r}"
        )
    return semantics.strong(x)


def _run_weight(model: Model, microbatch: Batch) -> Any:
    if model.weight is None:
        return None
    weight = call("model.weight", "(microbatch) -> scalar", model.weight, microbatch)
    fix = "sum it over the microbatch, or leave weight=None for the mean of head"
    _require_scalar(
        "model.weight", "a real scalar", weight, fix=fix, dtypes=(jnp.floating, jnp.integer)
    )
    return weight


def _sum_in_wider_dtype(losses: list[jax.Array]) -> jax.Array | None:
    """Adds scalars of several dtypes, also under strict dtype promotion; None without scalars."""
    if not losses:
        return None
    dtype = functools.reduce(semantics.wider_dtype, (loss.dtype for loss in losses))
    return functools.reduce(operator.add, (loss.astype(dtype) for loss in losses))


def require_reduced(outs: Outputs, loss_axes: Iterable[str]) -> None:
    """Requires sums over microbatches not to vary over axes that do not shard the batch."""
    allowed = set(loss_axes)
    values = {"model.head: its loss": outs.loss, "model.head: metrics": outs.metrics}
    values["model.weight"] = outs.weight
    for kind, aux in outs.aux.items():
        values[f"{block_name(kind)}: its aux loss"] = aux.loss
        values[f"{block_name(kind)}: metrics"] = aux.metrics
    values["output"] = outs.applied
    raise_all(
        "manual_axes: loss, weight, metrics and outputs must be the same on all devices of an axis "
        "that is not one of batch_axes; reduce them (jax.lax.psum or pmean), or name the axis in "
        "batch_axes if the rows of the batch are sharded over it",
        (
            f"{name}{keystr(path)} varies over {', '.join(map(repr, sorted(axes)))}"
            for name, value in values.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if (axes := varying.varies_over(leaf) - allowed)
        ),
    )


def require_same_x(x: PyTree, y: PyTree, *, name: str, hint: str = "") -> None:
    """Requires a block to return an x with the structure, shapes and dtypes of the given one."""
    before, after = jax.tree.structure(x), jax.tree.structure(y)
    fix = "a block must return x as it was given, so that any block can follow another"
    if before != after:
        raise ValueError(
            f"{name}: changes the structure of x from {before} to {after}; {fix}{hint}"
        )
    raise_all(
        f"{name}: changes the shape or dtype of x; {fix} (cast or reshape inside the block)",
        (
            f"x{keystr(path)} is given as {short(a)} and returned as {short(b)}"
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y), strict=True
            )
            if a.shape != b.shape or a.dtype != b.dtype
        ),
    )


def _run_block(
    model: Model, name: str, block: Block, params: PyTree, x: PyTree, ctx: Context
) -> Aux:
    """Runs a block, requires its outputs to fit the model, and returns its Aux."""
    out = call(name, "(params, x, ctx) -> x", block, params, x, ctx)
    has_aux = semantics.has_aux(out)
    if has_aux:
        loss, metrics = out[1].loss, out[1].metrics
        if loss is not None:
            if not jax.tree_util.all_leaves([loss]):
                raise TypeError(
                    f"{name}: Aux.loss must be a floating-point scalar or None, got {show(loss)}"
                )
            _require_scalar(name, "an aux loss that is a floating-point scalar", loss)
        _require_summable(name, "Aux.metrics", _require_arrays(name, "Aux.metrics", metrics))
    elif model.block_has_aux and not (_is_pair(out) and jax.tree_util.all_leaves([out[1]])):
        raise TypeError(
            f"{name}: with block_has_aux=True it must return (x, aux_loss), or "
            f"(x, dualpipe_jax.Aux(...)), got {show(out)}"
        )
    y, aux = semantics.block_outputs(model, _require_arrays(name, "x", out))
    hint = (
        ""
        if model.block_has_aux or has_aux or not _is_pair(out)
        else "; to return an aux loss beside x, return (x, dualpipe_jax.Aux(loss=...)), or make "
        "the model with block_has_aux=True"
    )
    require_same_x(x, y, name=name, hint=hint)
    if aux.loss is not None:
        _require_scalar(name, "an aux loss that is a floating-point scalar", aux.loss)
    return aux


def _loss_and_metrics(model: Model, out: Any) -> tuple[jax.Array, PyTree]:
    """Requires the outputs of head to fit the model; returns loss and metrics."""
    if model.has_aux and not (_is_pair(out) and jax.tree_util.all_leaves([out[0]])):
        raise TypeError(
            f"model.head: with has_aux=True it must return (loss, metrics), got {show(out)}"
        )
    if not model.has_aux and not jax.tree_util.all_leaves([out]):
        raise TypeError(
            f"model.head: must return a scalar loss, got {show(out)}; to return metrics beside "
            "the loss, make the model with has_aux=True"
        )
    loss, metrics = out if model.has_aux else (out, None)
    metrics = _require_arrays("model.head", "metrics", metrics)
    _require_summable("model.head", "metrics", metrics)
    _require_scalar("model.head", "a loss that is a floating-point scalar", loss)
    return semantics.head_outputs(model, (loss, metrics) if model.has_aux else loss)


def _applied(value: Any, microbatch: Batch) -> PyTree:
    """Requires the outputs of `output` to have the microbatch's rows as their leading dim."""
    value = _require_arrays("output", "its result", value)
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise ValueError(f"output: must return at least one array [rows, ...]; got {value!r}")
    rows = jax.tree.leaves(microbatch)[0].shape[0]
    raise_all(
        f"output: every leaf must have the {rows} rows of the microbatch as its leading dim, to be "
        "joined in the order of the batch; move that dim to the front, or leave the leaf out (for "
        "output=None the leaves are those of x: give a function that returns the wanted ones)",
        (
            f"its result{keystr(path)} is {short(leaf)}"
            for path, leaf in leaves
            if leaf.shape[:1] != (rows,)
        ),
    )
    return semantics.strong(value)


def _require_arrays(name: str, part: str, value: Any) -> Any:
    """Requires a function to have returned arrays, or Python scalars; returns arrays."""
    value = semantics.as_arrays(semantics.pytree(name, value))
    raise_all(
        f"{name}: must return arrays",
        (
            f"{part}{keystr(path)} is {show(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if not is_array(leaf)
        ),
        error=TypeError,
    )
    _require_on_device(name, part, value)
    return value


def _require_on_device(name: str, part: str, value: PyTree) -> None:
    """Requires arrays on the device."""
    raise_all(
        f"{name}: must return values on the device; take jax.device_put to the host out of it",
        (
            f"{part}{keystr(path)} is {short(leaf)} in the host's memory"
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if is_on_host(leaf)
        ),
    )


def _require_summable(name: str, part: str, metrics: PyTree) -> None:
    """Requires metrics to be numbers or bools."""
    raise_all(
        f"{name}: its metrics are summed, so they must be numbers or bools; leave out the others",
        (
            f"{part}{keystr(path)} is {short(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(metrics)
            if not jnp.issubdtype(leaf.dtype, jnp.number) and leaf.dtype != jnp.bool_
        ),
        error=TypeError,
    )


def _require_scalar(
    name: str,
    requirement: str,
    value: Any,
    *,
    fix: str = "reduce it over the microbatch (mean, or sum together with weight=)",
    dtypes: tuple[Any, ...] = (jnp.floating,),
) -> None:
    value = semantics.as_arrays(value)
    if not is_array(value):
        raise TypeError(f"{name}: must return {requirement}, got {show(value)}; {fix}")
    if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in dtypes):
        raise ValueError(f"{name}: must return {requirement}, got {short(value)}; {fix}")
    _require_on_device(name, "it", value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2
