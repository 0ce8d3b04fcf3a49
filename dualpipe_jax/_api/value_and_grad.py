"""Gradients: validate what the user gave, compile the schedule, build the step."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax import _scopes
from dualpipe_jax import schedules as _schedules
from dualpipe_jax._api.build import Builder, block_of, checked
from dualpipe_jax._api.programs import Training
from dualpipe_jax._api.sequential import sequential as sequential
from dualpipe_jax._executor import MemoryReport
from dualpipe_jax._model import checks, semantics
from dualpipe_jax._model import returns as _outputs
from dualpipe_jax._model.types import AxisNames, Mesh, Model, PyTree
from dualpipe_jax._predict import Costs, usual_costs
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import stage_sizes


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
    schedule: str | _schedules.Schedule = "dualpipe",
    layers_per_stage: Sequence[int] | None = None,
    remat: str | Callable[..., Any] = "none",
    grad_dtype: Any = None,
    trainable: PyTree | Callable[[PyTree], PyTree] = True,
    overwrite: PyTree | Callable[[PyTree], PyTree] | None = None,
    execution: Execution = Execution(),  # noqa: B008
    costs: Costs | None = None,
) -> "GradFunction":
    """Makes the pipelined `jax.value_and_grad` of a model's loss.

    The function equals `jax.value_and_grad(sequential(model, num_microbatches=...))` whatever the
    schedule, and runs as one program over the mesh. Call it inside your own `jax.jit`, next to the
    optimizer's update. DualPipe: DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437).

    Args:
      Needed, by `evaluate` and `apply` too, as are axis, batch_axes, manual_axes and param_specs:
      model: The model, as pure functions.
      mesh: The devices. Axes not named here are left to XLA's partitioner; inside the model's
        functions they are Auto axes, whatever they are outside. Where `jax.set_mesh` names a mesh
        with the same axes, its devices are taken instead; then an AbstractMesh will do.
      num_microbatches: Microbatches a step (on each shard of the batch), over both directions.

      Where things lie:
      axis: The mesh axis over which the layers are spread; its size is the number of ranks.
      batch_axes: Mesh axes over which the leading dim of the batch is sharded (data parallel).
      manual_axes: Mesh axes of which the model's functions use collectives by name (expert, tensor
        or sequence parallel): they are given a device's part of the parameters and, where the axis
        is one of batch_axes too, of the batch. JAX's check of varying values holds for them, as in
        `jax.shard_map`. Over an axis that is not one of batch_axes all devices must come to the
        same loss, weight and metrics.
      param_specs: How params lie over manual_axes: a tree of PartitionSpecs whose leaves stand for
        whole branches of params, the first entry in blocks being that of the layers' dim; None for
        the same on all devices. Leaves outside of blocks may lie over `axis` too, and any leaf over
        batch_axes that are not manual_axes (FSDP), but for the layers' dim: they are gathered once
        a step, and their gradients scattered alike. (docs/mesh_axes.md)
      grad_specs: How gradients lie: a tree as param_specs; None for as their parameters. Over more
        axes than its parameter, batch_axes that are not manual_axes and outside of blocks `axis`, a
        gradient is summed and scattered at once, after the last tick (ZeRO's second stage,
        arXiv:1910.02054, section 5.2). The zeros of frozen parameters lie as these.

      Memory against time:
      schedule: A name of `schedules.names()`, or a Schedule for as many ranks and microbatches. The
        default, like `"chimera"`, has the fewest idle devices, for which a step holds two copies of
        the layers' parameters and gradients; `"dualpipev"` and the others hold one. `choose` ranks
        them for your model and memory.
      layers_per_stage: How many layers each stage has, in model order, as many numbers as the
        schedule has stages; fewer for the last one, say, whose head takes time, too. Every rank
        gets room for as many layers as the fullest stage has. None spreads them evenly, the first
        stages getting one more if they do not divide.
      remat: What a block keeps for its backward: `"none"` recomputes nothing costly, `"block"`
        keeps its input only, a `jax.checkpoint` policy says itself.

      Numerics:
      grad_dtype: The dtype of the gradients; None for that of each parameter.

      Rare:
      trainable: Which parameters get a gradient: a tree of bools whose leaves stand for whole
        branches of params, or a function from params to one (as the masks of optax). For the others
        nothing is computed or kept, and their gradient is zeros; that of one that its gradient
        overwrites is itself.
      overwrite: Which parameters are overwritten by what comes as their gradient, such as the
        scales and histories of float8: a tree of bools or a function, as `trainable`; None for what
        lies under a key `"_overwrite_with_gradient"`, as Flax's float8 does. The largest of the new
        values of microbatches and shards is taken, neither added up nor scaled. Each is used once
        in a layer, and none may be in `"shared"`.
      execution: How the order of the schedule becomes a program: see `Execution`. By default all is
        decided for you, by simulation at `costs`, the same on every platform.
      costs: How long actions take, in any one unit of time, by which they are placed in ticks, so
        that ranks wait less for each other; a transfer is taken to be a tenth of the forward. As
        the program, they must be the same on every process: measure them on one. None: a
        transformer's, rematerialised if `remat` says so.

    Returns:
      `grad_fn(params, batch, *, rng=None, loss_scale=None) -> (loss, grads)`; with `model.has_aux`,
      `((loss, metrics), grads)`; if blocks give metrics (`Aux`), `((loss, Metrics), grads)`, those
      of blocks sharded over `axis` as their gradients are. It is not itself differentiable by
      `jax.grad`; `sequential` is.

      params: `{"ends": pytree, "blocks": pytree}`, every leaf of blocks `[num_layers, ...]` in
        model order, sharded in any way; with `model.layout`, blocks is a dict of such stacks, one
        for each kind of layer, and num_layers counts the layers of that kind. Parameters that all
        blocks use are `"shared": pytree`, and they see them as `ctx.shared`.
      batch: a pytree of arrays `[B, ...]`; microbatch m is rows `[m B/N, (m+1) B/N)`.
      rng: a key, or None.
      loss: a scalar of at least float32.
      grads: as params in structure, shapes and dtypes, accumulated in float32 or wider; float0
        zeros for integer leaves, as with `allow_int=True`. Gradients of blocks leave sharded over
        `axis` if num_layers divides by its size, else replicated: lay blocks so from the start
        (`shardings`), and no update has to move them.
      loss_scale: a positive number, or an array of one, for float16, whose range cotangents leave
        downwards: all of them are multiplied by it, and the gradients, once they are added up,
        divided. So neither loss nor gradients show it, but that gradients are not finite if
        cotangents left the range upwards: skip such a step, and lower the scale.

    Raises:
      ValueError: If an argument has a bad value; from grad_fn, when traced, if params, batch or
        the model's functions do not fit.
      TypeError: If an argument, or what a function of the model returns, has a wrong type.
    """
    axes = checked(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        axis=axis,
        batch_axes=batch_axes,
        manual_axes=manual_axes,
    )
    schedule = _schedule_for(schedule, mesh.shape[axis], num_microbatches)
    if not isinstance(execution, Execution):
        raise TypeError(f"execution={execution!r}: must be a dualpipe_jax.Execution")
    block, recomputes = block_of(model, remat), remat != "none"
    if costs is None:
        costs = usual_costs(recomputes=recomputes)
    elif not isinstance(costs, Costs):
        raise TypeError(f"costs={costs!r}: must be a dualpipe_jax.Costs, or None")
    dtype = None if grad_dtype is None else _float_dtype("grad_dtype", grad_dtype)
    build = Builder(
        model,
        axes=axes,
        program=Training(
            schedule=schedule, execution=execution, costs=costs, recomputes=recomputes
        ),
        layers_per_stage=stage_sizes(
            layers_per_stage,
            num_stages=schedule.num_stages,
            where=f" of schedule {schedule.name!r} over {schedule.num_ranks} ranks",
        ),
        block=block,
        param_specs=param_specs,
        grad_specs=grad_specs,
        trainable=trainable,
        overwrite=overwrite,
        grad_dtype=dtype,
    )
    return GradFunction(build=build, schedule=schedule, grad_dtype=dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class GradFunction:
    """What `value_and_grad` makes: a function of (params, batch), as described there."""

    build: Builder
    schedule: _schedules.Schedule
    grad_dtype: Any
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
        params, batch = semantics.as_arrays(params), semantics.as_arrays(batch)
        loss_scale = checks.loss_scale(loss_scale)
        step = self.build(params, batch, rng)
        checks.grad_dtype(self.grad_dtype, params)
        with jax.named_scope(self._scope) if self._scope else nullcontext():
            result, grads = step(params, batch, rng, loss_scale)
        return _outputs.without_derivative(result), grads

    @property
    def _scope(self) -> str:
        """The schedule's name in the compiled program, if it tells which one it is; "" if not."""
        made = self.schedule
        if not made.is_named:
            return ""
        return _scopes.of_schedule(
            made.name, num_ranks=made.num_ranks, num_microbatches=made.num_microbatches
        )

    def memory(
        self, params: PyTree, batch: PyTree, *, rng: jax.Array | None = None
    ) -> MemoryReport:
        """Adds up what a step holds on one device beside params and batch, without compiling it.

        Args:
          params: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          batch: As for a call; arrays, or `jax.ShapeDtypeStruct`s.
          rng: As for a call.

        Returns:
          A MemoryReport; `print` it, or see its `terms` and its `execution`. It tells of
          accelerators, whatever the devices of the mesh; XLA's compiler for CPUs may hold more. The
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
