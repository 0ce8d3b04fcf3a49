"""The settings of a step: a model, tables, a mesh, options; and all that follows from them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dualpipe_jax._executor.deliver import Delivery
from dualpipe_jax._executor.stages import Layout
from dualpipe_jax._leaves.explicit_axes import platform_of
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import Model, PyTree
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.ir import DEFERRED
from dualpipe_jax._schedule.tables import Tables


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Settings:
    """Holds the model, tables, mesh and options of a step.

    Attributes:
      model: The model.
      tables: What each rank does in each tick.
      mesh: The device mesh; axes not named here are left to XLA's partitioner. A mesh of the
        context (`jax.set_mesh`) with the same axes takes its place, on whatever devices it is.
      axis: The pipeline axis.
      batch_axes: The axes over which the batch's leading dim is sharded.
      manual_axes: The axes of which the model's functions use collectives by name.
      param_specs: How parameters lie over the axes: a tree as `_parameters.specs` takes it.
      grad_specs: How gradients do: a tree as `_parameters.specs_of_grads` takes it, or None.
      trainable: Which parameters get a gradient: a tree as `_parameters.wanted` takes it.
      overwrite: Which parameters their gradients overwrite: a tree as `_parameters.overwritten`
        takes it.
      block: For each kind of layer `(params, x, ctx) -> (x, aux)`, rematerialisation included.
      num_layers: The layers in `params["blocks"]`.
      layers_per_stage: The layers of each stage; None to spread them evenly.
      execution: How the tables are run, all decided but `unroll`, which the layout decides.
      grad_dtype: The dtype of gradients; None for that of each parameter.
      output: `(ends, x, ctx) -> outputs` in the place of head, in a forward-only program.
      placement: The name in the compiled program of how the tables were placed; "" for none.
      poison: Whether dead values are overwritten with values that spread, in tests.
    """

    model: Model
    tables: Tables
    mesh: Mesh | AbstractMesh
    axis: str
    block: dict[Kind, Callable[..., tuple[PyTree, Any]]]
    num_layers: int
    execution: Execution
    batch_axes: tuple[str, ...] = ()
    manual_axes: tuple[str, ...] = ()
    param_specs: PyTree = None
    grad_specs: PyTree = None
    trainable: PyTree = True
    overwrite: PyTree = None
    layers_per_stage: tuple[int, ...] | None = None
    grad_dtype: Any = None
    output: Callable[..., PyTree] | None = None
    placement: str = ""
    poison: bool = False

    @cached_property
    def layout(self) -> Layout:
        """Where the layers lie."""
        return Layout(
            axis=self.axis,
            kinds=_kinds.kinds_of(self.model, self.num_layers),
            num_stages=self.tables.num_stages,
            stage_of=np.asarray(self.tables.stage_of),
            layers_per_stage=self.layers_per_stage,
            unroll=self.execution.unroll,
        )

    @cached_property
    def delivery(self) -> Delivery | None:
        """Where outputs go; None without `output`."""
        return None if self.output is None else Delivery(axis=self.axis, tables=self.tables)

    @property
    def full_backward(self) -> bool:
        """Whether an input grad that its weight grad follows runs with it, without a slot."""
        return self.execution.split_backward is False

    @property
    def defers(self) -> bool:
        """Whether what deferred weight gradients need has slots of its own."""
        return DEFERRED in self.tables.num_slots

    @property
    def recomputes(self) -> bool:
        """Whether some weight gradients are deferred, and recompute what they need."""
        return self.defers and self.execution.deferred == "recompute"

    @property
    def platform(self) -> str | None:
        """The platform of the mesh's devices; None if it is not known."""
        return platform_of(self.mesh)

    @property
    def takes_turns(self) -> bool:
        """Whether the backwards of layers in a row are to wait for each other: `Rank.next_turn`."""
        named = {self.axis, *self.batch_axes, *self.manual_axes}
        leaves_none = all(n == 1 for axis, n in self.mesh.shape.items() if axis not in named)
        return self.platform == "cpu" and self.layout.is_unrolled and leaves_none

    @property
    def slots(self) -> dict[str, int]:
        """The slots of each buffer, with those that take what nobody wants."""
        slots = dict(self.tables.num_slots)
        slots["received"] += 1
        if self.full_backward:
            slots["stash"] = 0
        elif self.defers:
            # Every I writes a stash, be its W deferred.
            slots["stash"] = max(slots["stash"], 1)
        return slots

    @property
    def columns(self) -> tuple[str, ...]:
        """What a tick needs of the tables."""
        idle = {DEFERRED: not self.defers, "half": not self.tables.has_halves}
        idle["send"] = not (self.tables.send >= 0).any()
        return tuple(c for c in Tables.columns() if not idle.get(c))

    @property
    def num_shards(self) -> int:
        """Shards of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)
