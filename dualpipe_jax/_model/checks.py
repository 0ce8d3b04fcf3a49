"""Checks what a user hands over, at trace time, before anything runs.

Every message names the argument, its value, what was required and the fix, and lists all
offenders. What the model's functions return is checked in `_outputs`.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from dualpipe_jax._errors import is_array, raise_all, short, show
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model.types import Model, PyTree


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
    blocks = {_kinds.block_name(kind): block for kind, block in _kinds.blocks_of(model).items()}
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
    is_legacy = dtype == jnp.uint32 and shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not is_key and not is_legacy:
        raise TypeError(f"rng: must be one key, as of jax.random.key(0), or None; got {show(rng)}")


def loss_scale(value: Any) -> Any:
    """Requires a positive real number, or an array of one, or None; returns an array, or None."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        made = jnp.finfo(jnp.zeros((), float).dtype)
        if not float(made.tiny) <= value <= float(made.max):
            raise ValueError(
                f"loss_scale={repr(value)[:80]}: must be positive and finite in {made.dtype}, or "
                "None"
            )
        return jnp.asarray(value, float)
    if not is_array(value):
        raise TypeError(f"loss_scale={value!r}: must be a positive number, or None")
    array = jnp.asarray(value)
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape or not is_real:
        raise ValueError(
            f"loss_scale: must be one positive number, got an array {short(array)}; give a scalar"
        )
    return array


def grad_dtype(dtype: Any, params: PyTree) -> None:
    """Requires that gradients of `params` fit into `dtype`, if it is not None."""
    if dtype is None:
        return
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    raise_all(
        f"grad_dtype={dtype}: must be real for real parameters and complex for complex ones, or "
        "None for the dtype of each",
        (
            f"params{keystr(path)} is {short(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.issubdtype(leaf.dtype, jnp.floating if is_complex else jnp.complexfloating)
        ),
    )


def mesh_axis(mesh: Any, axis: Any, *, argument: str = "axis") -> int:
    """Requires `axis` to be an axis of the mesh, and returns its size."""
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
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


def _known_axes(
    mesh: Any | jax.sharding.AbstractMesh, argument: str, value: Any, names: Iterable[str]
) -> None:
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
            if not is_array(leaf)
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


def can_be_jitted() -> None:
    """Requires `jax.jit` to make programs.

    Raises:
      RuntimeError: Under `jax.disable_jit`.
    """
    if jax.config.jax_disable_jit:  # pyrefly: ignore[missing-attribute]
        raise RuntimeError(
            "jax_disable_jit: a step is one program over a mesh, which JAX does not run operation "
            "by operation; look into the same model with dualpipe_jax.sequential(model, "
            "num_microbatches=...), or turn jax_disable_jit off"
        )


def on_devices_of(mesh: Any, **trees: PyTree) -> None:
    """Requires arrays that were put on devices to lie on all those of the mesh."""
    if not isinstance(mesh, jax.sharding.Mesh):
        return
    devices = set(mesh.devices.flat)
    raise_all(
        f"params and batch: must lie on the {len(devices)} devices of the mesh, or be put on none; "
        "lay them out first: params = jax.device_put(params, dualpipe_jax.shardings(params, "
        "mesh=mesh))",
        (
            f"{name}{keystr(path)} lies on {_show_devices(leaf.sharding.device_set)}"
            for name, tree in trees.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if isinstance(leaf, jax.Array)
            and not isinstance(leaf, jax.core.Tracer)
            and leaf.committed
            and leaf.sharding.device_set != devices
        ),
    )


def _show_devices(devices: Iterable[Any]) -> str:
    names = sorted(map(str, devices))
    return names[0] if len(names) == 1 else f"{len(names)} devices"


def batch_axes_named(
    batch: PyTree,
    mesh: Any,
    *,
    axis: str,
    batch_axes: tuple[str, ...],
    manual_axes: tuple[str, ...],
) -> None:
    """Requires rows to lie over axes that the step knows of, where it is known how they lie.

    That is outside of any jit, and inside by the types of Explicit axes.
    """
    specs = [
        (f"batch{keystr(path)}", _spec_of(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    ]
    raise_all(
        f"batch: must lie on the step's mesh, whose axes are {tuple(mesh.shape)}",
        (
            f"{name} lies over {each!r}"
            for name, spec in specs
            for each in sorted({each for entry in spec for each in entry} - {*mesh.shape})
        ),
    )
    known = {axis, *batch_axes, *manual_axes}
    raise_all(
        "batch: its rows lie over mesh axes of which the step does not know, and would be "
        "gathered, so that every device computes them all; name these axes in batch_axes (or in "
        "manual_axes, if the model's functions communicate over them)",
        (
            f"{name}, over {each!r}: batch_axes={(*batch_axes, each)!r}"
            for name, spec in specs
            for each in (spec[0] if spec else ())
            if each not in known and mesh.shape[each] > 1
        ),
    )


def _spec_of(leaf: Any) -> list[tuple[str, ...]]:
    """The axes over which each dim of an array lies, as far as is known."""
    sharding = jax.typeof(leaf).sharding if isinstance(leaf, jax.core.Tracer) else leaf.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return []
    return [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec]


def _names(kinds: Iterable[Any]) -> str:
    return ", ".join(map(repr, kinds)) or "no kinds"


def _ellipsis(numbers: list[int]) -> str:
    """Lists the first few of the numbers."""
    return ", ".join(map(str, numbers[:8])) + (", .." if len(numbers) > 8 else "")
