"""The whole step as one program: shard_map, parameters in, the tables run, sums and gradients out.

In: a model, tables, a mesh. Out: a function of (params, batch, rng) that runs the tables in one
`lax.scan` over their ticks, and the straight-line run of beats, where they have one, in a scan of
its own that begins when its tick has come; program size does not depend on their lengths.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax import _kinds, _microbatches, _parameters, _varying
from dualpipe_jax._executor import collect, memory, tracing
from dualpipe_jax._executor.beat import make_run
from dualpipe_jax._executor.delivery import Delivery
from dualpipe_jax._executor.explicit import (
    context_mesh,
    device_kind_of,
    explicit_axes,
    platform_of,
    run_as_auto,
)
from dualpipe_jax._executor.functions import Arguments, Functions
from dualpipe_jax._executor.layout import Layout
from dualpipe_jax._executor.leaves import pick
from dualpipe_jax._executor.plan import Plan, by_kind
from dualpipe_jax._executor.rank import Rank, Row
from dualpipe_jax._executor.registers import when
from dualpipe_jax._executor.seeds import make_seeds
from dualpipe_jax._executor.start import empty_state
from dualpipe_jax._executor.state import State
from dualpipe_jax._executor.tick import make_tick, rows_of
from dualpipe_jax._kinds import Kind
from dualpipe_jax._schedule.ir import DEFERRED
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._types import Model, PyTree


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Step:
    """Builds the step of one model, schedule and mesh.

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
      unroll_layers: Whether a stage's layers are unrolled; None to leave it to their number.
      stash_deferred: Whether what has slots of its own for a deferred weight grad is its stash.
      full_backward: Whether an input grad that its weight grad follows runs with it, so that none
        but deferred ones have slots for what they need.
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
    batch_axes: tuple[str, ...] = ()
    manual_axes: tuple[str, ...] = ()
    param_specs: PyTree = None
    grad_specs: PyTree = None
    trainable: PyTree = True
    overwrite: PyTree = None
    layers_per_stage: tuple[int, ...] | None = None
    unroll_layers: bool | None = None
    stash_deferred: bool = False
    full_backward: bool = False
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
            unroll_layers=self.unroll_layers,
        )

    @cached_property
    def delivery(self) -> Delivery | None:
        """Where outputs go; None without `output`."""
        return None if self.output is None else Delivery(axis=self.axis, tables=self.tables)

    @property
    def defers(self) -> bool:
        """Whether what deferred weight gradients need has slots of its own."""
        return DEFERRED in self.tables.num_slots

    @property
    def recomputes(self) -> bool:
        """Whether some weight gradients are deferred, and recompute what they need."""
        return self.defers and not self.stash_deferred

    @property
    def _takes_turns(self) -> bool:
        """Whether the backwards of layers in a row are to wait for each other: `Rank.next_turn`."""
        named = {self.axis, *self.batch_axes, *self.manual_axes}
        leaves_none = all(n == 1 for axis, n in self.mesh.shape.items() if axis not in named)
        return platform_of(self.mesh) == "cpu" and self.layout.is_unrolled and leaves_none

    @property
    def _slots(self) -> dict[str, int]:
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

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        rng: jax.Array | None,
        loss_scale: jax.Array | None = None,
    ) -> tuple[Any, PyTree]:
        """Runs the step; `loss_scale` is a factor of all cotangents, and so of the gradients.

        Returns:
          The loss, with metrics if the model gives any, and the gradients in accumulation dtype:
          for each part of `params` a list with those of the leaves that get one. None for a
          forward-only program. With `output` the outputs, and None.
        """
        mesh = context_mesh(like=self.mesh)
        if mesh is not None and mesh != self.mesh:
            return replace(self, mesh=mesh)(params, batch, rng, loss_scale)
        with jax.named_scope(self.placement) if self.placement else nullcontext():
            return self._call(params, batch, rng, loss_scale)

    def _call(
        self, params: PyTree, batch: PyTree, rng: jax.Array | None, loss_scale: jax.Array | None
    ) -> tuple[Any, PyTree]:
        plan, blocks = self._plan(params), params["blocks"]
        # From here on the blocks of all models are stacks by kind.
        params = {**params, "blocks": _kinds.stacks_of(self.model, blocks)}
        if explicit_axes(self.mesh):
            result, (block_metrics, grads) = run_as_auto(
                partial(self._shard_mapped, plan=plan),
                params,
                batch,
                rng,
                loss_scale,
                mesh=self.mesh,
                out_shardings=self._out_shardings(params, plan),
            )
        else:
            result, (block_metrics, grads) = self._shard_mapped(
                params, batch, rng, loss_scale, plan=plan, mesh=self.mesh
            )
        if self.output is not None:
            return result, None
        (loss, metrics), of_blocks = result, _kinds.by_layout(self.model, block_metrics)
        result = _microbatches.result(self.model, loss, metrics, of_blocks)
        if grads is None:
            return result, None
        in_order = _kinds.in_order_of(self.model, blocks, grads["blocks"])
        return result, {**grads, "blocks": in_order}

    def _plan(self, params: PyTree) -> Plan:
        wanted = _parameters.wanted(params, self.trainable)
        overwritten = _parameters.overwritten(params, self.overwrite)
        named: dict[str, Any] = {
            "mesh": self.mesh,
            "axis": self.axis,
            "manual_axes": self.manual_axes,
            "batch_axes": self.batch_axes,
        }
        specs = _parameters.specs(params, self.param_specs, **named)
        specs_of_grads = _parameters.specs_of_grads(
            params, self.grad_specs, like=specs, wanted=wanted, **named
        )
        kinds = partial(by_kind, self.model, params["blocks"])
        from_axes = {self.axis, *self.batch_axes} - set(self.manual_axes)

        def dims(specs: dict[str, list[PartitionSpec]]) -> dict[str, Any]:
            over = {
                part: [_parameters.dims_over(spec, from_axes) for spec in each]
                for part, each in specs.items()
            }
            return {**over, "blocks": kinds(over["blocks"])}

        gathers, scatters = dims(specs), dims(specs_of_grads)
        specs = {
            part: [_parameters.without(spec, from_axes) for spec in each]
            for part, each in specs.items()
        }
        return Plan(
            mesh=self.mesh,
            axis=self.axis,
            batch_axes=self.batch_axes,
            manual_axes=self.manual_axes,
            wanted={**wanted, "blocks": kinds(wanted["blocks"])},
            overwritten={**overwritten, "blocks": kinds(overwritten["blocks"])},
            specs={**specs, "blocks": kinds(specs["blocks"])},
            gathers=gathers,
            scatters=scatters,
            leads={
                kind: self.axis if stack.is_sharded else None
                for kind, stack in self.layout.stacks.items()
            },
        )

    def memory(self, params: PyTree, batch: PyTree, rng: jax.Array | None) -> memory.MemoryReport:
        """Adds up what the step holds on one device beside its arguments; avals will do."""
        mesh = context_mesh(like=self.mesh)
        if mesh is not None and mesh != self.mesh:
            return replace(self, mesh=mesh).memory(params, batch, rng)
        plan = self._plan(params)
        params = {**params, "blocks": _kinds.stacks_of(self.model, params["blocks"])}
        traced, arguments = self._traced(params, batch, rng, plan, self.mesh)
        outside = [
            leaf
            for part, tree in arguments.outside.items()
            for leaf in pick(tree, arguments.wanted[part])
        ]
        return memory.report(
            traced,
            self.layout,
            self.tables,
            slots=self._slots,
            layers=arguments.layers,
            outside=outside,
            gathered=plan.gathered(
                {
                    **arguments.outside,
                    "blocks": {
                        kind: self.layout.stacks[kind].shard_avals(layer)
                        for kind, layer in arguments.layers.items()
                    },
                }
            ),
            is_apart=self.layout.is_unrolled,
            recomputes=self.recomputes,
            full_backward=self.full_backward,
            takes_turns=self._takes_turns,
            platform=platform_of(self.mesh),
        )

    def _traced(
        self, params: PyTree, batch: PyTree, rng: Any, plan: Plan, mesh: Any
    ) -> tuple[Functions, Arguments]:
        """Traces the model's functions as one device runs them."""
        outer = {self.axis, *self.batch_axes} - set(self.manual_axes)

        def trace() -> tuple[Functions, Arguments]:
            arguments = self._arguments(params, batch, rng, plan)
            traced = tracing.trace(
                self.model,
                self.block,
                arguments,
                forward_only=self.tables.forward_only,
                output=self.output,
                recomputes=self.recomputes,
                hidden_axes=outer,
            )
            return traced, arguments

        return _varying.inside(trace, mesh=mesh, outer=outer, manual=self.manual_axes)

    def _shard_mapped(
        self,
        params: PyTree,
        batch: PyTree,
        rng: Any,
        loss_scale: Any,
        *,
        plan: Plan,
        mesh: Mesh | AbstractMesh | None = None,
    ) -> Any:
        """Runs the step on a mesh of Auto axes, or on that of the context.

        Returns:
          The loss and the head's metrics, or outputs; and the blocks' metrics by kind, and the
          gradients.
        """
        traced, _ = self._traced(params, batch, rng, plan, mesh)
        replicated = PartitionSpec()
        specs = jax.tree.leaves(
            plan.over_mesh(plan.gathers), is_leaf=lambda s: isinstance(s, PartitionSpec)
        )
        in_specs = jax.tree.unflatten(jax.tree.structure(params), specs)
        grads_specs = None
        if not self.tables.forward_only:
            grads_specs = plan.of_wanted(plan.over_mesh(plan.scatters))
        return jax.shard_map(
            partial(self._run, traced, plan),
            mesh=mesh,
            in_specs=(in_specs, PartitionSpec(self.batch_axes or None), replicated, replicated),
            out_specs=(self._result_spec(), (self.layout.specs, grads_specs)),
            axis_names={self.axis, *self.batch_axes, *self.manual_axes},
            check_vma=False,
        )(params, batch, rng, loss_scale)

    def _arguments(self, params: PyTree, batch: PyTree, rng: Any, plan: Plan) -> Arguments:
        """Says what the model's functions are given on one device."""
        loss_axes, rows = plan.loss_axes, self.tables.num_microbatches * self.num_shards

        def microbatch(leaf: Any) -> Any:
            plain = jax.ShapeDtypeStruct((leaf.shape[0] // rows, *leaf.shape[1:]), leaf.dtype)
            return _varying.aval(plain, loss_axes)

        shard = None
        if self.num_shards > 1:
            shard = _varying.aval(jax.ShapeDtypeStruct((), np.int32), loss_axes)
        outside = [part for part in params if part != "blocks"]
        return Arguments(
            outside={part: plan.local_avals(params[part], plan.specs[part]) for part in outside},
            # One layer, without the layers' dim.
            layers={
                kind: plan.local_avals(stack, plan.specs["blocks"][kind], skip=1)
                for kind, stack in params["blocks"].items()
            },
            microbatch=jax.tree.map(microbatch, batch),
            rng=None if rng is None else _varying.aval(rng),
            shard=shard,
            wanted={"shared": [], **{part: plan.wanted[part] for part in outside}},
            wanted_of_layers=plan.wanted["blocks"],
            overwritten={"shared": [], **{part: plan.overwritten[part] for part in outside}},
            overwritten_of_layers=plan.overwritten["blocks"],
            loss_axes=loss_axes,
        )

    def _out_shardings(self, params: PyTree, plan: Plan) -> Any:
        """Shardings of the results over Explicit axes."""
        grads = None if self.tables.forward_only else plan.grad_shardings(params)
        result = NamedSharding(self.mesh, self._result_spec(explicit_axes(self.mesh)))
        return result, (plan.stack_shardings(), grads)

    def _result_spec(self, axes: tuple[str, ...] | None = None) -> PartitionSpec:
        """How outputs, or else loss and metrics, lie over those of `axes`; None for all axes."""
        if self.delivery is None:
            return PartitionSpec()
        rows = (*self.batch_axes, *((self.axis,) if self.delivery.is_even else ()))
        return PartitionSpec(tuple(a for a in rows if axes is None or a in axes) or None)

    def _run(
        self,
        traced: Functions,
        plan: Plan,
        params: PyTree,
        batch: PyTree,
        rng: Any,
        loss_scale: Any,
    ) -> tuple[Any, Any]:
        """The program of one device."""
        batches = _microbatches.split(batch, self.tables.num_microbatches)
        params = plan.gather(params)
        rank, state, weight = self._start(traced, plan, params, batches, rng, loss_scale)
        rows, steady = rows_of(self.tables, self.columns, self.axis), self.tables.steady
        tick = make_tick(rank, self.tables)
        if self.delivery is not None:
            none = dict.fromkeys(self.layout.stacks)
            return self._deliver(self.delivery, tick, state, rows), (none, None)
        if steady is None:
            state, _ = lax.scan(lambda state, row: (tick(state, row), None), state, rows)
            return self._finish(rank, plan, params, state, weight)

        # One scan over the ticks before and after the run, so that they stand in the program once.
        assert steady.first_tick > 0, "what the run's first backward reads is made before it"
        run = make_run(rank, steady, rows)
        ramp = np.delete(np.arange(self.tables.num_ticks), steady.ticks)

        def tick_or_run(state: State, row: Any) -> tuple[State, None]:
            is_before_run, row = row
            return when(is_before_run, run, tick(state, row)), None

        ramp_rows = {name: column[ramp] for name, column in rows.items()}
        is_before_run = jnp.asarray(ramp == steady.first_tick - 1)
        state, _ = lax.scan(tick_or_run, state, (is_before_run, ramp_rows))
        return self._finish(rank, plan, params, state, weight)

    def _deliver(
        self, delivery: Delivery, tick: Callable[..., State], state: State, rows: Row
    ) -> PyTree:
        """Runs all ticks, outputs moving on after each."""
        now, later = delivery.rows()

        def tick_and_move(state: State, row: tuple[Row, jax.Array]) -> tuple[State, None]:
            state = tick(state, row[0])
            assert state.mail is not None
            return state._replace(mail=delivery.move(state.mail, row[1])), None

        state, _ = lax.scan(tick_and_move, state, (rows, now))
        assert state.mail is not None
        return delivery.finish(state.mail, later)

    def _start(
        self,
        traced: Functions,
        plan: Plan,
        params: PyTree,
        batches: PyTree,
        rng: Any,
        loss_scale: Any,
    ) -> tuple[Rank, State, Any]:
        """Brings the parameters to their ranks, and makes empty buffers."""
        model, tables, layout = self.model, self.tables, self.layout
        chunks = [
            {kind: (stack, traced.casts(kind, stack)) for kind, stack in chunk.items()}
            for chunk in layout.fetch(params["blocks"])
        ]
        # Unrolled layers have arrays of their own: none is cut out of a stack again in every tick,
        # and none waits for another.
        is_apart = layout.is_unrolled
        if is_apart:
            chunks = [layout.unstack(chunk) for chunk in chunks]
        weight = None if self.output else _microbatches.total_weight(model, batches)
        if weight is not None:
            weight = _varying.sum_over(weight, self.batch_axes)
        count = tables.num_microbatches * self.num_shards
        loss_seed, aux_seed = make_seeds(
            traced.outputs, count=count, weight=weight, scale=loss_scale
        )
        rank = Rank(
            functions=traced,
            layout=layout,
            chunks=chunks,
            shared_casts={
                kind: traced.casts(kind, params.get("shared"), after=stack)
                for kind, stack in params["blocks"].items()
            },
            outside={part: tree for part, tree in params.items() if part != "blocks"},
            microbatches=batches,
            rng=rng,
            shard=lax.axis_index(self.batch_axes) if self.num_shards > 1 else None,
            loss_seed=loss_seed,
            aux_seed=aux_seed,
            delivery=self.delivery,
            full_backward=self.full_backward,
            defers=self.defers,
            takes_turns=self._takes_turns,
            interleaves=platform_of(self.mesh) != "cpu",
            communicates=bool(self.manual_axes),
            device_kind=device_kind_of(self.mesh),
            poison=self.poison,
        )
        state = empty_state(
            traced,
            layout,
            params,
            slots=self._slots,
            wanted=plan.wanted,
            delivery=self.delivery,
            is_lazy=tables.is_lazy,
            poison=self.poison,
        )
        return rank, state, weight

    def _finish(
        self, rank: Rank, plan: Plan, params: PyTree, state: State, weight: Any
    ) -> tuple[Any, Any]:
        """Sums over ranks and shards, and brings what belongs to layers back to their places."""
        sums = state.loss, state.aux, state.metrics
        loss, aux, metrics = _varying.sum_over(sums, (self.axis, *self.batch_axes))
        count = self.tables.num_microbatches * self.num_shards
        loss = _microbatches.loss_of_sums(loss, aux, weight, count)
        grads = None
        if not self.tables.forward_only:
            grads = collect.gradients(rank, plan, params, state)
        return (loss, metrics), (collect.block_metrics(rank, plan, state), grads)
