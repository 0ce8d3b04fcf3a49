"""Checks what a user hands over, at trace time, before anything runs.

Every message names the argument, its value, what was required and the fix, and lists all
offenders.
"""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from dualpipe_jax import _microbatches
from dualpipe_jax._types import Context, Model, PyTree


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Avals of what a model's functions return, and of the context that a block is given."""

    x: PyTree
    ctx: Context
    loss: Any
    metrics: PyTree
    aux: Any


def positive_int(name: str, value: Any) -> int:
    """Requires an integer of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: must be an integer, got {_kind(value)}") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name}={value!r}: must be an integer of at least 1")
    return number


def flag(name: str, value: Any) -> bool:
    """Requires True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False, got {_kind(value)}")
    return value


def is_model(model: Any) -> None:
    """Requires a Model."""
    if not isinstance(model, Model):
        raise TypeError(
            f"model: must be a dualpipe_jax.Model(embed=, block=, head=), got {_kind(model)}"
        )


def key(rng: Any) -> None:
    """Requires one random key, or None."""
    if rng is None:
        return
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    is_legacy = dtype == jnp.uint32 and shape is not None and len(shape) == 1
    if not is_key and not is_legacy:
        raise TypeError(f"rng: must be one key, as of jax.random.key(0), or None; got {_kind(rng)}")


def grad_dtype(dtype: Any, params: PyTree) -> None:
    """Requires that gradients of `params` fit into `dtype`, if it is not None."""
    if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        return
    _raise_all(
        f"grad_dtype={dtype}: must be complex for complex parameters, or None",
        (
            f"params{keystr(path)} is {_short(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating)
        ),
    )


def mesh_axis(mesh: Any, axis: Any, *, argument: str = "axis") -> int:
    """Requires `axis` to be an axis of the mesh, and returns its size."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh: must be a jax.sharding.Mesh, got {_kind(mesh)}")
    if not isinstance(axis, str):
        raise TypeError(f"{argument}={axis!r}: must be the name of a mesh axis, got {_kind(axis)}")
    if axis not in mesh.shape:
        known = ", ".join(f"{name!r} ({size} devices)" for name, size in mesh.shape.items())
        raise ValueError(
            f"{argument}={axis!r}: not an axis of the mesh, whose axes are {known}; name one "
            "of those, or make the mesh with it"
        )
    return mesh.shape[axis]


def num_layers(params: Any, *, num_stages: int = 1, where: str = "") -> int:
    """Requires `{"ends": ..., "blocks": ...}` with one leading dim, and returns that dim."""
    if not isinstance(params, Mapping) or set(params) != {"ends", "blocks"}:
        got = (
            f"a dict with the keys {sorted(map(str, params))}"
            if isinstance(params, Mapping)
            else (_kind(params))
        )
        raise ValueError(
            'params: must be {"ends": the parameters outside the layer stack, "blocks": those of '
            f"the layers, stacked}}, got {got}"
        )
    arrays(params, "params")
    leaves = jax.tree_util.tree_leaves_with_path(params["blocks"])
    if not leaves:
        raise ValueError('params["blocks"]: has no leaves; a pipeline needs layers to spread')
    sizes = [leaf.shape[0] if leaf.ndim else None for _, leaf in leaves]
    counted = [size for size in sizes if size is not None]
    # The size that most leaves have is taken for the number of layers.
    size = max(counted, key=counted.count) if counted else None
    _raise_all(
        'params["blocks"]: every leaf must have the layers as its leading dim, the same number '
        f"({size} in most leaves here); stack the parameters of all layers on a new leading dim",
        (
            f'params["blocks"]{keystr(path)} of shape {leaf.shape}'
            for (path, leaf), own in zip(leaves, sizes, strict=True)
            if own is None or own != size
        ),
    )
    assert size is not None
    if size < num_stages:
        raise ValueError(
            f'params["blocks"]: has {size} layers, fewer than the {num_stages} stages{where}; use '
            "a mesh with fewer devices along the axis, or a deeper model"
        )
    return size


def arrays(tree: PyTree, name: str) -> None:
    """Requires every leaf to be an array, or a Python or NumPy scalar."""
    _raise_all(
        f"{name}: every leaf must be an array",
        (
            f"{name}{keystr(path)} is {_kind(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if not _is_array(leaf)
        ),
        error=TypeError,
    )


def batch(batch: PyTree, *, num_microbatches: int, num_shards: int = 1, shards: str = "") -> None:
    """Requires one leading dim, divisible into microbatches (on every shard)."""
    arrays(batch, "batch")
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("batch: has no leaves; it must hold at least one array [B, ...]")
    _raise_all(
        "batch: every leaf needs a leading dim, the batch size",
        (f"batch{keystr(path)} is a scalar" for path, leaf in leaves if not leaf.ndim),
    )
    sizes = {leaf.shape[0] for _, leaf in leaves}
    _raise_all(
        "batch: all leaves must share their leading dim, the batch size",
        (f"batch{keystr(path)} of shape {leaf.shape}" for path, leaf in leaves)
        if len(sizes) > 1
        else (),
    )
    parts = num_microbatches * num_shards
    size = sizes.pop()
    if size % parts or not size:
        times = f" x {num_shards} shards over {shards}" if num_shards > 1 else ""
        down, up = size // parts * parts, (size // parts + 1) * parts
        nearest = f"{down} or {up}" if down else f"{up}"
        raise ValueError(
            f"batch: its leading dim, {size}, is not divisible by num_microbatches="
            f"{num_microbatches}{times}; pad or cut the batch to {nearest} rows, or change "
            "num_microbatches"
        )


def outputs(
    model: Model, ends: PyTree, layer: PyTree, microbatch: PyTree, rng: Any, shard: Any = None
) -> Outputs:
    """Requires the model's functions to fit each other, and returns avals of what they return.

    `layer` holds the parameters of one layer; all arguments may be avals.
    """

    def run(ends: PyTree, layer: PyTree, microbatch: PyTree, rng: Any) -> Any:
        key = _microbatches.microbatch_key(rng, jnp.int32(0))
        ends_ctx = _microbatches.context(microbatch, key, 0, shard=shard)
        layer_ctx = _microbatches.context(microbatch, key, 0, is_layer=True, shard=shard)
        x = _returned("model.embed", "x", model.embed(ends, ends_ctx))
        if not jax.tree.leaves(x):
            raise ValueError(f"model.embed: must return at least one array, got {x!r}")
        x = _microbatches.strong(x)
        aux = _block_aux(model, x, model.block(layer, x, layer_ctx))
        loss, metrics = _loss_and_metrics(model, model.head(ends, x, ends_ctx))
        if model.weight is not None:
            weight = model.weight(microbatch)
            fix = "sum it over the microbatch, or leave weight=None for the mean of head"
            _scalar(
                "model.weight", "a real scalar", weight, fix=fix, of=(jnp.floating, jnp.integer)
            )
        return Outputs(x=x, ctx=layer_ctx, loss=loss, metrics=metrics, aux=aux)

    return jax.eval_shape(run, ends, layer, microbatch, rng)


def same_x(x: PyTree, y: PyTree, *, hint: str = "") -> None:
    """Requires a block to return the structure, shapes and dtypes of the x that it was given."""
    before, after = jax.tree.structure(x), jax.tree.structure(y)
    fix = "a block must return x as it came, so that blocks can follow one another on any device"
    if before != after:
        raise ValueError(
            f"model.block: changes the structure of x from {before} to {after}; {fix}{hint}"
        )
    _raise_all(
        f"model.block: changes the shape or dtype of x; {fix} (cast or reshape inside the block)",
        (
            f"x{keystr(path)} comes as {_short(a)} and leaves as {_short(b)}"
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y), strict=True
            )
            if a.shape != b.shape or a.dtype != b.dtype
        ),
    )


def _block_aux(model: Model, x: PyTree, out: Any) -> Any:
    """Requires block's outputs to fit the model, and returns its aux loss, or None."""
    if model.block_has_aux and not (_is_pair(out) and jax.tree_util.all_leaves([out[1]])):
        raise TypeError(
            f"model.block: with block_has_aux=True it must return (x, aux_loss), got {_kind(out)}"
        )
    y, aux = _microbatches.block_outputs(model, _returned("model.block", "x", out))
    hint = (
        ""
        if model.block_has_aux or not _is_pair(out)
        else ("; to return an aux loss beside x, make the model with block_has_aux=True")
    )
    same_x(x, y, hint=hint)
    if aux is not None:
        _scalar("model.block", "an aux loss that is a floating-point scalar", aux)
    return aux


def _loss_and_metrics(model: Model, out: Any) -> tuple[jax.Array, PyTree]:
    """Requires head's outputs to fit the model."""
    if model.has_aux and not (_is_pair(out) and jax.tree_util.all_leaves([out[0]])):
        raise TypeError(
            f"model.head: with has_aux=True it must return (loss, metrics), got {_kind(out)}"
        )
    if not model.has_aux and not jax.tree_util.all_leaves([out]):
        raise TypeError(
            f"model.head: must return a scalar loss, got {_kind(out)}; to return metrics beside "
            "the loss, make the model with has_aux=True"
        )
    loss, metrics = out if model.has_aux else (out, None)
    metrics = _returned("model.head", "metrics", metrics)
    _scalar("model.head", "a loss that is a floating-point scalar", loss)
    return _microbatches.head_outputs(model, (loss, metrics) if model.has_aux else loss)


def _returned(name: str, what: str, value: Any) -> Any:
    """Requires arrays, or Python scalars, of what a function of the model returned."""
    value = _microbatches.as_arrays(value)
    _raise_all(
        f"{name}: must return arrays",
        (
            f"{what}{keystr(path)} is {_kind(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if not _is_array(leaf)
        ),
        error=TypeError,
    )
    return value


def _scalar(
    name: str,
    what: str,
    value: Any,
    *,
    fix: str = "reduce it over the microbatch (mean, or sum together with weight=)",
    of: tuple[Any, ...] = (jnp.floating,),
) -> None:
    value = _microbatches.as_arrays(value)
    if not _is_array(value):
        raise TypeError(f"{name}: must return {what}, got {_kind(value)}; {fix}")
    if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in of):
        raise ValueError(f"{name}: must return {what}, got {_short(value)}; {fix}")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _raise_all(message: str, offenders: Iterable[str], error: type[Exception] = ValueError) -> None:
    lines = [f"  * {line}" for line in offenders]
    if lines:
        raise error("\n".join([f"{message}; but:", *lines]))


def _short(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _kind(value: Any) -> str:
    if _is_array(value):
        return f"an array {_short(value)}"
    return f"{type(value).__name__} {value!r}"[:80]
