"""The public functions: validate, compile the schedule, build the step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax import _microbatches, _validate
from dualpipe_jax import schedules as _schedules
from dualpipe_jax._executor import Step
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators.forward_only import forward_only
from dualpipe_jax._schedule.ir import Tables
from dualpipe_jax._sequential import sequential as sequential
from dualpipe_jax._split_vjp import is_differentiable
from dualpipe_jax._types import Context, Model, PyTree


def value_and_grad(
    model: Model,
    *,
    mesh: jax.sharding.Mesh,
    num_microbatches: int,
    schedule: str | _schedules.Schedule = "dualpipe",
    axis: str = "pipe",
    remat: str | Callable[..., Any] = "none",
    stash_deferred: bool = False,
    grad_dtype: Any = None,
    batch_axes: str | tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Makes the pipelined `jax.value_and_grad` of a model's loss.

    The function equals `jax.value_and_grad(sequential(model, num_microbatches=...))` whatever the
    schedule, and runs as one program over the mesh. Call it inside your own `jax.jit`, next to the
    optimizer's update. DualPipe: DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437).

    Args:
      model: The model, as pure functions.
      mesh: The devices. Axes other than `axis` and `batch_axes` are left to XLA's partitioner;
        inside the model's functions they are Auto axes, whatever they are outside.
      num_microbatches: Microbatches a step (on each shard of the batch), over both directions.
      schedule: A name of `schedules.names()`, or a Schedule for as many ranks and microbatches.
      axis: The mesh axis over which the layers are spread; its size is the number of ranks.
      remat: What a block keeps for its backward: `"none"` recomputes nothing costly, `"block"`
        keeps its input only, a `jax.checkpoint` policy says itself.
      stash_deferred: Whether, under rematerialisation, a weight grad that a schedule puts off
        keeps all it needs until its turn. By default it keeps the block's inputs and cotangents
        only and recomputes the rest, lest zero-bubble schedules take the memory that `remat`
        saves; one that follows its input grad at once recomputes nothing. Under `remat="none"`
        nothing is recomputed, and this is without effect.
      grad_dtype: The dtype of the gradients; None for that of each parameter.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded (data parallel).

    Returns:
      `grad_fn(params, batch, *, rng=None) -> (loss, grads)`; with `model.has_aux`,
      `((loss, metrics), grads)`. It is not itself differentiable by `jax.grad`; `sequential` is.

      params: `{"ends": pytree, "blocks": pytree}`, every leaf of blocks `[num_layers, ...]` in
        model order, sharded in any way. batch: a pytree of arrays `[B, ...]`; microbatch m is rows
        `[m B/N, (m+1) B/N)`. rng: a key, or None. loss: a scalar of at least float32. grads: as
        params in structure, shapes and dtypes, accumulated in float32 or wider; float0 zeros for
        integer leaves, as with `allow_int=True`. Gradients of blocks leave sharded over `axis` if
        num_layers divides by its size, else replicated: lay blocks so from the start (leading dim
        `PartitionSpec(axis)`), and no update has to move them.

    Raises:
      ValueError: If an argument has a bad value; from grad_fn, when traced, if params, batch or
        the model's functions do not fit.
      TypeError: If an argument, or what a function of the model returns, has a wrong type.
    """
    _validate.is_model(model)
    batch_axes = _axes(batch_axes)
    num_ranks = _check(mesh, num_microbatches, axis, batch_axes)
    schedule = _schedule_for(schedule, num_ranks, num_microbatches)
    block = _block(model, remat)
    compiled = compile_program(
        schedule.program,
        stash_deferred=_validate.flag("stash_deferred", stash_deferred) or remat == "none",
    )
    build = _Builder(model, mesh, axis, batch_axes, block, compiled.tables)
    dtype = None if grad_dtype is None else _float_dtype("grad_dtype", grad_dtype)

    def grad_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> Any:
        params, batch = _microbatches.as_arrays(params), _microbatches.as_arrays(batch)
        step = build(params, batch, rng)
        _validate.grad_dtype(dtype, params)
        result, grads = step(params, batch, rng)
        return result, _gradients(params, grads, dtype)

    return grad_fn


def evaluate(
    model: Model,
    *,
    mesh: jax.sharding.Mesh,
    num_microbatches: int,
    axis: str = "pipe",
    batch_axes: str | tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Makes the pipelined loss of a model, without gradients: forwards from both ends.

    Args:
      model: The model, as pure functions.
      mesh: The devices.
      num_microbatches: Microbatches of the batch (on each shard of it), over both directions.
      axis: The mesh axis over which the layers are spread.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded.

    Returns:
      `(params, batch, *, rng=None) -> loss`, or `(loss, metrics)` with `model.has_aux`; equal to
      `sequential(model, num_microbatches=...)`. It keeps no activations for a backward, so that
      `jax.grad` cannot go through it; `value_and_grad` is for that.

    Raises:
      ValueError: As `value_and_grad`.
      TypeError: As `value_and_grad`.
    """
    _validate.is_model(model)
    batch_axes = _axes(batch_axes)
    num_ranks = _check(mesh, num_microbatches, axis, batch_axes)
    program = forward_only(num_ranks=num_ranks, num_microbatches=num_microbatches)
    block = _block(model, "none")
    build = _Builder(model, mesh, axis, batch_axes, block, compile_program(program).tables)

    def loss_fn(params: PyTree, batch: PyTree, *, rng: jax.Array | None = None) -> Any:
        params, batch = _microbatches.as_arrays(params), _microbatches.as_arrays(batch)
        return build(params, batch, rng)(params, batch, rng)[0]

    return loss_fn


class _Builder:
    """Checks the arguments of a call and gives the step for them.

    Called outside of any jit the step is jitted, once for each number of layers: as with `jax.jit`,
    what the model's functions read besides their arguments is read at the first call.
    """

    def __init__(
        self,
        model: Model,
        mesh: jax.sharding.Mesh,
        axis: str,
        batch_axes: tuple[str, ...],
        block: Callable[..., Any],
        tables: Tables,
    ):
        self._tables = tables
        self._fixed: dict[str, Any] = {
            "model": model,
            "mesh": mesh,
            "axis": axis,
            "batch_axes": batch_axes,
            "block": block,
            "tables": tables,
        }
        self._num_shards = int(np.prod([mesh.shape[name] for name in batch_axes], dtype=int))
        self._shards = ", ".join(map(repr, batch_axes))
        self._steps: dict[int, Callable[..., Any]] = {}

    def __call__(self, params: PyTree, batch: PyTree, rng: Any) -> Callable[..., Any]:
        tables = self._tables
        where = f" of the schedule over {tables.num_ranks} ranks"
        num_layers = _validate.num_layers(params, num_stages=tables.num_stages, where=where)
        num_microbatches = tables.num_microbatches
        _validate.key(rng)
        _validate.batch(
            batch,
            num_microbatches=num_microbatches,
            num_shards=self._num_shards,
            shards=self._shards,
        )
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch, rng))):
            # Inside the user's jit: traced as part of it, as often as it is.
            return Step(num_layers=num_layers, **self._fixed)
        if num_layers not in self._steps:
            self._steps[num_layers] = jax.jit(Step(num_layers=num_layers, **self._fixed))
        return self._steps[num_layers]


def _check(
    mesh: jax.sharding.Mesh, num_microbatches: int, axis: str, batch_axes: tuple[str, ...]
) -> int:
    num_ranks = _validate.mesh_axis(mesh, axis)
    for name in batch_axes:
        _validate.mesh_axis(mesh, name, argument="batch_axes")
    if axis in batch_axes or len(set(batch_axes)) < len(batch_axes):
        raise ValueError(
            f"batch_axes={batch_axes!r}: must be mesh axes other than axis={axis!r}, each once"
        )
    _validate.positive_int("num_microbatches", num_microbatches)
    return num_ranks


def _axes(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(axes, str):
        return (axes,)
    if not isinstance(axes, tuple | list):
        raise TypeError(f"batch_axes={axes!r}: must be the name of a mesh axis, or a tuple of them")
    return tuple(axes)


def _schedule_for(
    schedule: str | _schedules.Schedule, num_ranks: int, num_microbatches: int
) -> _schedules.Schedule:
    if isinstance(schedule, str):
        return _schedules.make(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches)
    if not isinstance(schedule, _schedules.Schedule):
        raise TypeError(
            f"schedule={schedule!r}: must be one of {_schedules.names()}, or a Schedule"
        )
    if schedule.program.forward_only:
        raise ValueError(
            f"schedule={schedule.name!r}: has no backward; give every stage and microbatch its B, "
            "or its I and W (dualpipe_jax.evaluate is for forwards alone)"
        )
    made_for = schedule.num_ranks, schedule.num_microbatches
    if made_for != (num_ranks, num_microbatches):
        raise ValueError(
            f"schedule={schedule.name!r}: made for {made_for[0]} ranks and {made_for[1]} "
            f"microbatches, but the mesh axis has {num_ranks} devices and num_microbatches="
            f"{num_microbatches}; make it for those, or pass its name"
        )
    return schedule


def _block(model: Model, remat: str | Callable[..., Any]) -> Callable[..., Any]:
    """Gives block one form, `(params, x, ctx) -> (x, aux or None)`, rematerialised as asked."""

    def block(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Any]:
        y, aux = _microbatches.block_outputs(model, model.block(params, x, ctx))
        _validate.same_x(x, y)
        return _microbatches.strong(y), aux

    if remat == "none":
        return block
    if remat == "block":
        return jax.checkpoint(block)
    if callable(remat):
        policy = remat

        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                return policy(*args, **kwargs)
            except TypeError as error:
                raise TypeError(
                    f"remat={policy!r}: cannot be called as a policy of jax.checkpoint_policies; "
                    "if it makes a policy of its arguments, call it first"
                ) from error

        return jax.checkpoint(block, policy=checked)
    raise ValueError(
        f'remat={remat!r}: must be "none", "block", or a policy of jax.checkpoint_policies'
    )


def _float_dtype(name: str, dtype: Any) -> Any:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(f"{name}={dtype!r}: must be a floating-point dtype, or None")
    return known


def _gradients(params: PyTree, grads: dict[str, list[jax.Array]], dtype: Any) -> PyTree:
    """Gives the gradients the structure of `params`, and float0 zeros to its integer leaves."""
    rest = {part: iter(leaves) for part, leaves in grads.items()}

    def one(path: Any, leaf: Any) -> Any:
        if not is_differentiable(leaf):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        return next(rest[path[0].key]).astype(dtype or leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)
