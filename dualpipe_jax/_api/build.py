"""Builds steps: from what the user named, and the arguments of a call, to the step to be run.

In: axes, a program, a model and its options. Out: `Builder`, which gives the step for each call.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax

from dualpipe_jax._api.programs import Forward, Training
from dualpipe_jax._executor import Step, context_mesh, platform_of
from dualpipe_jax._model import checks, returns, semantics
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Aux, AxisNames, Context, Mesh, Model, PyTree
from dualpipe_jax._schedule import stage_sizes
from dualpipe_jax._schedule.execution import Execution


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of the mesh, and what each is for."""

    mesh: Mesh
    axis: str
    batch_axes: tuple[str, ...]
    manual_axes: tuple[str, ...]

    @property
    def num_shards(self) -> int:
        """Shards of the batch."""
        return math.prod(self.mesh.shape[name] for name in self.batch_axes)


def checked(
    model: Model,
    *,
    mesh: Mesh,
    num_microbatches: int,
    axis: str,
    batch_axes: AxisNames,
    manual_axes: AxisNames,
) -> Axes:
    """Checks what steps of all kinds are given, and makes the axes of it.

    Raises:
      ValueError: If an argument has a bad value.
      TypeError: If it has a wrong type.
    """
    checks.is_model(model)
    checks.mesh_axis(mesh, axis)
    axes = Axes(
        mesh=mesh,
        axis=axis,
        batch_axes=checks.other_axes(mesh, axis, "batch_axes", batch_axes),
        manual_axes=checks.other_axes(mesh, axis, "manual_axes", manual_axes),
    )
    checks.positive_int("num_microbatches", num_microbatches)
    return axes


class Builder:
    """Checks the arguments of a call and gives the step for them.

    Called outside of any jit the step is jitted, once for each number of layers: as with `jax.jit`,
    what the model's functions read besides their arguments is read at the first call.
    """

    def __init__(
        self,
        model: Model,
        *,
        axes: Axes,
        program: Training | Forward,
        layers_per_stage: tuple[int, ...] | None = None,
        **options: Any,
    ):
        self._axes, self._program = axes, program
        self._layout, self._layers_per_stage = model.layout, layers_per_stage
        self._step = partial(
            Step, model=model, layers_per_stage=layers_per_stage, **vars(axes), **options
        )
        self._steps: dict[tuple[int, Execution], Callable[..., Any]] = {}

    @property
    def _mesh(self) -> Mesh:
        return context_mesh(like=self._axes.mesh) or self._axes.mesh

    def __call__(self, params: PyTree, batch: PyTree, rng: Any) -> Callable[..., Any]:
        """Gives the step, jitted outside of any jit."""
        checks.can_be_jitted()
        checks.on_devices_of(self._mesh, params=params, batch=batch)
        step = self.traced(params, batch, rng)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch, rng))):
            # Inside the user's jit: traced as part of it, as often as it is.
            return step
        return self._steps.setdefault((step.num_layers, step.execution), jax.jit(step))

    def traced(self, params: PyTree, batch: PyTree, rng: Any) -> Step:
        """Gives the step, to be traced."""
        axes, num_stages = self._axes, self._program.num_stages
        where = f" of the schedule over {axes.mesh.shape[axes.axis]} ranks"
        num_layers = checks.num_layers(params, self._layout, num_stages=num_stages, where=where)
        stage_sizes.require_sum(self._layers_per_stage, num_layers)
        layers_of_stage = self._layers_per_stage or stage_sizes.spread_evenly(
            num_layers, num_stages
        )
        execution = self._program.decided(layers_of_stage)
        if execution.overlap == "two-tick" and platform_of(self._mesh) == "tpu":
            raise ValueError(
                'execution=Execution(overlap="two-tick"): must not be used on TPUs, where a '
                "permute does not start until the rank that it sends to has come to it, so that "
                "every rank would wait for its neighbours in every tick, and a step take up to 1.5 "
                "times as long as its order needs, by simulation; leave overlap out, or pass False"
            )
        tables = self._program.tables(execution, layers_of_stage)
        checks.key(rng)
        checks.batch(
            batch,
            num_microbatches=tables.num_microbatches,
            num_shards=axes.num_shards,
            shards=", ".join(map(repr, axes.batch_axes)),
        )
        checks.batch_axes_named(batch, **vars(axes))
        step = self._step(num_layers=num_layers, tables=tables, execution=execution)
        if execution.unroll is True and not step.stages.has_equal_stages:
            raise ValueError(
                "execution=Execution(unroll=True): all stages must have the same kinds of layers "
                f"in the same order, but {num_layers} layers are spread over {num_stages} unlike "
                f"stages{where}; leave unroll out, or change the number of layers, "
                "layers_per_stage or the layout"
            )
        execution = replace(execution, unroll=step.stages.unrolled_by)
        return replace(
            step,
            execution=execution,
            placement=self._program.name_of(execution, layers_of_stage),
        )


def block_of(model: Model, remat: str | Callable[..., Any]) -> dict[Kind, Callable[..., Any]]:
    """Gives each kind's block one form, `(params, x, ctx) -> (x, Aux)`."""
    return {
        kind: _rematerialised(_of_one_form(model, kind), remat) for kind in _kinds.blocks_of(model)
    }


def _of_one_form(model: Model, kind: Kind) -> Callable[..., Any]:
    users_block = _kinds.blocks_of(model)[kind]

    def block(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
        y, aux = semantics.block_outputs(model, users_block(params, x, ctx))
        returns.require_same_x(x, y, name=_kinds.block_name(kind))
        return semantics.strong(y), aux

    return block


def _rematerialised(
    block: Callable[..., Any], remat: str | Callable[..., Any]
) -> Callable[..., Any]:
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
        f'remat={remat!r}: must be "none", "block" (True, or "full", elsewhere), or a policy of '
        "jax.checkpoint_policies"
    )
