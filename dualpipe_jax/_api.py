"""Gradients: validate what the user gave, compile the schedule, build the step."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dualpipe_jax import _microbatches, _outputs, _parameters, _scopes, _validate
from dualpipe_jax import schedules as _schedules
from dualpipe_jax._build import Axes, Builder, block_of
from dualpipe_jax._executor import MemoryReport
from dualpipe_jax._schedule.compile import compile_program, require_timetable
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._sequential import sequential as sequential
from dualpipe_jax._simulate import (
    TRANSFER,
    Costs,
    durations_of,
    fastest_timetable,
    prefers_full_backward,
    usual_costs,
)
from dualpipe_jax._split_vjp import is_differentiable
from dualpipe_jax._stage_sizes import spread_evenly, stage_sizes, stages_of_one_layer
from dualpipe_jax._types import Model, PyTree


def value_and_grad(
    model: Model,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    num_microbatches: int,
    schedule: str | _schedules.Schedule = "dualpipe",
    timetable: str | None = None,
    axis: str = "pipe",
    layers_per_stage: Sequence[int] | None = None,
    unroll_layers: bool | None = None,
    remat: str | Callable[..., Any] = "none",
    stash_deferred: bool = False,
    full_backward: bool | None = None,
    costs: Costs | None = None,
    grad_dtype: Any = None,
    batch_axes: str | tuple[str, ...] = (),
    manual_axes: str | tuple[str, ...] = (),
    param_specs: PyTree = None,
    grad_specs: PyTree = None,
    trainable: PyTree | Callable[[PyTree], PyTree] = True,
    overwrite: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> "GradFunction":
    """Makes the pipelined `jax.value_and_grad` of a model's loss.

    The function equals `jax.value_and_grad(sequential(model, num_microbatches=...))` whatever the
    schedule, and runs as one program over the mesh. Call it inside your own `jax.jit`, next to the
    optimizer's update. DualPipe: DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437).

    Args:
      model: The model, as pure functions.
      mesh: The devices. Axes not named here are left to XLA's partitioner; inside the model's
        functions they are Auto axes, whatever they are outside. Where `jax.set_mesh` names a mesh
        with the same axes, its devices are taken instead; then an AbstractMesh will do.
      num_microbatches: Microbatches a step (on each shard of the batch), over both directions.
      schedule: A name of `schedules.names()`, or a Schedule for as many ranks and microbatches.
      timetable: When a rank does what. `"shortest"`: everything as soon as it can, each tick chosen
        by the tables. `"aligned"`: all ranks start their pairs together; as long as every rank has
        one, they run straight-line code in which XLA hides the transfers behind compute (dualpipe
        and dualpipev; for other schedules the two are the same). None: the faster of these two by
        simulation at `costs`, the shortest for few microbatches. `"two-tick"`, for GPUs, is taken
        on request only: what a rank makes is read by another in the second tick after that or
        later, so that every transfer has a whole action to hide behind, in any schedule (but the
        model's own collectives have only what "shortest" gives them). By simulation a step takes
        1.00 to 1.05 times as long as its order needs (1f1b and zb-h1 under rematerialisation up to
        1.11, longer than with "shortest"); it has been compiled for GPUs, but not measured on any.
        On TPUs, where senders wait for receivers, it is refused.
      axis: The mesh axis over which the layers are spread; its size is the number of ranks.
      layers_per_stage: How many layers each stage has, in model order, as many numbers as the
        schedule has stages; fewer for the last one, say, whose head takes time, too. Every rank
        gets room for as many layers as the fullest stage has. None spreads them evenly, the first
        stages getting one more if they do not divide.
      unroll_layers: Whether the layers of a stage stand in the program one after the other, which
        XLA can schedule better, or in a loop, which compiles sooner; None unrolls up to four.
      remat: What a block keeps for its backward: `"none"` recomputes nothing costly, `"block"`
        keeps its input only, a `jax.checkpoint` policy says itself.
      stash_deferred: Whether, under rematerialisation, a weight grad that a schedule puts off
        keeps all it needs until its turn. By default it keeps the block's inputs and cotangents
        only and recomputes the rest, lest zero-bubble schedules take the memory that `remat`
        saves; one that follows its input grad at once recomputes nothing. Under `remat="none"`
        nothing is recomputed, and this is without effect.
      full_backward: Whether an input grad that its weight grad follows at once runs with it, layer
        by layer, as a full backward (B): that of the stage's last layers in the input grad's tick,
        that of the first ones in the weight grad's, which then hands on the cotangent. (Where a
        stage has one layer, it is not divided, but in the input grad's tick.) It takes no stash of
        all layers of a stage, nor the time to write and read one, and evens out what ticks take:
        where input grads take longer than weight grads, as with attention and all the more under
        rematerialisation, most schedules are the faster for it; `simulate` says by how much.
        A weight grad that the schedule puts off is left where it is, and so, but on CPUs, is the
        straight-line code of `"aligned"`. None: where that code is not in the program (what gains
        is then its smaller part) and a simulation at `costs` is the faster for it;
        and on CPUs, which mostly stand in for accelerators in tests, everywhere: that step is not
        always what an accelerator would run.
      costs: How long actions take, in any one unit of time, by which they are placed in ticks, so
        that ranks wait less for each other, and by which None is decided for timetable and
        full_backward; a transfer is taken to be a tenth of the forward. They must be the same on
        every process, as the program is: measure them on one. None: a transformer's, rematerialised
        if `remat` says so. Gradients are the same whatever they are. (A step of more than 20,000
        actions is not placed by any, as that takes seconds, nor is one in the two-tick timetable.)
      grad_dtype: The dtype of the gradients; None for that of each parameter.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded (data parallel).
      manual_axes: Mesh axes of which the model's functions use collectives by name (expert, tensor
        or sequence parallel): they are given a device's part of the parameters and, where the axis
        is one of batch_axes too, of the batch. JAX's check of varying values holds for them, as in
        `jax.shard_map` (`jax.lax.pcast` is the fix for most of its errors). Over an axis that is
        not one of batch_axes all devices must come to the same loss, weight and metrics.
      param_specs: How params lie over the manual axes: a tree of PartitionSpecs whose leaves stand
        for whole branches of params; None for what is the same on all of their devices. The first
        entry for a leaf of blocks is that of the layers' dim. A leaf outside of blocks, such as the
        table of a large vocabulary, may lie over `axis` too, the last name in the entry of any dim:
        it is gathered once a step, and its gradient leaves scattered alike. So may any leaf over
        batch_axes that are not manual_axes (FSDP), in any dim but the layers', named after manual
        axes. (Where the axis is an Explicit one, the type of the leaf says so by itself.)
      grad_specs: How gradients lie: a tree as param_specs; None for as their parameters. A gradient
        lies as its parameter at least; over more axes, batch_axes that are not manual_axes and
        outside of blocks `axis`, it is summed and scattered at once, after the last tick, and not
        summed on every device (ZeRO's second stage, arXiv:1910.02054, section 5.2). The zeros of
        frozen parameters lie as these.
      trainable: Which parameters get a gradient: a tree of bools whose leaves stand for whole
        branches of params, or a function from params to one (as the masks of optax). For the
        others nothing is computed or kept, and their gradient is zeros, which cost nothing inside
        a jit that does not return them; that of one that its gradient overwrites is itself.
      overwrite: Which parameters are overwritten by what comes as their gradient, such as the
        scales and the histories of largest values of float8: a tree of bools, or a function, as for
        `trainable`; None for what lies under a key `"_overwrite_with_gradient"`, as Flax's float8
        does. Of the new values that microbatches and shards give the largest is taken, in the
        parameter's own dtype: neither added up nor scaled. Each is to be used once in a layer, and
        none may be in `"shared"`.

    Returns:
      `grad_fn(params, batch, *, rng=None, loss_scale=None) -> (loss, grads)`; with `model.has_aux`,
      `((loss, metrics), grads)`; if blocks give metrics (`Aux`), `((loss, Metrics), grads)`, those
      of blocks sharded over `axis` as their gradients are. It is not itself differentiable by
      `jax.grad`; `sequential` is.

      params: `{"ends": pytree, "blocks": pytree}`, every leaf of blocks `[num_layers, ...]` in
        model order, sharded in any way; with `model.layout`, blocks is a dict of such stacks, one
        for each kind of layer, and num_layers counts the layers of that kind. Parameters that all
        blocks use are `"shared": pytree`, and they see them as `ctx.shared`. batch: a pytree of
        arrays `[B, ...]`; microbatch m is rows `[m B/N, (m+1) B/N)`. rng: a key, or None. loss: a
        scalar of at least float32. grads: as params in structure, shapes and dtypes, accumulated
        in float32 or wider; float0 zeros for integer leaves, as with `allow_int=True`. Gradients
        of blocks leave sharded over `axis` if num_layers divides by its size, else replicated: lay
        blocks so from the start (leading dim `PartitionSpec(axis)`), and no update has to move
        them. loss_scale: a positive number, or an array of one, for float16, whose range cotangents
        leave downwards: all of them are multiplied by it, and the gradients, once they are added
        up, divided. So neither loss nor gradients show it, but that gradients are not finite if
        cotangents left the range upwards: skip such a step, and lower the scale.

    Raises:
      ValueError: If an argument has a bad value; from grad_fn, when traced, if params, batch or
        the model's functions do not fit.
      TypeError: If an argument, or what a function of the model returns, has a wrong type.
    """
    _validate.is_model(model)
    axes = Axes.checked(mesh, axis, batch_axes, manual_axes)
    _validate.positive_int("num_microbatches", num_microbatches)
    schedule = _schedule_for(schedule, mesh.shape[axis], num_microbatches)
    _validate.optional_flag("unroll_layers", unroll_layers)
    stash_deferred = _validate.flag("stash_deferred", stash_deferred) or remat == "none"
    _validate.optional_flag("full_backward", full_backward)
    if costs is None:
        costs = usual_costs(recomputes=remat != "none", stash_deferred=stash_deferred)
    elif not isinstance(costs, Costs):
        raise TypeError(f"costs={costs!r}: must be a dualpipe_jax.Costs, or None")
    layers_per_stage = stage_sizes(
        layers_per_stage,
        num_stages=schedule.num_stages,
        where=f" of schedule {schedule.name!r} over {schedule.num_ranks} ranks",
    )
    if timetable is None:
        timetable = fastest_timetable(schedule, costs=costs, layers_per_stage=layers_per_stage)
    require_timetable(timetable)

    def tables_of(*, full_backward: bool, num_layers: int | None = None) -> Tables:
        whole_stages, durations = frozenset[int](), None
        if num_layers is not None:
            num_stages = schedule.num_stages
            whole_stages = stages_of_one_layer(num_layers, num_stages, layers_per_stage)
            durations = durations_of(
                schedule,
                costs,
                transfer=TRANSFER * costs.forward,
                layers_of_stage=layers_per_stage or spread_evenly(num_layers, num_stages),
                full_backward=full_backward,
            )
        return compile_program(
            schedule.program,
            timetable=timetable,
            # What a deferred weight grad needs has slots of its own where others have none.
            stash_deferred=stash_deferred and not full_backward,
            full_backward=full_backward,
            whole_stages=whole_stages,
            durations=durations,
        ).tables

    def placement_of(num_layers: int) -> str:
        """Names the costs and the stages by which actions are placed."""
        layers = layers_per_stage or spread_evenly(num_layers, schedule.num_stages)
        return _scopes.of_placement(tuple(vars(costs).values()), layers)

    def has_full_backward(*, on_cpu: bool, num_layers: int | None = None) -> bool:
        if full_backward is not None or on_cpu:
            return full_backward is not False
        return prefers_full_backward(
            schedule,
            timetable=timetable,
            costs=costs,
            num_layers=num_layers,
            layers_per_stage=layers_per_stage,
        )

    build = Builder(
        axes=axes,
        tables_of=tables_of,
        placement_of=placement_of,
        has_full_backward=has_full_backward,
        stash_deferred=stash_deferred,
        model=model,
        block=block_of(model, remat),
        param_specs=param_specs,
        grad_specs=grad_specs,
        trainable=trainable,
        overwrite=overwrite,
        layers_per_stage=layers_per_stage,
        unroll_layers=unroll_layers,
    )
    dtype = None if grad_dtype is None else _float_dtype("grad_dtype", grad_dtype)
    return GradFunction(
        build=build, schedule=schedule, trainable=trainable, overwrite=overwrite, dtype=dtype
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class GradFunction:
    """What `value_and_grad` makes: a function of (params, batch), as described there."""

    build: Builder
    schedule: _schedules.Schedule
    trainable: PyTree | Callable[[PyTree], PyTree]
    overwrite: PyTree | Callable[[PyTree], PyTree] | None
    dtype: Any
    # The name of `jax.jit(grad_fn)`'s program in logs and profiles.
    __name__ = "pipelined_value_and_grad"

    def __repr__(self) -> str:
        """Says of which schedule it is."""
        made = self.schedule
        return (
            f"<dualpipe_jax.value_and_grad: {made.name}, {made.num_ranks} ranks, "
            f"{made.num_microbatches} microbatches>"
        )

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        *,
        rng: jax.Array | None = None,
        loss_scale: Any = None,
    ) -> Any:
        """Returns `(loss, grads)`, or with metrics `((loss, metrics), grads)`."""
        params, batch = _microbatches.as_arrays(params), _microbatches.as_arrays(batch)
        loss_scale = _validate.loss_scale(loss_scale)
        step = self.build(params, batch, rng)
        _validate.grad_dtype(self.dtype, params)
        wanted = _parameters.wanted(params, self.trainable)
        overwritten = _parameters.overwritten(params, self.overwrite)
        with _named(self.schedule):
            result, grads = step(params, batch, rng, loss_scale)
        result = _outputs.without_derivative(result)
        return result, _gradients(params, wanted, overwritten, grads, self.dtype, loss_scale)

    def memory(
        self, params: PyTree, batch: PyTree, *, rng: jax.Array | None = None
    ) -> MemoryReport:
        """Adds up what a step holds on one device beside params and batch, without compiling it.

        Args:
          params: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          batch: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          rng: As for a call.

        Returns:
          A MemoryReport; `print` it, or see its `terms`. It is of the step as the mesh's devices
          would run it: one over CPUs has full backwards unless told otherwise, one over an
          AbstractMesh without devices, or with TPUs, where they are faster by simulation. The
          compiler has the last word: `preflight` asks it.

        Raises:
          ValueError: As a call.
          TypeError: As a call.
        """
        reports = []

        def look(params: PyTree, batch: PyTree, rng: Any) -> None:
            reports.append(self.build.traced(params, batch, rng).memory(params, batch, rng))

        jax.eval_shape(look, params, batch, rng)
        return reports[0]


def _named(schedule: _schedules.Schedule) -> AbstractContextManager[object]:
    """Puts the schedule's name into the compiled program, if the name tells which one it is."""
    sizes = {"num_ranks": schedule.num_ranks, "num_microbatches": schedule.num_microbatches}
    name = schedule.name
    if name not in _schedules.names() or _schedules.make(name, **sizes) != schedule:
        return nullcontext()
    return jax.named_scope(_scopes.of_schedule(name, **sizes))


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
            f"schedule={schedule.name!r}: must have backwards; give every stage and microbatch its "
            "B, or its I and W (dualpipe_jax.evaluate is for forwards alone)"
        )
    made_for = schedule.num_ranks, schedule.num_microbatches
    if made_for != (num_ranks, num_microbatches):
        raise ValueError(
            f"schedule={schedule.name!r}: must be made for the {num_ranks} devices of the mesh "
            f"axis and num_microbatches={num_microbatches}, but is for {made_for[0]} ranks and "
            f"{made_for[1]} microbatches; make it for those, or pass its name"
        )
    return schedule


def _float_dtype(name: str, dtype: Any) -> Any:
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(f"{name}={dtype!r}: must be a floating-point dtype, or None")
    return known


def _gradients(
    params: PyTree,
    wanted: dict[str, list[bool]],
    overwritten: dict[str, list[bool]],
    grads: dict[str, list[jax.Array]],
    dtype: Any,
    loss_scale: jax.Array | None,
) -> PyTree:
    """Gives the gradients the structure of `params`: zeros to frozen leaves, float0 to integers.

    What is frozen and would be overwritten by its gradient is overwritten by what it is.
    """
    found = {part: iter(leaves) for part, leaves in grads.items()}
    flags = {part: zip(wanted[part], overwritten[part], strict=True) for part in wanted}

    def one(path: Any, leaf: Any) -> Any:
        part = path[0].key
        is_wanted, is_new_value = next(flags[part])
        if is_wanted:
            grad = next(found[part])
            if is_new_value:
                return grad.astype(leaf.dtype)
            if loss_scale is not None:
                grad = grad / loss_scale.astype(grad.dtype)
            return grad.astype(dtype or leaf.dtype)
        if not is_differentiable(leaf):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        return leaf if is_new_value else jnp.zeros_like(leaf, dtype=dtype)

    return jax.tree_util.tree_map_with_path(one, params)
