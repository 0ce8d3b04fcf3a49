"""Builds steps: from a model, its options and the arguments of a call to the step that runs.

In: mesh axes, a program, a model and its options. Out: `Builder`, which gives each call its step.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import jax

from dualpipe_jax._api.count_costs import costs_of
from dualpipe_jax._api.programs import StepProgram, StepTables
from dualpipe_jax._errors import brief
from dualpipe_jax._executor import Step, context_mesh, platform_of
from dualpipe_jax._leaves.specs import StepAxes
from dualpipe_jax._model import call_checks, checks, semantics
from dualpipe_jax._model.kinds import Kind, block_name, blocks_of
from dualpipe_jax._model.returns import require_same_x
from dualpipe_jax._model.types import (
    Aux,
    AxisNames,
    Batch,
    Block,
    Context,
    Mesh,
    Model,
    Params,
    PyTree,
    Remat,
)
from dualpipe_jax._predict import (
    TRANSFER,
    Costs,
    Placement,
    StageLayers,
    balance,
    weights_by_kind,
)
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import BALANCED, require_sum, spread_evenly


def check_axes(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str,
    batch_axes: AxisNames,
    manual_axes: AxisNames,
) -> StepAxes:
    """Checks the arguments that steps of all kinds have in common, and returns their axes.

    Raises:
      ValueError: If an argument has a bad value.
      TypeError: If it has a wrong type.
    """
    checks.is_model(model)
    checks.mesh_axis(mesh, axis)
    axes = StepAxes(
        mesh=mesh,
        axis=axis,
        batch_axes=checks.other_axes(mesh, axis, "batch_axes", batch_axes),
        manual_axes=checks.other_axes(mesh, axis, "manual_axes", manual_axes),
    )
    checks.positive_int("num_microbatches", num_microbatches)
    return axes


class Builder:
    """Checks the arguments of a call and gives its step.

    Outside of any jit the step is jitted, once for each number of layers: as with `jax.jit`, values
    that the model's functions read besides their arguments are read at the first call.
    """

    def __init__(
        self,
        model: Model,
        *,
        axes: StepAxes,
        program: StepProgram,
        layers_per_stage: tuple[int, ...] | Literal["balanced"] | None = None,
        **options: Any,
    ):
        self._axes, self._program = axes, program
        self._layout, self._layers_per_stage = model.layout, layers_per_stage
        if program.costs is not None:
            weights_by_kind(program.costs.layer, model.layout)  # or raises
        self._step = partial(Step, model=model, **vars(axes), **options)
        self._counted: dict[Hashable, Costs] = {}
        self._jitted_steps: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, params: Params, batch: Batch, rng: jax.Array | None) -> Callable[..., Any]:
        """Gives the step; outside of any jit, a jitted one."""
        call_checks.can_be_jitted()
        call_checks.on_devices_of(self._mesh, params=params, batch=batch)
        step = self.traced(params, batch, rng)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch, rng))):
            # The user's jit traces the step as part of its program.
            return step
        key = step.layers_per_stage, step.execution, step.placement
        return self._jitted_steps.setdefault(key, jax.jit(step))

    def traced(self, params: Params, batch: Batch, rng: jax.Array | None) -> Step:
        """Gives the step of these arguments, to be called under a trace.

        The layers of `params` are divided into stages, the program is compiled for these stages,
        and the step runs its tables.

        Args:
          params: The parameters, as for `value_and_grad`; arrays or avals.
          batch: The batch, the same.
          rng: A key, or None.

        Raises:
          ValueError: If the arguments do not fit the program, the mesh or one another.
          TypeError: If a leaf is no array, or rng no key.
        """
        axes, num_stages = self._axes, self._program.schedule.num_stages
        where = f" of the schedule over {axes.mesh.shape[axes.axis]} ranks"
        given = self._layers_per_stage
        num_layers = call_checks.num_layers(
            params, self._layout, num_stages=1 if given else num_stages, where=where
        )
        call_checks.key(rng)
        call_checks.batch(
            batch,
            num_microbatches=self._program.schedule.num_microbatches,
            num_shards=axes.num_shards,
            shards=", ".join(map(repr, axes.batch_axes)),
        )
        call_checks.batch_axes_named(batch, **vars(axes))

        layers, costs = self._layers(num_layers, params, batch, rng)
        compiled = self._program.compiled(layers, costs)
        self._require_platform(compiled.execution)
        step = self._made(layers, compiled)
        if compiled.execution.unroll is True and not step.stages.can_unroll:
            raise ValueError(
                "execution=Execution(unroll=True): all stages must have the same kinds of layers "
                f"in the same order, as far as they go, but {num_layers} layers are spread over "
                f"{num_stages} unlike stages{where}; leave unroll out, or change the number of "
                "layers, layers_per_stage or the layout"
            )
        execution = replace(compiled.execution, unroll=step.stages.unrolled_by)
        placement = ""
        if compiled.costs is not None:
            placement = Placement(costs=compiled.costs, layers=layers, execution=execution).name
        return replace(step, execution=execution, placement=placement)

    def _made(self, layers: StageLayers, compiled: StepTables) -> Step:
        """Makes a step of compiled tables."""
        return self._step(
            num_layers=sum(layers.sizes),
            layers_per_stage=layers.sizes,
            tables=compiled.tables,
            execution=compiled.execution,
        )

    def _layers(
        self, num_layers: int, params: Params, batch: Batch, rng: jax.Array | None
    ) -> tuple[StageLayers, Costs]:
        """Divides the layers into stages, as the user says or by their costs."""
        program, sizes = self._program, self._layers_per_stage
        costs = program.costs or program.usual_costs()
        if sizes == BALANCED:
            costs = program.costs or self._count(num_layers, params, batch, rng)
        weights = weights_by_kind(costs.layer, self._layout)
        if sizes == BALANCED:
            sizes = balance(
                program.schedule,
                program.execution,
                costs=costs,
                transfer=TRANSFER * costs.forward,
                num_layers=num_layers,
                layer_weights=weights,
            )
        require_sum(sizes, num_layers)
        sizes = sizes or spread_evenly(num_layers, program.schedule.num_stages)
        return StageLayers.cut(sizes, weights), costs

    def _count(self, num_layers: int, params: Params, batch: Batch, rng: jax.Array | None) -> Costs:
        """Counts the costs of the model's functions for arguments of these shapes."""
        leaves, structure = jax.tree.flatten((params, batch))
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._counted:
            program, num_ranks = self._program, self._axes.mesh.shape[self._axes.axis]
            sizes = spread_evenly(num_layers, program.schedule.num_stages)
            layers = StageLayers.cut(sizes)
            step = self._made(layers, program.compiled(layers, program.usual_costs()))
            found = []
            jax.eval_shape(lambda *args: found.append(step.work(*args)), params, batch, rng)
            usual = program.usual_costs()
            self._counted[key] = costs_of(found[0], num_ranks=num_ranks) or usual
        return self._counted[key]

    @property
    def _mesh(self) -> Mesh:
        return context_mesh(like=self._axes.mesh) or self._axes.mesh

    def _require_platform(self, execution: Execution) -> None:
        """Refuses two-tick transfers on TPUs."""
        if execution.overlap == "two-tick" and platform_of(self._mesh) == "tpu":
            raise ValueError(
                'execution=Execution(overlap="two-tick"): must not be used on TPUs, where a '
                "permute does not start before the receiving rank has come to it, so that every "
                "rank would wait for its neighbours in every tick, and a step would take up to 1.5 "
                "times as long as its order needs, by simulation; leave overlap out, or pass False"
            )


def block_of(model: Model, remat: Remat) -> dict[Kind, Callable[..., tuple[PyTree, Aux]]]:
    """Gives each kind's block in one form, `(params, x, ctx) -> (x, Aux)`, rematerialised."""
    check_remat(remat)
    return {
        kind: _rematerialised(_with_aux(model, kind, block), remat)
        for kind, block in blocks_of(model).items()
    }


def check_remat(remat: Any) -> None:
    """Requires a value of `remat=`.

    Raises:
      ValueError: If it is none.
    """
    is_name = isinstance(remat, str) and remat in ("none", "block")
    if not (is_name or callable(remat)):
        raise ValueError(
            f'remat={brief(remat)}: must be "none", "block" (which other libraries call True or '
            '"full"), or a policy of jax.checkpoint_policies'
        )


def _with_aux(model: Model, kind: Kind, users_block: Block) -> Callable[..., tuple[PyTree, Aux]]:
    def block(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
        y, aux = semantics.block_outputs(model, users_block(params, x, ctx))
        require_same_x(x, y, name=block_name(kind))
        return semantics.strong(y), aux

    return block


def _rematerialised(
    block: Callable[..., tuple[PyTree, Aux]], remat: Remat
) -> Callable[..., tuple[PyTree, Aux]]:
    if remat == "none":
        return block
    if remat == "block":
        return jax.checkpoint(block)
    assert callable(remat)
    policy = remat

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return policy(*args, **kwargs)
        except TypeError as error:
            raise TypeError(
                f"remat={brief(policy)}: cannot be called as a policy of "
                "jax.checkpoint_policies; if it makes a policy of its arguments, call it first"
            ) from error

    return jax.checkpoint(block, policy=checked)


@jax.custom_jvp
def without_derivative(tree: PyTree) -> PyTree:
    """Returns arguments or results of a pipelined step unchanged, and refuses `jax.grad`.

    Results too, because a function of the model may close over a value that `jax.grad` varies.
    """
    return tree


@without_derivative.defjvp
def _refuse_derivative(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "jax.grad of a pipelined step: dualpipe_jax.value_and_grad gives the gradient already, and "
        "dualpipe_jax.evaluate is the forward alone; for jax.grad take "
        "dualpipe_jax.sequential(model, num_microbatches=...)"
    )
