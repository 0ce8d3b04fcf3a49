"""Checks what a user hands over, at trace time, before anything runs.

Every message names the argument, its value, what was required and the fix, and lists all
offenders.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from dualpipe_jax import _kinds, _microbatches, _varying
from dualpipe_jax._kinds import Kind
from dualpipe_jax._types import Context, Model, PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs:
    """Avals of what a model's functions return, and of the context that a block is given.

    `aux` has an entry for each kind of layer, and `aux_sum` holds any of them; None without, as
    `weight`.
    """

    x: PyTree
    ctx: Context
    loss: Any
    metrics: PyTree
    aux: dict[Kind, Any]
    aux_sum: Any
    weight: Any


def positive_int(name: str, value: Any) -> int:
    """Requires an integer of at least 1."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: must be an integer, got {show(value)}") from None
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name}={value!r}: must be an integer of at least 1")
    return number


def flag(name: str, value: Any) -> bool:
    """Requires True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False, got {show(value)}")
    return value


def is_model(model: Any) -> None:
    """Requires a Model."""
    if not isinstance(model, Model):
        raise TypeError(
            f"model: must be a dualpipe_jax.Model(embed=, block=, head=), got {show(model)}"
        )
    if model.layout is not None or isinstance(model.block, Mapping):
        _kinds_fit(model.block, model.layout)
    blocks = {block_name(kind): block for kind, block in _kinds.blocks_of(model).items()}
    functions = {"model.embed": model.embed, **blocks, "model.head": model.head}
    if model.weight is not None:
        functions["model.weight"] = model.weight
    raise_all(
        "model: embed, block, head and weight (if it is not None) must be functions",
        (f"{name} is {show(value)}" for name, value in functions.items() if not callable(value)),
        error=TypeError,
    )


def _kinds_fit(block: Any, layout: Any) -> None:
    """Requires a block for every kind in the layout, and a kind for every block."""
    what = "the names of the kinds of all layers, in model order, as keys of the dict block"
    if not isinstance(block, Mapping):
        raise ValueError(
            f"model.layout={layout!r}: must be {what}, but block is {show(block)}; make it a dict "
            "with a block for each kind, or leave layout out"
        )
    if layout is None:
        raise ValueError(
            f"model.layout=None: must be {what}, which has {_names(block)}; give it, or make block "
            "one function for all layers"
        )
    if not isinstance(layout, tuple) or not all(isinstance(kind, str) for kind in layout):
        raise TypeError(f"model.layout={layout!r}: must be a sequence of strings, {what}")
    if not layout:
        raise ValueError("model.layout=(): must name at least one layer")
    layers = {kind: [i for i, k in enumerate(layout) if k == kind] for kind in layout}
    raise_all(
        "model.layout: must name the keys of the dict block, each at least once; add what is "
        "missing, or leave out what is too much",
        [
            *(
                f"layout names {kind!r} (layers {_ellipsis(found)}), but block has {_names(block)}"
                for kind, found in layers.items()
                if kind not in block
            ),
            *(f"block has {kind!r}, but no layer is of it" for kind in block if kind not in layers),
        ],
    )


def key(rng: Any) -> None:
    """Requires one random key, or None."""
    if rng is None:
        return
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    is_legacy = dtype == jnp.uint32 and shape is not None and len(shape) == 1
    if not is_key and not is_legacy:
        raise TypeError(f"rng: must be one key, as of jax.random.key(0), or None; got {show(rng)}")


def grad_dtype(dtype: Any, params: PyTree) -> None:
    """Requires that gradients of `params` fit into `dtype`, if it is not None."""
    if dtype is None or jnp.issubdtype(dtype, jnp.complexfloating):
        return
    raise_all(
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
        raise TypeError(f"mesh: must be a jax.sharding.Mesh, as of jax.make_mesh, got {show(mesh)}")
    if not isinstance(axis, str):
        raise TypeError(f"{argument}={axis!r}: must be the name of a mesh axis, got {show(axis)}")
    _known_axes(mesh, argument, axis, [axis])
    return mesh.shape[axis]


def other_axes(mesh: Any, axis: str, argument: str, axes: Any) -> tuple[str, ...]:
    """Requires one axis of the mesh beside `axis`, or several; returns a tuple."""
    names = (axes,) if isinstance(axes, str) else axes
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument}={axes!r}: must be the name of a mesh axis, or a tuple of them")
    _known_axes(mesh, argument, axes, names)
    if axis in names or len(set(names)) < len(names):
        raise ValueError(
            f"{argument}={axes!r}: must be mesh axes other than axis={axis!r}, each once; leave "
            "out the others"
        )
    return tuple(names)


def _known_axes(mesh: jax.sharding.Mesh, argument: str, value: Any, names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        known = ", ".join(f"{name!r} ({size} devices)" for name, size in mesh.shape.items())
        are = "is not an axis" if len(unknown) == 1 else "are not axes"
        raise ValueError(
            f"{argument}={value!r}: {', '.join(map(repr, unknown))} {are} of the mesh, which has "
            f"{known}; name one of its axes, or make it with these"
        )


def num_layers(
    params: Any, layout: Sequence[str] | None, *, num_stages: int = 1, where: str = ""
) -> int:
    """Requires `{"ends": ..., "blocks": ...}`, the blocks stacked, and returns their number."""
    if not isinstance(params, Mapping) or set(params) - {"shared"} != {"ends", "blocks"}:
        got = (
            f"a dict with the keys {sorted(map(str, params))}"
            if isinstance(params, Mapping)
            else (show(params))
        )
        raise ValueError(
            'params: must be {"ends": the parameters outside the layer stack, "blocks": those of '
            'the layers, stacked}, and "shared": those that all blocks use, if there are any; got '
            f"{got}"
        )
    arrays(params, "params")
    size = _stack_size(params["blocks"]) if layout is None else len(layout)
    if layout is not None:
        _stacks_fit(params["blocks"], layout)
    if size < num_stages:
        raise ValueError(
            f'params["blocks"]: has {size} layers, fewer than the {num_stages} stages{where}; use '
            "a mesh with fewer devices along the axis, or a deeper model"
        )
    return size


def _stack_size(blocks: PyTree) -> int:
    """Requires one leading dim of all leaves, and returns it."""
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    if not leaves:
        raise ValueError(
            'params["blocks"]: must have leaves, the parameters of the layers; got none'
        )
    sizes = [leaf.shape[0] if leaf.ndim else None for _, leaf in leaves]
    counted = [size for size in sizes if size is not None]
    # The size that most leaves have is taken for the number of layers.
    size = max(counted, key=counted.count) if counted else None
    raise_all(
        'params["blocks"]: every leaf must have the layers as its leading dim, the same number '
        f"({size} in most leaves here); stack the parameters of all layers on a new leading dim",
        (
            f'params["blocks"]{keystr(path)} of shape {leaf.shape}'
            for (path, leaf), own in zip(leaves, sizes, strict=True)
            if own is None or own != size
        ),
    )
    assert size is not None
    return size


def _stacks_fit(blocks: Any, layout: Sequence[str]) -> None:
    """Requires a stack for each kind, with as many layers as the layout has of it."""
    counts = {kind: layout.count(kind) for kind in layout}
    must = (
        'params["blocks"]: with a layout it must be a dict with a stack for each kind, whose '
        "leaves have the layers of that kind as their leading dim"
    )
    if not isinstance(blocks, Mapping):
        raise ValueError(f"{must}; got {show(blocks)} for the kinds {_names(counts)}")
    offenders = [
        f"nothing for {kind!r}, of which layout has {count} layers"
        for kind, count in counts.items()
        if kind not in blocks
    ]
    for kind in blocks:
        name = f'params["blocks"][{kind!r}]'
        if kind not in counts:
            offenders.append(f"{name} is of no kind in layout, which has {_names(counts)}")
            continue
        offenders += [
            f"{name}{keystr(path)} of shape {leaf.shape}, but layout has {counts[kind]} layers of "
            f"{kind!r}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(blocks[kind])
            if leaf.shape[:1] != (counts[kind],)
        ]
    raise_all(f"{must}; stack those, or change layout", offenders)


def arrays(tree: PyTree, name: str) -> None:
    """Requires every leaf to be an array, or a Python or NumPy scalar."""
    raise_all(
        f"{name}: every leaf must be an array or a number; convert it, or leave it out",
        (
            f"{name}{keystr(path)} is {show(leaf)}"
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
        raise ValueError("batch: must hold at least one array [B, ...]; got none")
    raise_all(
        "batch: every leaf must have a leading dim, the batch size; repeat what is alike for "
        "all rows, or have the model's functions close over it",
        (f"batch{keystr(path)} is a scalar" for path, leaf in leaves if not leaf.ndim),
    )
    sizes = {leaf.shape[0] for _, leaf in leaves}
    raise_all(
        "batch: all leaves must share their leading dim, the batch size; pad or cut them",
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
    model: Model,
    outside: PyTree,
    layers: dict[Kind, PyTree],
    microbatch: PyTree,
    rng: Any,
    shard: Any = None,
    *,
    hidden_axes: Iterable[str] = (),
) -> Outputs:
    """Requires the model's functions to fit each other, and returns avals of what they return.

    `outside` holds `ends`, and `shared` if there is one, and `layers` the parameters of one layer
    of each kind; all arguments may be avals. The context in what is returned has no shared
    parameters. No function may name one of the mesh axes `hidden_axes`.
    """

    def run(
        outside: PyTree, layers: dict[Kind, PyTree], microbatch: PyTree, rng: Any, shard: Any
    ) -> Any:
        ends, shared = outside["ends"], outside.get("shared")
        key = _microbatches.microbatch_key(rng, jnp.int32(0))
        ends_ctx = _microbatches.context(microbatch, key, 0, shard=shard, shared=shared)
        bare_ctx = _microbatches.context(microbatch, key, 0, is_layer=True, shard=shard)
        layer_ctx = dataclasses.replace(bare_ctx, shared=shared)
        x = _returned("model.embed", "x", model.embed(ends, ends_ctx))
        if not jax.tree.leaves(x):
            raise ValueError(
                f"model.embed: must return at least one array, x, for the blocks; got {x!r}"
            )
        x = _microbatches.strong(x)
        aux = {
            kind: _block_aux(model, x, block(layers[kind], x, layer_ctx), name=block_name(kind))
            for kind, block in _kinds.blocks_of(model).items()
        }
        aux_sum = functools.reduce(operator.add, aux.values()) if model.block_has_aux else None
        loss, metrics = _loss_and_metrics(model, model.head(ends, x, ends_ctx))
        weight = None if model.weight is None else model.weight(microbatch)
        if model.weight is not None:
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
    used = _varying.named_axes(jaxpr.jaxpr) & set(hidden_axes)
    if used:
        raise ValueError(
            f"model: its functions name the mesh axes {sorted(used)}, but may name manual_axes "
            "only; name them there too (the pipeline axis is the library's own)"
        )
    return _varying.with_mesh(outs)


def reduced(outs: Outputs, loss_axes: Iterable[str]) -> None:
    """Requires what is added up over microbatches to be alike where these do not differ."""
    allowed = set(loss_axes)
    values = {"model.head: its loss": outs.loss, "model.head: metrics": outs.metrics}
    values["model.weight"] = outs.weight
    values |= {f"{block_name(kind)}: its aux loss": aux for kind, aux in outs.aux.items()}
    raise_all(
        "manual_axes: over an axis that is not one of batch_axes, all devices must come to one "
        "loss and weight and the same metrics; reduce them (jax.lax.psum or pmean), or name the "
        "axis in batch_axes if the rows of the batch are spread over it",
        (
            f"{name}{keystr(path)} varies over {', '.join(map(repr, sorted(axes)))}"
            for name, value in values.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(value)
            if (axes := _varying.varies_over(leaf) - allowed)
        ),
    )


def block_name(kind: Kind) -> str:
    """Names the block of a kind, in messages."""
    return "model.block" if kind is None else f"model.block[{kind!r}]"


def same_x(x: PyTree, y: PyTree, *, name: str, hint: str = "") -> None:
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
            f"x{keystr(path)} comes as {_short(a)} and leaves as {_short(b)}"
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(x), jax.tree.leaves(y), strict=True
            )
            if a.shape != b.shape or a.dtype != b.dtype
        ),
    )


def _block_aux(model: Model, x: PyTree, out: Any, *, name: str) -> Any:
    """Requires block's outputs to fit the model, and returns its aux loss, or None."""
    if model.block_has_aux and not (_is_pair(out) and jax.tree_util.all_leaves([out[1]])):
        raise TypeError(
            f"{name}: with block_has_aux=True it must return (x, aux_loss), got {show(out)}"
        )
    y, aux = _microbatches.block_outputs(model, _returned(name, "x", out))
    hint = (
        ""
        if model.block_has_aux or not _is_pair(out)
        else ("; to return an aux loss beside x, make the model with block_has_aux=True")
    )
    same_x(x, y, name=name, hint=hint)
    if aux is not None:
        _scalar(name, "an aux loss that is a floating-point scalar", aux)
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
    _scalar("model.head", "a loss that is a floating-point scalar", loss)
    return _microbatches.head_outputs(model, (loss, metrics) if model.has_aux else loss)


def _returned(name: str, what: str, value: Any) -> Any:
    """Requires arrays, or Python scalars, of what a function of the model returned."""
    value = _microbatches.as_arrays(value)
    raise_all(
        f"{name}: must return arrays",
        (
            f"{what}{keystr(path)} is {show(leaf)}"
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
        raise TypeError(f"{name}: must return {what}, got {show(value)}; {fix}")
    if value.shape or not any(jnp.issubdtype(value.dtype, kind) for kind in of):
        raise ValueError(f"{name}: must return {what}, got {_short(value)}; {fix}")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def raise_all(message: str, offenders: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raises `message` with the list of offenders, if there are any."""
    lines = [f"  * {line}" for line in offenders]
    if lines:
        raise error("\n".join([f"{message}; but:", *lines]))


def _names(kinds: Iterable[Any]) -> str:
    return ", ".join(map(repr, kinds)) or "no kinds"


def _ellipsis(numbers: list[int]) -> str:
    """Lists the first few of the numbers."""
    return ", ".join(map(str, numbers[:8])) + (", .." if len(numbers) > 8 else "")


def _short(aval: Any) -> str:
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def show(value: Any) -> str:
    """Says in a few words what a value is."""
    if _is_array(value):
        return f"an array {_short(value)}"
    return f"{type(value).__name__} {value!r}"[:80]
