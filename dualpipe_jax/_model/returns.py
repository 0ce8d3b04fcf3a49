"""Checks what a model's functions return: that they fit each other, and the mesh.

In: a model, and avals of what its functions are given. Out: avals of what they return.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from dualpipe_jax._errors import call, is_array, raise_all, short, show
from dualpipe_jax._model import kinds, semantics, varying
from dualpipe_jax._model.kinds import Kind, block_name
from dualpipe_jax._model.types import Aux, Context, Model, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Avals of what a model's functions return, and of the context that a block is given.

    `aux` has an entry for each kind of layer, and `aux_sum` holds any of their losses; None
    without, as `weight`. Where there is an output in the place of head, that alone is checked
    beside x, and `applied` is what it returns.
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
    microbatch: PyTree,
    rng: Any,
    shard: Any = None,
    *,
    output: Callable[..., PyTree] | None = None,
    hidden_axes: Iterable[str] = (),
) -> Outputs:
    """Requires the model's functions to fit each other, and returns avals of what they return.

    `outside` holds `ends`, and `shared` if there is one, and `layers` the parameters of one layer
    of each kind; all arguments may be avals. The context in what is returned has no shared
    parameters. `output` takes the place of head, if it is given. No function may name one of the
    mesh axes `hidden_axes`.
    """

    def run(
        outside: PyTree, layers: dict[Kind, PyTree], microbatch: PyTree, rng: Any, shard: Any
    ) -> Any:
        ends, shared = outside["ends"], outside.get("shared")
        key = semantics.microbatch_key(rng, jnp.int32(0))
        ends_ctx = semantics.context(microbatch, key, 0, shard=shard, shared=shared)
        bare_ctx = semantics.context(microbatch, key, 0, is_layer=True, shard=shard)
        layer_ctx = dataclasses.replace(bare_ctx, shared=shared)
        x = call("model.embed", "(ends, ctx) -> x", model.embed, ends, ends_ctx)
        x = _returned("model.embed", "x", x)
        if not jax.tree.leaves(x):
            raise ValueError(
                f"model.embed: must return at least one array, x, for the blocks; got {x!r}"
            )
        x = semantics.strong(x)
        aux = {
            kind: _block_aux(
                model,
                x,
                call(block_name(kind), "(params, x, ctx) -> x", block, layers[kind], x, layer_ctx),
                name=block_name(kind),
            )
            for kind, block in kinds.blocks_of(model).items()
        }
        if output is not None:
            applied = call("output", "(ends, x, ctx) -> outputs", output, ends, x, ends_ctx)
            applied = _applied(applied, microbatch)
            return Outputs(x=x, ctx=bare_ctx, aux=dict.fromkeys(aux, Aux()), applied=applied)
        losses = [each.loss for each in aux.values() if each.loss is not None]
        aux_sum = _sum_in_wider_dtype(losses)
        out = call("model.head", "(ends, x, ctx) -> loss", model.head, ends, x, ends_ctx)
        loss, metrics = _loss_and_metrics(model, out)
        weight = None
        if model.weight is not None:
            weight = call("model.weight", "(microbatch) -> scalar", model.weight, microbatch)
            fix = "sum it over the microbatch, or leave weight=None for the mean of head"
            _scalar(
                "model.weight", "a real scalar", weight, fix=fix, of=(jnp.floating, jnp.integer)
            )
        return Outputs(
            x=x,
            ctx=bare_ctx,
            loss=loss,
            metrics=metrics,
            aux=aux,
            aux_sum=aux_sum,
            weight=weight,
        )

    trace = jax.make_jaxpr(run, return_shape=True)
    try:
        jaxpr, outs = trace(outside, layers, microbatch, rng, shard)
    except NameError as error:
        if "unbound axis name" not in str(error):
            raise
        what = str(error).split(". ")[0]  # what follows is a fix that is none here
        raise ValueError(
            f"model: one of its functions names an axis that it may not ({what}); mesh axes must "
            "be named in manual_axes (dualpipe_jax.sequential knows none: give it a model without)"
        ) from error
    except (TypeError, AttributeError) as error:
        # Is it that None was taken for a key?
        if rng is not None or not _runs(run, outside, layers, microbatch, jax.random.key(0), shard):
            raise
        raise ValueError(
            "rng=None: one of the model's functions uses ctx.rng, and so must be given a key; call "
            f"with rng=jax.random.key(0), say, and with another one in every step ({error})"
        ) from error
    used = varying.named_axes(jaxpr.jaxpr) & set(hidden_axes)
    if used:
        raise ValueError(
            f"model: its functions name the mesh axes {sorted(used)}, but may name manual_axes "
            "only; name them there too (the pipeline axis is the library's own)"
        )
    return varying.with_mesh(outs)


def _runs(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function can be traced."""
    try:
        jax.eval_shape(function, *arguments)
    except (TypeError, AttributeError, ValueError):
        return False
    return True


def _sum_in_wider_dtype(losses: list[jax.Array]) -> jax.Array | None:
    """Adds scalars of maybe unlike dtypes, which strict dtype promotion does not; None of none."""
    if not losses:
        return None
    dtype = functools.reduce(semantics.wider_dtype, (loss.dtype for loss in losses))
    return functools.reduce(operator.add, (loss.astype(dtype) for loss in losses))


def require_reduced(outs: Outputs, loss_axes: Iterable[str]) -> None:
    """Requires what is added up over microbatches to be alike where these do not differ."""
    allowed = set(loss_axes)
    values = {"model.head: its loss": outs.loss, "model.head: metrics": outs.metrics}
    values["model.weight"] = outs.weight
    for kind, aux in outs.aux.items():
        values[f"{block_name(kind)}: its aux loss"] = aux.loss
        values[f"{block_name(kind)}: metrics"] = aux.metrics
    values["output"] = outs.applied
    raise_all(
        "manual_axes: over an axis that is not one of batch_axes, all devices must come to one "
        "loss and weight and the same metrics and outputs; reduce them (jax.lax.psum or pmean), or "
        "name the axis in batch_axes if the rows of the batch are spread over it",
        (
            f"{name}{keystr(path)} varies over {', '.join(map(repr, sorted(axes)))}"
            for name, value in values.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if (axes := varying.varies_over(leaf) - allowed)
        ),
    )


def require_same_x(x: PyTree, y: PyTree, *, name: str, hint: str = "") -> None:
    """Requires a block to return the structure, shapes and dtypes of the x that it was given."""
    before, after = jax.tree.structure(x), jax.tree.structure(y)
    fix = "a block must return x as it came, so that blocks can follow one another on any device"
    if before != after:
        raise ValueError(
            f"{name}: changes the structure of x from {before} to {after}; {fix}{hint}"
        )
    raise_all(
        f"{name}: changes the shape or dtype of x; {fix} (cast or reshape inside the block)",
        (
            f"x{keystr(path)} comes as {short(a)} and leaves as {short(b)}"
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y), strict=True
            )
            if a.shape != b.shape or a.dtype != b.dtype
        ),
    )


def _block_aux(model: Model, x: PyTree, out: Any, *, name: str) -> Aux:
    """Requires block's outputs to fit the model, and returns its Aux."""
    gives_aux = semantics.gives_aux(out)
    if gives_aux:
        loss, metrics = out[1].loss, out[1].metrics
        if loss is not None:
            if not jax.tree_util.all_leaves([loss]):
                raise TypeError(
                    f"{name}: Aux.loss must be a floating-point scalar or None, got {show(loss)}"
                )
            _scalar(name, "an aux loss that is a floating-point scalar", loss)
        _summable(name, "Aux.metrics", _returned(name, "Aux.metrics", metrics))
    elif model.block_has_aux and not (_is_pair(out) and jax.tree_util.all_leaves([out[1]])):
        raise TypeError(
            f"{name}: with block_has_aux=True it must return (x, aux_loss), or "
            f"(x, dualpipe_jax.Aux(...)), got {show(out)}"
        )
    y, aux = semantics.block_outputs(model, _returned(name, "x", out))
    hint = (
        ""
        if model.block_has_aux or gives_aux or not _is_pair(out)
        else "; to return an aux loss beside x, return (x, dualpipe_jax.Aux(loss=...)), or make "
        "the model with block_has_aux=True"
    )
    require_same_x(x, y, name=name, hint=hint)
    if aux.loss is not None:
        _scalar(name, "an aux loss that is a floating-point scalar", aux.loss)
    return aux


def _loss_and_metrics(model: Model, out: Any) -> tuple[jax.Array, PyTree]:
    """Requires head's outputs to fit the model."""
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
    metrics = _returned("model.head", "metrics", metrics)
    _summable("model.head", "metrics", metrics)
    _scalar("model.head", "a loss that is a floating-point scalar", loss)
    return semantics.head_outputs(model, (loss, metrics) if model.has_aux else loss)


def _applied(value: Any, microbatch: PyTree) -> PyTree:
    """Requires arrays with the microbatch's rows in front of what output returned."""
    value = _returned("output", "its result", value)
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise ValueError(f"output: must return at least one array [rows, ...]; got {value!r}")
    rows = jax.tree.leaves(microbatch)[0].shape[0]
    raise_all(
        f"output: every leaf must have the {rows} rows of the microbatch as its leading dim, to be "
        "put together as the batch is; move that dim to the front, or leave the leaf out (for "
        "output=None the leaves are those of x: give a function that takes out what is wanted)",
        (
            f"its result{keystr(path)} is {short(leaf)}"
            for path, leaf in leaves
            if leaf.shape[:1] != (rows,)
        ),
    )
    return semantics.strong(value)


def _returned(name: str, what: str, value: Any) -> Any:
    """Requires arrays, or Python scalars, of what a function of the model returned."""
    value = semantics.as_arrays(value)
    raise_all(
        f"{name}: must return arrays",
        (
            f"{what}{keystr(path)} is {show(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if not is_array(leaf)
        ),
        error=TypeError,
    )
    return value


def _summable(name: str, what: str, metrics: Any) -> None:
    """Requires numbers or bools of metrics."""
    raise_all(
        f"{name}: its metrics are summed, so they must be numbers or bools; leave out what is not",
        (
            f"{what}{keystr(path)} is {short(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(metrics)
            if not jnp.issubdtype(leaf.dtype, jnp.number) and leaf.dtype != jnp.bool_
        ),
        error=TypeError,
    )


def _scalar(
    name: str,
    what: str,
    value: Any,
    *,
    fix: str = "reduce it over the microbatch (mean, or sum together with weight=)",
    of: tuple[Any, ...] = (jnp.floating,),
) -> None:
    value = semantics.as_arrays(value)
    if not is_array(value):
        raise TypeError(f"{name}: must return {what}, got {show(value)}; {fix}")
    if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in of):
        raise ValueError(f"{name}: must return {what}, got {short(value)}; {fix}")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


@jax.custom_jvp
def without_derivative(tree: PyTree) -> PyTree:
    """Returns arguments or results of a pipelined step as they are, and refuses `jax.grad`."""
    return tree


@without_derivative.defjvp
def _refuse_derivative(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "jax.grad of a pipelined step: dualpipe_jax.value_and_grad gives the gradient already, and "
        "dualpipe_jax.evaluate is the forward alone; for jax.grad take "
        "dualpipe_jax.sequential(model, num_microbatches=...)"
    )
