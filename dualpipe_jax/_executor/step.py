"""Makes the whole step one program over the mesh: `program.run` on each device, under shard_map.

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

from dualpipe_jax._executor import program
from dualpipe_jax._executor.memory import MemoryReport, report_memory
from dualpipe_jax._executor.rank import Settings
from dualpipe_jax._executor.trace import Arguments, Functions, trace
from dualpipe_jax._executor.work import Work, count_work
from dualpipe_jax._leaves.explicit_axes import (
    context_mesh,
    explicit_axes,
    run_as_auto,
)
from dualpipe_jax._leaves.leaf import Leaf, make_leaves
from dualpipe_jax._leaves.specs import StepAxes
from dualpipe_jax._model import semantics, varying
from dualpipe_jax._model.kinds import (
    parts_of,
    put_stacks,
    stacks_of,
    unwrap_stacks,
    with_values,
)
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.stage_sizes import spread_evenly

# A model's functions as one device runs them, and avals of their arguments.
Traced = tuple[Functions, Arguments]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Step(Settings):
    """Runs the step of one model, schedule and mesh: a function of (params, batch, rng)."""

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
        step = self._in_context
        with jax.named_scope(step.placement) if step.placement else nullcontext():
            return step._run(params, batch, rng, loss_scale)

    @property
    def _in_context(self) -> "Step":
        """The step over the mesh of the context, if that has the same axes."""
        mesh = context_mesh(like=self.mesh)
        return self if mesh in (None, self.mesh) else replace(self, mesh=mesh)

    def _run(
        self, params: PyTree, batch: PyTree, rng: jax.Array | None, loss_scale: jax.Array | None
    ) -> tuple[Any, PyTree]:
        leaves = self._leaves_of(params)
        args = self._by_kind(params), batch, rng, loss_scale
        run = partial(self._shard_mapped, leaves=self._by_kind(leaves))
        if explicit_axes(self.mesh):
            out_shardings = self._out_shardings(args[0], self._by_kind(leaves))
            out = run_as_auto(run, *args, mesh=self.mesh, out_shardings=out_shardings)
        else:
            out = run(*args, mesh=self.mesh)
        result, (block_metrics, grads) = out
        if self.output is not None:
            return result, None
        loss, metrics = result
        result = semantics.result(
            self.model, loss, metrics, unwrap_stacks(self.model, block_metrics)
        )
        if grads is None:
            return result, None
        parts = parts_of(params)
        grads = {**grads, "blocks": put_stacks(self.model, parts["blocks"], grads["blocks"])}
        finish = partial(Leaf.finish, dtype=self.grad_dtype, loss_scale=loss_scale)
        return result, with_values(params, jax.tree.map(finish, leaves, parts, grads))

    def _leaves_of(self, params: PyTree) -> PyTree:
        """Makes the record of every leaf."""
        return make_leaves(
            params,
            StepAxes(
                mesh=self.mesh,
                axis=self.axis,
                batch_axes=self.batch_axes,
                manual_axes=self.manual_axes,
            ),
            trainable=self.trainable,
            overwrite=self.overwrite,
            param_specs=self.param_specs,
            grad_specs=self.grad_specs,
        )

    def _by_kind(self, tree: PyTree) -> dict[str, PyTree]:
        """Converts the blocks of a tree like params to stacks by kind, whatever the model."""
        parts = parts_of(tree)
        return {**parts, "blocks": stacks_of(self.model, parts["blocks"])}

    def memory(
        self,
        params: PyTree,
        batch: PyTree,
        rng: jax.Array | None,
        traces: dict[bool, Traced] | None = None,
    ) -> MemoryReport:
        """Counts the bytes that the step holds on one device beside its arguments; avals will do.

        Steps of one model that differ in nothing but their schedule may share their `traces`.
        """
        step = self._in_context
        functions, arguments = step._shared(traces, params, batch, rng, step.recomputes)
        report = partial(
            report_memory,
            functions,
            arguments,
            step.stages,
            step.tables,
            slots=step.slots,
            on_host=step.on_host(functions),
            layers_per_stage=step.layers_per_stage
            or spread_evenly(step.num_layers, step.tables.num_stages),
            execution=replace(step.execution, unroll=step.stages.unrolled_by),
            recomputes=step.recomputes,
            rounds=step.platform == "tpu",
        )
        return step._inside(report, step.mesh)  # where XLA shards a value, it lies as it is

    def work(
        self,
        params: PyTree,
        batch: PyTree,
        rng: jax.Array | None,
        traces: dict[bool, Traced] | None = None,
        recomputes: bool | None = None,
    ) -> Work:
        """Counts the work of the step's actions on one device; avals will do.

        `traces` are as for `memory`; `recomputes` says whether deferred weight gradients count as
        if they recomputed, None as they do.
        """
        step = self._in_context
        recomputes = step.recomputes if recomputes is None else recomputes
        traced, arguments = step._shared(traces, params, batch, rng, recomputes)
        return varying.inside(
            lambda: count_work(traced, arguments, step.stages.kinds),
            mesh=step.mesh,
            outer=step._hidden_axes.union(step.manual_axes),
            manual=(),
        )

    def _shared(
        self,
        traces: dict[bool, Traced] | None,
        params: PyTree,
        batch: PyTree,
        rng: Any,
        recomputes: bool,
    ) -> Traced:
        """Traces the functions, or takes the trace with this `recomputes`."""
        leaves = self._by_kind(self._leaves_of(params))
        traces = {} if traces is None else traces
        if recomputes not in traces:
            params = self._by_kind(params)
            traces[recomputes] = self._traced(params, batch, rng, leaves, self.mesh, recomputes)
        return traces[recomputes]

    @property
    def _hidden_axes(self) -> set[str]:
        """The axes that no function of the model may name."""
        return {self.axis, *self.batch_axes} - set(self.manual_axes)

    def _inside(self, build: Callable[[], Any], mesh: Any) -> Any:
        """Traces where JAX keeps the types of varying values."""
        return varying.inside(build, mesh=mesh, outer=self._hidden_axes, manual=self.manual_axes)

    def _traced(
        self, params: PyTree, batch: PyTree, rng: Any, leaves: PyTree, mesh: Any, recomputes: bool
    ) -> Traced:
        """Traces the model's functions as one device runs them."""

        def build() -> Traced:
            arguments = self._arguments(params, batch, rng, leaves)
            functions = trace(
                self.model,
                self.block,
                arguments,
                forward_only=self.tables.forward_only,
                output=self.output,
                recomputes=recomputes,
                hidden_axes=self._hidden_axes,
            )
            return functions, arguments

        return self._inside(build, mesh)

    def _shard_mapped(
        self,
        params: PyTree,
        batch: PyTree,
        rng: Any,
        loss_scale: Any,
        *,
        leaves: PyTree,
        mesh: Mesh | AbstractMesh | None = None,
    ) -> Any:
        """Runs the step on a mesh of Auto axes, or on that of the context.

        Returns:
          The loss and the head's metrics, or outputs; and the blocks' metrics by kind, and the
          gradients.
        """
        functions, _ = self._traced(params, batch, rng, leaves, mesh, self.recomputes)
        in_specs = jax.tree.map(lambda leaf: leaf.in_spec, leaves)
        grads_specs = None
        if not self.tables.forward_only:
            grads_specs = jax.tree.map(lambda leaf: leaf.out_spec, leaves)
        replicated = PartitionSpec()
        return jax.shard_map(
            partial(program.run, self, functions),
            mesh=mesh,
            in_specs=(in_specs, PartitionSpec(self.batch_axes or None), replicated, replicated),
            out_specs=(self._result_spec(), (self.stages.specs, grads_specs)),
            axis_names={self.axis, *self.batch_axes, *self.manual_axes},
            check_vma=False,
        )(params, batch, rng, loss_scale)

    def _arguments(self, params: PyTree, batch: PyTree, rng: Any, leaves: PyTree) -> Arguments:
        """Makes avals of the arguments of the model's functions on one device."""
        loss_axes = tuple(name for name in self.batch_axes if name in self.manual_axes)
        rows = self.tables.num_microbatches * self.num_shards

        def microbatch(leaf: Any) -> Any:
            plain = jax.ShapeDtypeStruct((leaf.shape[0] // rows, *leaf.shape[1:]), leaf.dtype)
            return varying.aval(plain, loss_axes)

        avals = jax.tree.map(Leaf.local_aval, leaves, params)
        shard = jax.ShapeDtypeStruct((), np.int32)
        return Arguments(
            outside={part: tree for part, tree in avals.items() if part != "blocks"},
            layers=avals["blocks"],
            microbatch=jax.tree.map(microbatch, batch),
            rng=None if rng is None else varying.aval(rng),
            shard=varying.aval(shard, loss_axes) if self.num_shards > 1 else None,
            leaves=leaves,
            loss_axes=loss_axes,
        )

    def _out_shardings(self, params: PyTree, leaves: PyTree) -> Any:
        """Makes shardings of the results over Explicit axes."""
        explicit = explicit_axes(self.mesh)

        def over_explicit(spec: PartitionSpec) -> NamedSharding:
            lead = self.axis if self.axis in spec and self.axis in explicit else None
            return NamedSharding(self.mesh, PartitionSpec(lead))

        grads = None
        if not self.tables.forward_only:
            grads = jax.tree.map(partial(Leaf.grad_sharding, mesh=self.mesh), leaves, params)
        result = NamedSharding(self.mesh, self._result_spec(explicit))
        stacks = {kind: over_explicit(spec) for kind, spec in self.stages.specs.items()}
        return result, (stacks, grads)

    def _result_spec(self, axes: tuple[str, ...] | None = None) -> PartitionSpec:
        """Makes the spec of outputs, or of loss and metrics, over `axes`; None for all axes."""
        if self.delivery is None:
            return PartitionSpec()
        rows = (*self.batch_axes, *((self.axis,) if self.delivery.is_even else ()))
        return PartitionSpec(tuple(a for a in rows if axes is None or a in axes) or None)
