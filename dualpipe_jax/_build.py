"""Builds steps: from what the user named, and the arguments of a call, to the step to be run.

In: axes, tables, a model and its options. Out: `Builder`, which gives the step for each call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from dualpipe_jax import _kinds, _microbatches, _outputs, _stage_sizes, _validate
from dualpipe_jax._executor import Step, context_mesh, platform_of
from dualpipe_jax._kinds import Kind
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._types import Aux, Context, Model, PyTree


@dataclass(frozen=True, kw_only=True)
class Axes:
    """What the axes of the mesh are for."""

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    axis: str
    batch_axes: tuple[str, ...]
    manual_axes: tuple[str, ...]

    @classmethod
    def checked(cls, mesh: Any, axis: Any, batch_axes: Any, manual_axes: Any) -> "Axes":
        """Makes it of what the user named."""
        _validate.mesh_axis(mesh, axis)
        return cls(
            mesh=mesh,
            axis=axis,
            batch_axes=_validate.other_axes(mesh, axis, "batch_axes", batch_axes),
            manual_axes=_validate.other_axes(mesh, axis, "manual_axes", manual_axes),
        )


class Builder:
    """Checks the arguments of a call and gives the step for them.

    Called outside of any jit the step is jitted, once for each number of layers: as with `jax.jit`,
    what the model's functions read besides their arguments is read at the first call.
    """

    def __init__(
        self,
        *,
        axes: Axes,
        tables_of: Callable[..., Tables],
        placement_of: Callable[[int], str] = lambda num_layers: "",
        has_full_backward: Callable[..., bool],
        **options: Any,
    ):
        self._axes, self._mesh, self._axis = axes, axes.mesh, axes.axis
        self._tables_of = tables_of
        self._placement_of = placement_of
        self._has_full_backward = has_full_backward
        # What cannot be compiled is refused here.
        full_backward = has_full_backward(on_cpu=self._is_on_cpu)
        self._num_stages = tables_of(full_backward=full_backward).num_stages
        self._layout = options["model"].layout
        self._layers_per_stage = options["layers_per_stage"]
        self._step = partial(
            Step,
            mesh=axes.mesh,
            axis=axes.axis,
            batch_axes=axes.batch_axes,
            manual_axes=axes.manual_axes,
            **options,
        )
        self._num_shards = int(
            np.prod([axes.mesh.shape[name] for name in axes.batch_axes], dtype=int)
        )
        self._shards = ", ".join(map(repr, axes.batch_axes))
        self._steps: dict[tuple[int, bool], Callable[..., Any]] = {}

    @property
    def _platform(self) -> str | None:
        return platform_of(context_mesh(like=self._mesh) or self._mesh)

    @property
    def _is_on_cpu(self) -> bool:
        return self._platform == "cpu"

    def __call__(self, params: PyTree, batch: PyTree, rng: Any) -> Callable[..., Any]:
        """Gives the step, jitted outside of any jit."""
        _validate.can_be_jitted()
        mesh = context_mesh(like=self._mesh) or self._mesh
        _validate.on_devices_of(mesh, params=params, batch=batch)
        step = self.traced(params, batch, rng)
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch, rng))):
            # Inside the user's jit: traced as part of it, as often as it is.
            return step
        return self._steps.setdefault((step.num_layers, step.full_backward), jax.jit(step))

    def traced(self, params: PyTree, batch: PyTree, rng: Any) -> Step:
        """Gives the step, to be traced."""
        num_stages, num_ranks = self._num_stages, self._mesh.shape[self._axis]
        where = f" of the schedule over {num_ranks} ranks"
        num_layers = _validate.num_layers(params, self._layout, num_stages=num_stages, where=where)
        _stage_sizes.require_sum(self._layers_per_stage, num_layers)
        full_backward = self._has_full_backward(on_cpu=self._is_on_cpu, num_layers=num_layers)
        tables = self._tables_of(full_backward=full_backward, num_layers=num_layers)
        if tables.is_lazy and self._platform == "tpu":
            raise ValueError(
                "timetable='two-tick': must not be used on TPUs, where a permute does not start "
                "until the rank that it sends to has come to it, so that every rank would wait for "
                "its neighbours in every tick, and a step take up to 1.5 times as long as its "
                "order needs, by simulation; leave timetable out, or pass 'shortest'"
            )
        num_microbatches = tables.num_microbatches
        _validate.key(rng)
        _validate.batch(
            batch,
            num_microbatches=num_microbatches,
            num_shards=self._num_shards,
            shards=self._shards,
        )
        axes = self._axes
        _validate.batch_axes_named(
            batch,
            axes.mesh,
            axis=axes.axis,
            batch_axes=axes.batch_axes,
            manual_axes=axes.manual_axes,
        )
        step = self._step(
            num_layers=num_layers,
            tables=tables,
            full_backward=full_backward,
            placement=self._placement_of(num_layers),
        )
        if step.unroll_layers and not step.layout.has_equal_stages:
            raise ValueError(
                f"unroll_layers=True: all stages must have the same kinds of layers in the same "
                f"order, but {num_layers} layers are spread over {num_stages} unlike stages"
                f"{where}; leave it None, or change the number of layers, layers_per_stage or the "
                "layout"
            )
        return step


def block_of(model: Model, remat: str | Callable[..., Any]) -> dict[Kind, Callable[..., Any]]:
    """Gives each kind's block one form, `(params, x, ctx) -> (x, Aux)`."""
    return {
        kind: _rematerialised(_of_one_form(model, kind), remat) for kind in _kinds.blocks_of(model)
    }


def _of_one_form(model: Model, kind: Kind) -> Callable[..., Any]:
    users_block = _kinds.blocks_of(model)[kind]

    def block(params: PyTree, x: PyTree, ctx: Context) -> tuple[PyTree, Aux]:
        y, aux = _microbatches.block_outputs(model, users_block(params, x, ctx))
        _outputs.require_same_x(x, y, name=_kinds.block_name(kind))
        return _microbatches.strong(y), aux

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
