"""The whole step as one program over the mesh: `program.run` on each device, under shard_map.

In: a model, tables, a mesh. Out: a function of (params, batch, rng), and a report of its memory.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dualpipe_jax._executor import finish, memory, program, work
from dualpipe_jax._executor import trace as trace
from dualpipe_jax._executor.functions import Arguments, Functions
from dualpipe_jax._executor.settings import Settings
from dualpipe_jax._leaves import specs as _parameters
from dualpipe_jax._leaves.explicit_axes import (
    context_mesh,
    explicit_axes,
    run_as_auto,
)
from dualpipe_jax._leaves.pick import pick
from dualpipe_jax._leaves.plan import Plan, by_kind
from dualpipe_jax._model import kinds as _kinds
from dualpipe_jax._model import semantics
from dualpipe_jax._model import varying as _varying
from dualpipe_jax._model.types import PyTree

# A model's functions as one device runs them, and avals of their arguments.
Traced = tuple[Functions, Arguments]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Step(Settings):
    """The step of one model, schedule and mesh: a function of (params, batch, rng)."""

    def __call__(
        self,
        params: PyTree,
        batch: PyTree,
        rng: jax.Array | None,
        loss_scale: jax.Array | None = None,
    ) -> tuple[Any, PyTree]:
        """Runs the step; `loss_scale` is a factor of all cotangents, and so of the gradients.

        Returns:
          The loss, with metrics if the model gives any, and the gradients, a tree like `params`;
          None for a forward-only program. With `output` the outputs, and None.
        """
        mesh = context_mesh(like=self.mesh)
        if mesh is not None and mesh != self.mesh:
            return replace(self, mesh=mesh)(params, batch, rng, loss_scale)
        with jax.named_scope(self.placement) if self.placement else nullcontext():
            return self._call(params, batch, rng, loss_scale)

    def _call(
        self, params: PyTree, batch: PyTree, rng: jax.Array | None, loss_scale: jax.Array | None
    ) -> tuple[Any, PyTree]:
        given, blocks = params, params["blocks"]
        wanted = _parameters.wanted(params, self.trainable)
        overwritten = _parameters.overwritten(params, self.overwrite)
        plan = self._plan(params, wanted, overwritten)
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
        result = semantics.result(self.model, loss, metrics, of_blocks)
        if grads is None:
            return result, None
        grads = {**grads, "blocks": _kinds.in_order_of(self.model, blocks, grads["blocks"])}
        return result, finish.as_parameters(
            given, wanted, overwritten, grads, self.grad_dtype, loss_scale
        )

    def _plan_of(self, params: PyTree) -> Plan:
        return self._plan(
            params,
            _parameters.wanted(params, self.trainable),
            _parameters.overwritten(params, self.overwrite),
        )

    def _plan(
        self, params: PyTree, wanted: dict[str, list[bool]], overwritten: dict[str, list[bool]]
    ) -> Plan:
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

    def memory(
        self,
        params: PyTree,
        batch: PyTree,
        rng: jax.Array | None,
        traces: "dict[bool, Traced] | None" = None,
    ) -> memory.MemoryReport:
        """Adds up what the step holds on one device beside its arguments; avals will do.

        Steps of one model that differ in nothing but their schedule may share their `traces`.
        """
        mesh = context_mesh(like=self.mesh)
        if mesh is not None and mesh != self.mesh:
            return replace(self, mesh=mesh).memory(params, batch, rng, traces)
        plan = self._plan_of(params)
        params = {**params, "blocks": _kinds.stacks_of(self.model, params["blocks"])}
        traced, arguments = self._shared(traces, params, batch, rng, plan)
        outside = [
            leaf
            for part, tree in arguments.outside.items()
            for leaf in pick(tree, arguments.wanted[part])
        ]
        return memory.report(
            traced,
            self.layout,
            self.tables,
            slots=self.slots,
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
            execution=replace(self.execution, unroll=self.layout.unrolled_by),
            recomputes=self.recomputes,
            rounds=self.platform == "tpu",
        )

    def work(
        self,
        params: PyTree,
        batch: PyTree,
        rng: jax.Array | None,
        traces: "dict[bool, Traced] | None" = None,
        recomputes: bool | None = None,
    ) -> work.Work:
        """Counts what the step's actions compute on one device; avals will do.

        `traces` are as for `memory`; `recomputes` says whether deferred weight gradients count as
        if they recomputed, None as they do.
        """
        mesh = context_mesh(like=self.mesh)
        if mesh is not None and mesh != self.mesh:
            return replace(self, mesh=mesh).work(params, batch, rng, traces, recomputes)
        plan = self._plan_of(params)
        params = {**params, "blocks": _kinds.stacks_of(self.model, params["blocks"])}
        traced, arguments = self._shared(traces, params, batch, rng, plan, recomputes)
        return self._inside(lambda: work.count(traced, arguments, self.layout), self.mesh)

    def _shared(
        self,
        traces: "dict[bool, Traced] | None",
        params: PyTree,
        batch: PyTree,
        rng: Any,
        plan: Plan,
        recomputes: bool | None = None,
    ) -> Traced:
        recomputes = self.recomputes if recomputes is None else recomputes
        traces = {} if traces is None else traces
        if recomputes not in traces:
            traces[recomputes] = self._traced(params, batch, rng, plan, self.mesh, recomputes)
        return traces[recomputes]

    def _inside(self, trace: Callable[[], Any], mesh: Any) -> Any:
        """Traces where JAX keeps the types of varying values."""
        outer = {self.axis, *self.batch_axes} - set(self.manual_axes)
        return _varying.inside(trace, mesh=mesh, outer=outer, manual=self.manual_axes)

    def _traced(
        self,
        params: PyTree,
        batch: PyTree,
        rng: Any,
        plan: Plan,
        mesh: Any,
        recomputes: bool,
    ) -> Traced:
        """Traces the model's functions as one device runs them."""

        def trace() -> Traced:
            arguments = self._arguments(params, batch, rng, plan)
            traced = tracing.trace(
                self.model,
                self.block,
                arguments,
                forward_only=self.tables.forward_only,
                output=self.output,
                recomputes=recomputes,
                hidden_axes={self.axis, *self.batch_axes} - set(self.manual_axes),
            )
            return traced, arguments

        return self._inside(trace, mesh)

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
        traced, _ = self._traced(params, batch, rng, plan, mesh, self.recomputes)
        replicated = PartitionSpec()
        specs = jax.tree.leaves(
            plan.over_mesh(plan.gathers), is_leaf=lambda s: isinstance(s, PartitionSpec)
        )
        in_specs = jax.tree.unflatten(jax.tree.structure(params), specs)
        grads_specs = None
        if not self.tables.forward_only:
            grads_specs = plan.of_wanted(plan.over_mesh(plan.scatters))
        return jax.shard_map(
            partial(program.run, self, traced, plan),
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
