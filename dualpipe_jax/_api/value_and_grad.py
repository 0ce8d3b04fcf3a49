"""Gradients: `value_and_grad` checks its arguments, and makes a program, a builder, a function."""

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from dualpipe_jax._api.build import Builder, block_of, check_axes, without_derivative
from dualpipe_jax._api.programs import Training
from dualpipe_jax._api.shardings import users_shardings
from dualpipe_jax._api.users_tree import Options, as_canonical, convert_options
from dualpipe_jax._errors import brief
from dualpipe_jax._executor import MemoryReport
from dualpipe_jax._model import call_checks
from dualpipe_jax._model.types import (
    AxisNames,
    Batch,
    Mesh,
    Model,
    Params,
    ParamsMask,
    PyTree,
    Remat,
)
from dualpipe_jax._predict import Costs
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import LayersPerStage, stage_sizes
from dualpipe_jax._scopes import of_schedule
from dualpipe_jax.schedules import Schedule, make, names


def value_and_grad(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str = "pipe",
    batch_axes: AxisNames = (),
    manual_axes: AxisNames = (),
    param_specs: PyTree = None,
    grad_specs: PyTree = None,
    schedule: str | Schedule = "dualpipe",
    layers_per_stage: LayersPerStage = None,
    remat: Remat = "none",
    grad_dtype: DTypeLike | None = None,
    trainable: ParamsMask = True,
    overwrite: ParamsMask | None = None,
    execution: Execution = Execution(),  # noqa: B008
    costs: Costs | None = None,
) -> "GradFunction":
    """Makes the pipelined `jax.value_and_grad` of a model's loss.

    The function equals `jax.value_and_grad(sequential(model, num_microbatches=...))` whatever the
    schedule, and runs as one program over the mesh. Call it inside your own `jax.jit`, next to the
    optimizer's update. DualPipe: DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437).

    Args:
      Required (`evaluate` and `apply` take these, axis, batch_axes, manual_axes, param_specs too):
      model: The model, as pure functions.
      mesh: The devices. Axes not named below are left to XLA's partitioner; inside the model's
        functions they are Auto axes, whatever they are outside. Where `jax.set_mesh` names a mesh
        with the same axes, its devices are taken instead; then an AbstractMesh will do.
      num_microbatches: Microbatches a step (on each shard of the batch), over both directions.

      Sharding:
      axis: The mesh axis over which the layers are spread; its size is the number of ranks.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded (data parallel).
      manual_axes: Mesh axes that the model's functions name in collectives (expert, tensor or
        sequence parallel): these functions are given a device's shard of the parameters and, where
        the axis is one of batch_axes too, of the batch. JAX's check of varying values applies, as
        in `jax.shard_map`. Loss, weight and metrics must be the same on all devices of an axis that
        is not one of batch_axes.
      param_specs: How params are sharded over manual_axes: a tree of PartitionSpecs whose leaves
        stand for whole branches of params; in blocks the first entry is that of the layers' dim.
        None replicates them. Leaves outside of blocks may be sharded over `axis` too, and any leaf
        over batch_axes that are not manual_axes (FSDP), except in the layers' dim: they are
        gathered once a step, and their gradients are scattered likewise. (docs/mesh_axes.md)
      grad_specs: How gradients are sharded: a tree as param_specs; None: as their parameters. A
        gradient may be sharded over more axes than its parameter, over batch_axes that are not
        manual_axes and outside of blocks over `axis`: it is then summed and scattered at once,
        after the last tick (ZeRO's second stage, arXiv:1910.02054, section 5.2). The zeros of
        frozen parameters are sharded likewise.

      Memory against time:
      schedule: A name of `schedules.names()`, or a Schedule for as many ranks and microbatches. The
        default, like `"chimera"`, has the least idle time, but its step holds two copies of the
        layers' parameters and gradients; with `"dualpipev"` and the others a step holds one.
        `choose` ranks them for your model and memory.
      layers_per_stage: The number of layers of each of the schedule's stages, in model order; fewer
        for the last one, say, whose head takes time, too, or 0, so that it runs the head alone.
        Every rank allocates as many layers as the largest stage has. `"balanced"` takes the split
        with which the step is the fastest by simulation. Each kind of layer, the embedding and the
        head have the costs that `costs` gives, or else those counted from the model's functions;
        every process comes to the same split. None spreads the layers evenly, the first stages
        having one more if they do not divide.
      remat: Which values a block keeps for its backward: `"none"` recomputes nothing costly,
        `"block"` keeps the block's input only, a `jax.checkpoint` policy decides itself.

      Numerics:
      grad_dtype: The dtype of the gradients; None for that of each parameter.

      Rare:
      trainable: Which parameters get a gradient: a tree of bools whose leaves stand for whole
        branches of params, or a function from params to such a tree (as the masks of optax). For
        frozen parameters nothing is computed or kept, and their gradients are zeros; where
        overwrite selects a frozen parameter, the gradient is the parameter's own value.
      overwrite: Which parameters are overwritten by their gradients, as scales and histories of
        float8 are: a tree of bools or a function, as `trainable`; None: those under a key
        `"_overwrite_with_gradient"`, as in Flax's float8. The gradient of such a parameter is the
        largest new value over all microbatches and shards, neither added up nor scaled. A layer may
        use it once only, and none may be in `"shared"`.
      execution: How the order of the schedule becomes a program: see `Execution`. By default every
        choice is made by simulation at `costs`, the same on every platform.
      costs: The durations of actions, in any one unit of time. Actions are placed in ticks by them,
        so that ranks wait less for each other; a transfer is assumed to take a tenth of the
        forward. They must be the same in every process: measure them in one. None: the costs of a
        transformer, with those of recomputing if `remat` is not `"none"`; those counted, if layers
        are balanced.

    Returns:
      `grad_fn(params, batch, *, rng=None, loss_scale=None) -> (loss, grads)`; with `model.has_aux`,
      `((loss, metrics), grads)`; if blocks return metrics (`Aux`), `((loss, Metrics), grads)`, the
      metrics of blocks sharded over `axis` as their gradients are. `jax.grad` cannot differentiate
      it; it can differentiate `sequential`.

      - `params`: `{"ends": pytree, "blocks": pytree}`, every leaf of blocks `[num_layers, ...]` in
        model order, with any sharding; with `model.layout`, blocks is a dict of such stacks, one
        for each kind of layer, and num_layers counts the layers of that kind. Parameters that all
        blocks use are in `"shared": pytree`, and blocks read them as `ctx.shared`.
      - `batch`: A pytree of arrays `[B, ...]`; microbatch m is rows `[m B/N, (m+1) B/N)`.
      - `rng`: A key, or None.
      - `loss`: A scalar of at least float32.
      - `grads`: As params in structure, shapes and dtypes, accumulated in float32 or wider; float0
        zeros for integer leaves, as with `allow_int=True`. Gradients of blocks are sharded over
        `axis` if its size divides num_layers, else replicated: shard the parameters likewise from
        the start (`shardings`), and no update has to move them.
      - `loss_scale`: A positive scalar, for float16, in which small cotangents underflow: all
        cotangents are multiplied by it, and the accumulated gradients divided by it, so that it
        changes neither loss nor gradients. Gradients are not finite if scaled cotangents overflow:
        skip such a step, and lower the scale.

    Raises:
      ValueError: If an argument has a bad value; from grad_fn, when traced, if params, batch or
        the model's functions do not fit.
      TypeError: If an argument, or an output of a function of the model, has a wrong type.
    """
    axes = check_axes(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
    )
    options = convert_options(
        model, Options(param_specs, grad_specs, trainable, overwrite), manual_axes=manual_axes
    )
    grad_shardings = users_shardings(
        model, mesh=mesh, axis=axis, specs=param_specs if grad_specs is None else grad_specs
    )
    schedule = _schedule_for(schedule, mesh.shape[axis], num_microbatches)
    if not isinstance(execution, Execution):
        raise TypeError(
            f"execution={brief(execution)}: must be a dualpipe_jax.Execution, such as "
            "Execution(overlap=False); leave it out to have all decided for you"
        )
    block, recomputes = block_of(model, remat), remat != "none"
    _require_costs(costs)
    dtype = None if grad_dtype is None else _float_dtype(grad_dtype)
    sizes = stage_sizes(
        layers_per_stage,
        num_stages=schedule.num_stages,
        where=f" of schedule {schedule.name!r} over {schedule.num_ranks} ranks",
    )

    program = Training(schedule=schedule, execution=execution, costs=costs, recomputes=recomputes)
    build = Builder(
        model,
        axes=axes,
        program=program,
        layers_per_stage=sizes,
        block=block,
        **options._asdict(),
        grad_dtype=dtype,
    )
    return GradFunction(
        model=model,
        build=build,
        schedule=schedule,
        grad_dtype=dtype,
        shardings=grad_shardings,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class GradFunction:
    """Computes loss and gradients of (params, batch), as `value_and_grad` describes it.

    Attributes:
      model: The model.
      build: Gives the step for the arguments of a call.
      schedule: The schedule.
      grad_dtype: The dtype of gradients; None for that of each parameter.
      shardings: Of gradients in the user's own form, for a model of `from_loss`.
    """

    model: Model
    build: Builder
    schedule: Schedule
    grad_dtype: jnp.dtype | None
    shardings: PyTree = None
    # The name of `jax.jit(grad_fn)`'s program in logs and profiles.
    __name__ = "pipelined_value_and_grad"

    def __repr__(self) -> str:
        """Names the schedule, its ranks and its microbatches."""
        schedule = self.schedule
        return (
            f"<dualpipe_jax.value_and_grad: {schedule.name}, {schedule.num_ranks} ranks, "
            f"{schedule.num_microbatches} microbatches>"
        )

    def __call__(
        self,
        params: Params,
        batch: Batch,
        *,
        rng: jax.Array | None = None,
        loss_scale: float | Float[jax.Array, ""] | None = None,
    ) -> tuple[Any, Params]:
        """Returns `(loss, grads)`, or with metrics `((loss, metrics), grads)`."""
        call_checks.have_values(params=params, batch=batch)
        params, form = as_canonical(self.model, params)
        params, batch = call_checks.values(params, batch)
        loss_scale = call_checks.loss_scale(loss_scale)
        step = self.build(params, batch, rng)
        call_checks.grad_dtype(self.grad_dtype, params)
        with jax.named_scope(self._scope) if self._scope else nullcontext():
            result, grads = step(*without_derivative((params, batch)), rng, loss_scale)
        return form.result(without_derivative(result)), form.tree(grads, self.shardings)

    @property
    def _scope(self) -> str:
        """The schedule's name in the compiled program; "" if its name does not identify it."""
        schedule = self.schedule
        if not schedule.is_named:
            return ""
        return of_schedule(
            schedule.name,
            num_ranks=schedule.num_ranks,
            num_microbatches=schedule.num_microbatches,
        )

    def memory(self, params: Params, batch: Batch, *, rng: jax.Array | None = None) -> MemoryReport:
        """Adds up a step's memory on one device, without params and batch, and without compiling.

        Args:
          params: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          batch: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          rng: As for a call.

        Returns:
          A MemoryReport, in bytes; `print` it, or see its `terms` and its `execution`. It is for
          accelerators, whatever the devices of the mesh; a program for CPUs may hold more. The
          compiler decides in the end: `preflight` asks it.

        Raises:
          ValueError: As a call.
          TypeError: As a call.
        """
        reports = []

        def look(params: Params, batch: Batch, rng: Any) -> None:
            reports.append(self.build.traced(params, batch, rng).memory(params, batch, rng))

        params, _ = as_canonical(self.model, params)
        call_checks.arguments(params, batch, rng)
        jax.eval_shape(look, params, batch, rng)
        return reports[0]


def _schedule_for(schedule: str | Schedule, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes a named schedule, or requires a given one to fit the mesh and the microbatches."""
    if isinstance(schedule, str):
        return make(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches)
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule={brief(schedule)}: must be one of {names()}, or a Schedule")
    if schedule.program.forward_only:
        raise ValueError(
            f"schedule={schedule.name!r}: must have backwards; give every stage and microbatch its "
            "B, or its I and W (for forwards alone call dualpipe_jax.evaluate)"
        )
    if (schedule.num_ranks, schedule.num_microbatches) != (num_ranks, num_microbatches):
        raise ValueError(
            f"schedule={schedule.name!r}: must be made for the {num_ranks} devices of the mesh "
            f"axis and num_microbatches={num_microbatches}, but is for {schedule.num_ranks} ranks "
            f"and {schedule.num_microbatches} microbatches; make it for those, or pass its name"
        )
    return schedule


def _require_costs(costs: Any) -> None:
    if not isinstance(costs, Costs | None):
        raise TypeError(f"costs={brief(costs)}: must be a dualpipe_jax.Costs, or None")


def _float_dtype(dtype: DTypeLike) -> jnp.dtype:
    known = None
    # An array, or a scalar of NumPy, has a dtype, but is none.
    if not isinstance(dtype, jax.Array | np.ndarray | np.generic):
        with suppress(TypeError, ValueError, SyntaxError):  # NumPy parses texts
            known = jnp.dtype(dtype)
    if known is None or not jnp.issubdtype(known, jnp.inexact):
        raise ValueError(f"grad_dtype={brief(dtype)}: must be a floating-point dtype, or None")
    return known
