"""Checks of the arguments of a call: parameters, batch, key and loss scale.

They run when the call is traced, before the model's functions do.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr

from dualpipe_jax._errors import brief, is_array, raise_all, short, show
from dualpipe_jax._model import semantics
from dualpipe_jax._model.types import Batch, Mesh, Params, PyTree, is_on_host


def key(rng: Any, *, argument: str = "rng", is_optional: bool = True) -> None:
    """Requires one random key, or None where it may be left out."""
    if rng is None and is_optional:
        return
    dtype, shape = getattr(rng, "dtype", None), getattr(rng, "shape", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    is_legacy = dtype == jnp.uint32 and shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not is_key and not is_legacy:
        or_none = ", or None" * is_optional
        raise TypeError(
            f"{argument}: must be one key, as jax.random.key(0) gives{or_none}; got {show(rng)}"
        )


def loss_scale(value: Any) -> Any:
    """Requires a positive real scalar, or None; returns it as an array `[]`, or None."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        limits = jnp.finfo(jnp.zeros((), float).dtype)
        if not float(limits.tiny) <= value <= float(limits.max):
            raise ValueError(
                f"loss_scale={brief(value)}: must be positive and finite in {limits.dtype}, or None"
            )
        return jnp.asarray(value, float)
    if not (is_array(value) and _is_of_jax(value)):
        raise TypeError(f"loss_scale={brief(value)}: must be a positive number, or None")
    array = jnp.asarray(value)
    is_real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.shape or not is_real:
        raise ValueError(
            f"loss_scale: must be one positive number, got an array {short(array)}; give a scalar"
        )
    return array


def grad_dtype(dtype: Any, params: Params) -> None:
    """Requires that gradients of `params` fit into `dtype`, if it is not None."""
    if dtype is None:
        return
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    raise_all(
        f"grad_dtype={dtype}: must be real for real parameters and complex for complex ones, or "
        "None for the dtype of each parameter",
        (
            f"params{keystr(path)} is {short(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if jnp.issubdtype(leaf.dtype, jnp.floating if is_complex else jnp.complexfloating)
        ),
    )


def num_layers(
    params: Params, layout: Sequence[str] | None, *, num_stages: int = 1, where: str = ""
) -> int:
    """Requires `{"ends": ..., "blocks": ...}` with stacked layers, and returns their number.

    Args:
      params: The parameters.
      layout: The model's layout.
      num_stages: The stages over which the layers are spread evenly: the least number of them.
      where: Words about these stages, in a message.
    """
    _parts(params)
    arrays(params, "params")
    size = _stack_size(params["blocks"]) if layout is None else len(layout)
    if layout is not None:
        _stacks_fit(params["blocks"], layout)
    if size < num_stages:
        raise ValueError(
            f'params["blocks"]: has {size} layers, fewer than the {num_stages} stages{where}; use '
            "a mesh with fewer devices along the axis, a deeper model, or layers_per_stage, which "
            "may give a stage 0 layers"
        )
    return size


def _parts(params: Params) -> None:
    """Requires `{"ends": ..., "blocks": ...}`, and perhaps `"shared"`."""
    if not isinstance(params, Mapping) or set(params) - {"shared"} != {"ends", "blocks"}:
        got = (
            f"a dict with the keys {brief(sorted(map(str, params)))}"
            if isinstance(params, Mapping)
            else (show(params))
        )
        raise ValueError(
            'params: must be {"ends": the parameters outside the layers, "blocks": those of the '
            'layers, stacked}, and "shared": those that all blocks use, if there are any; got '
            f"{got}"
        )


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
            for (path, leaf), leaf_size in zip(leaves, sizes, strict=True)
            if leaf_size is None or leaf_size != size
        ),
    )
    assert size is not None
    return size


def _stacks_fit(blocks: Any, layout: Sequence[str]) -> None:
    """Requires a stack for each kind, with as many layers as the layout has of it."""
    counts = Counter(layout)
    must = (
        'params["blocks"]: with a layout it must be a dict with a stack for each kind, whose '
        "leaves have as their leading dim the layers of that kind"
    )
    if not isinstance(blocks, Mapping):
        raise ValueError(f"{must}; got {show(blocks)} for the kinds {sorted(counts)}")
    offenders = [
        f"nothing for {kind!r}, of which the layout has {count} layers"
        for kind, count in counts.items()
        if kind not in blocks
    ]
    for kind in blocks:
        name = f'params["blocks"][{kind!r}]'
        if kind not in counts:
            offenders.append(f"{name} is of no kind in the layout, which has {sorted(counts)}")
            continue
        offenders += [
            f"{name}{keystr(path)} of shape {leaf.shape}, but the layout has {counts[kind]} layers "
            f"of {kind!r}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(blocks[kind])
            if leaf.shape[:1] != (counts[kind],)
        ]
    raise_all(f"{must}; stack those layers, or change the layout", offenders)


def arrays(tree: PyTree, name: str) -> None:
    """Requires every leaf to be an array, or a Python or NumPy scalar."""
    raise_all(
        f"{name}: every leaf must be an array or a number; convert it, or leave it out",
        (
            f"{name}{keystr(path)} is {show(leaf)}"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if not _is_of_jax(leaf)
        ),
        error=TypeError,
    )
    raise_all(
        f"{name}: must be on the devices; copy it there in the step, before this call, with "
        f"jax.device_put({name}, jax.memory.Space.Device)",
        (
            f"{name}{keystr(path)} is {short(leaf)} in the host's memory"
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
            if is_on_host(leaf)
        ),
    )


def _is_of_jax(leaf: Any) -> bool:
    """Whether a leaf is an array, or the aval of one, of a dtype that JAX has."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return True
    try:
        jax.typeof(leaf)
    except (TypeError, OverflowError):
        return False
    return True


def values(params: Params, batch: Batch) -> tuple[Params, Batch]:
    """Requires trees of values, not of avals; returns them, Python scalars as arrays.

    Whatever is cheap to find is refused before many scalars become arrays.
    """
    have_values(params=params, batch=batch)
    _parts(params)
    arrays(batch, "batch")
    _rows(batch)
    return semantics.as_arrays(params), semantics.as_arrays(batch)


def have_values(**trees: PyTree) -> None:
    """Requires trees without avals."""
    raise_all(
        "params and batch: must have values, to run a step on them; jax.ShapeDtypeStruct is for "
        "grad_fn.memory, choose, preflight and jax.eval_shape",
        (
            f"{name}{keystr(path)} is {show(leaf)}"
            for name, tree in trees.items()
            for path, leaf in jax.tree_util.tree_leaves_with_path(semantics.pytree(name, tree))
            if isinstance(leaf, jax.ShapeDtypeStruct)
        ),
        error=TypeError,
    )


def arguments(params: Params, batch: Batch, rng: Any) -> None:
    """Requires leaves that `jax.eval_shape` takes: arrays, their avals, or numbers; and a key."""
    for name, tree in {"params": params, "batch": batch}.items():
        arrays(semantics.pytree(name, tree), name)
    _parts(params)
    _rows(batch)
    key(rng)


def batch(batch: Batch, *, num_microbatches: int, num_shards: int = 1, shards: str = "") -> None:
    """Requires one leading dim of all leaves, divisible into microbatches on every shard.

    Args:
      batch: The batch, leaves `[B, ...]`.
      num_microbatches: The microbatches of a shard.
      num_shards: The shards of the batch.
      shards: The mesh axes of these shards, in a message.
    """
    arrays(batch, "batch")
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError("batch: must hold at least one array [B, ...]; got none")
    _rows(batch)
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
        nearest = f"{down} or {up}" if down else brief(up)
        raise ValueError(
            f"batch: its leading dim, {size}, is not divisible by num_microbatches="
            f"{brief(num_microbatches)}{times}; pad or cut the batch to {nearest} rows, or change "
            "num_microbatches"
        )


def _rows(batch: Batch) -> None:
    """Requires a leading dim of every leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    raise_all(
        "batch: every leaf must have a leading dim, the batch size; repeat a value "
        "that is the same for all rows, or have the model's functions close over it",
        (f"batch{keystr(path)} is a scalar" for path, leaf in leaves if not np.ndim(leaf)),
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
    """Requires committed arrays to be on all devices of the mesh."""
    if not isinstance(mesh, jax.sharding.Mesh):
        return
    devices = set(mesh.devices.flat)
    raise_all(
        f"params and batch: must be on the {len(devices)} devices of the mesh, or uncommitted; "
        "shard them first: params = jax.device_put(params, dualpipe_jax.shardings(params, "
        "mesh=mesh))",
        (
            f"{name}{keystr(path)} is on {_show_devices(leaf.sharding.device_set)}"
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
    batch: Batch,
    mesh: Mesh,
    *,
    axis: str,
    batch_axes: tuple[str, ...],
    manual_axes: tuple[str, ...],
) -> None:
    """Requires rows to be sharded over axes that the step knows, where their sharding is known.

    It is known outside of any jit, and inside from the types of Explicit axes.
    """
    specs = [
        (f"batch{keystr(path)}", _spec_of(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    ]
    raise_all(
        f"batch: must be sharded over the step's mesh, whose axes are {tuple(mesh.shape)}",
        (
            f"{name} is sharded over {unknown!r}"
            for name, spec in specs
            for unknown in sorted({axis for entry in spec for axis in entry} - {*mesh.shape})
        ),
    )
    known = {axis, *batch_axes, *manual_axes}
    raise_all(
        "batch: its rows are sharded over mesh axes that the step does not know, and would be "
        "gathered, so that every device computes them all; name these axes in batch_axes (or in "
        "manual_axes, if the model's functions communicate over them)",
        (
            f"{name}, over {unknown!r}: batch_axes={(*batch_axes, unknown)!r}"
            for name, spec in specs
            for unknown in (spec[0] if spec else ())
            if unknown not in known and mesh.shape[unknown] > 1
        ),
    )


def _spec_of(leaf: Any) -> list[tuple[str, ...]]:
    """Lists the axes over which each dim of an array is sharded; nothing if that is unknown."""
    if isinstance(leaf, jax.core.Tracer):
        sharding = jax.typeof(leaf).sharding
    else:
        sharding = getattr(leaf, "sharding", None)  # NumPy's arrays have none
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return []
    return [(e,) if isinstance(e, str) else tuple(e or ()) for e in sharding.spec]
