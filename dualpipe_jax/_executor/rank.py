"""The settings of a step, and a rank as its actions see it: functions, parameters, microbatches."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from dualpipe_jax._executor import barriers, buffers
from dualpipe_jax._executor.buffers import RESIDUALS, Place
from dualpipe_jax._executor.deliver import Delivery
from dualpipe_jax._executor.offload import find_on_host
from dualpipe_jax._executor.stages import Layer, Stages
from dualpipe_jax._executor.trace import Functions, Gradients
from dualpipe_jax._leaves.explicit_axes import device_kind_of, platform_of
from dualpipe_jax._model import semantics
from dualpipe_jax._model.kinds import Kind, kinds_of
from dualpipe_jax._model.types import Context, Model, PyTree
from dualpipe_jax._schedule.actions import DEFERRED, Opcode
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.tables import Tables

Row = dict[str, jax.Array]  # this rank's row of the tables, int32 scalars


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Settings:
    """Holds the model, tables, mesh and options of a step, and all that follows from them.

    Attributes:
      model: The model.
      tables: The actions and slots of each rank in each tick.
      mesh: The device mesh; axes not named here are left to XLA's partitioner. A mesh of the
        context (`jax.set_mesh`) with the same axes takes its place, whatever its devices.
      axis: The pipeline axis.
      batch_axes: The axes over which the batch's leading dim is sharded.
      manual_axes: The axes that the model's functions name in collectives.
      param_specs: How parameters are sharded: this and the next three as `make_leaves` takes them.
      grad_specs: How gradients are sharded.
      trainable: Which parameters get a gradient.
      overwrite: Which parameters are overwritten by their gradients.
      block: For each kind of layer `(params, x, ctx) -> (x, aux)`, rematerialisation included.
      num_layers: The layers in `params["blocks"]`.
      layers_per_stage: The layers of each stage; None to spread them evenly.
      execution: How the tables are run, all decided but `unroll`, which `stages` decides.
      grad_dtype: The dtype of gradients; None for that of each parameter.
      output: `(ends, x, ctx) -> outputs` in the place of head, in a forward-only program.
      placement: The name that the compiled program has for the actions' placement; "" for none.
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

    def __post_init__(self) -> None:
        opcode, steady = self.tables.opcode, self.tables.steady
        in_ticks = opcode if steady is None else np.delete(opcode, steady.ticks, axis=0)
        split = Opcode.INPUT_GRAD, Opcode.WEIGHT_GRAD
        full = Opcode.BACKWARD, Opcode.BACKWARD_UPPER, Opcode.BACKWARD_LOWER
        others = split if self.full_backward else full
        assert not np.isin(in_ticks, others).any(), "the tables have backwards of the other form"

    @cached_property
    def stages(self) -> Stages:
        """Which layers each rank has."""
        return Stages(
            axis=self.axis,
            kinds=kinds_of(self.model, self.num_layers),
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
        """Whether an input grad runs with its weight grad, if that directly follows."""
        return self.execution.split_backward is False

    @property
    def defers(self) -> bool:
        """Whether deferred weight grads keep their operands in separate slots."""
        return DEFERRED in self.tables.num_slots

    @property
    def recomputes(self) -> bool:
        """Whether some weight grads are deferred, and recompute their operands."""
        return self.defers and self.execution.deferred == "recompute"

    @property
    def platform(self) -> str | None:
        """The platform of the mesh's devices; None if it is not known."""
        return platform_of(self.mesh)

    @property
    def takes_turns(self) -> bool:
        """Whether each layer's backward is to wait for the one before: `Rank.next_turn`."""
        named = {self.axis, *self.batch_axes, *self.manual_axes}
        leaves_none = all(n == 1 for axis, n in self.mesh.shape.items() if axis not in named)
        return self.platform == "cpu" and self.stages.is_unrolled and leaves_none

    @property
    def slots(self) -> dict[str, int]:
        """The slots of each buffer, with a spare one for values that nobody reads."""
        return self.tables.executed_slots(full_backward=self.full_backward)

    def on_host(self, functions: Functions) -> frozenset[Place]:
        """The values that wait in the host's memory."""
        if functions.gradients is None:
            return frozenset()
        return find_on_host(
            functions.gradients.block,
            self.stages,
            self.slots,
            slots_on_device=self.execution.slots_on_device,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the tables that a tick reads."""
        idle = {DEFERRED: not self.defers, "send": not (self.tables.send >= 0).any()}
        return tuple(c for c in Tables.columns() if not idle.get(c))

    @property
    def num_shards(self) -> int:
        """Shards of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    @property
    def runs_side_by_side(self) -> bool:
        """Whether a beat's F and I run side by side, on devices that can."""
        return self.platform != "cpu"

    @property
    def communicates(self) -> bool:
        """Whether the model's functions may have collectives of their own."""
        return bool(self.manual_axes)

    @property
    def device_kind(self) -> str | None:
        """The kind of the devices, such as "TPU v5 lite"; None if it is not known."""
        return device_kind_of(self.mesh)


@dataclass(frozen=True, eq=False, kw_only=True)
class Rank:
    """Holds all that the actions of one rank read beside its state.

    Attributes:
      functions: The model's functions.
      settings: The settings of the step.
      chunks: For each chunk and kind the layers' parameters and casts of them,
        `[max_layers, ...]`; with unrolled layers a tuple of these without the layers' dim.
      shared_casts: Casts of the shared parameters, for each kind.
      outside: `{"ends": ...}`, and `"shared"` where there is one: parameters outside the stack.
      microbatches: The batch, `[num_microbatches, ...]`.
      rng: The step's key, or None.
      shard: The index of this shard of the batch, or None if there is one only.
      loss_cotangent: The cotangent of each microbatch's loss, a scalar; None without a loss.
      aux_cotangent: The cotangent of each layer's aux loss, for each kind a scalar, or None.
    """

    functions: Functions
    settings: Settings
    chunks: list[dict[Kind, PyTree]]
    shared_casts: dict[Kind, list[jax.Array]]
    outside: dict[str, PyTree]
    microbatches: PyTree
    rng: jax.Array | None
    shard: jax.Array | None
    loss_cotangent: jax.Array | None
    aux_cotangent: dict[Kind, jax.Array | None]

    @property
    def stages(self) -> Stages:
        """The layers of each stage, and the stages of each rank."""
        return self.settings.stages

    @property
    def gradients(self) -> Gradients:
        """The derivatives of the model's functions, in a program that has them."""
        assert self.functions.gradients is not None
        return self.functions.gradients

    def context(self, row: Row, position: Any, *, is_layer: bool = False) -> Context:
        """Makes the context of a layer, or of embed or head, for the row's microbatch."""
        return semantics.context(
            semantics.take(self.microbatches, row["microbatch"]),
            semantics.microbatch_key(self.rng, row["microbatch"]),
            position,
            is_layer=is_layer,
            shard=self.shard,
        )

    def read_layer(self, row: Row, chunk: int, layer: Layer) -> tuple[PyTree, Context]:
        """Reads a layer's parameters, with the shared ones and the casts, and makes its context."""
        stack = self.chunks[chunk][layer.kind]
        if self.stages.is_unrolled:
            params, casts = stack[layer.entry]
        else:
            params, casts = buffers.read(stack, layer.entry)
        context = self.context(row, layer.position, is_layer=True)
        casts = [*casts, *self.shared_casts.get(layer.kind, [])]
        return ((params, self.outside.get("shared")), casts), context

    @property
    def stashes_in_beats(self) -> bool:
        """Whether the beats alone have stashes: W of all layers hides transfers there."""
        settings = self.settings
        is_full = settings.full_backward and settings.runs_side_by_side
        return is_full and not self.stages.is_unrolled

    # XLA's CPU compiler runs work that waits for nothing first: with unrolled layers, all that they
    # recompute. (Where it shards their values, picking an entry of one would gather it.)
    def first_turn(self, row: Row) -> jax.Array | None:
        """Makes the turn of the layer whose backward runs first: a zero that XLA does not know.

        None where layers take no turns.
        """
        if not self.settings.takes_turns:
            return None
        return jnp.minimum(row["microbatch"], 0)

    def in_turn(self, row: Row, turn: jax.Array | None) -> Row:
        """Makes the slots that a layer's backward reads known only when it is the layer's turn."""
        if turn is None:
            return row
        return {**row, **{name: row[name] + turn for name in (*RESIDUALS, DEFERRED) if name in row}}

    def next_turn(
        self, turn: jax.Array | None, layer: Layer, grads: list[Any], dx: Any = ()
    ) -> jax.Array | None:
        """Makes the turn of the next layer, known once this one's gradients and dx are made.

        Args:
          turn: This layer's turn.
          layer: The layer.
          grads: The sums of gradients of the layers of its kind.
          dx: Its dx.
        """
        if turn is None:
            return None
        return barriers.zero_after((dx, [total[layer.entry] for total in grads]), at=turn)
