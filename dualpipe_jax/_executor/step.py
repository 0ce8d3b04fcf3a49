"""The whole step as one program: shard_map, parameters in, the tables run, sums and gradients out.

In: a model, tables, a mesh. Out: a function of (params, batch, rng) that runs every tick of the
tables in one `lax.scan`; program size does not depend on their length. The straight-line steady
state will be a second segment beside that scan.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax import _microbatches, _parameters, _varying
from dualpipe_jax._executor import functions, registers
from dualpipe_jax._executor.explicit import explicit_axes, run_as_auto, sharding_like
from dualpipe_jax._executor.functions import Arguments, Functions
from dualpipe_jax._executor.layout import Layout
from dualpipe_jax._executor.leaves import pick
from dualpipe_jax._executor.tick import Rank, State, make_tick
from dualpipe_jax._schedule.ir import Tables
from dualpipe_jax._types import Model, PyTree

# What a tick needs of the tables.
_COLUMNS = Tables.columns()


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Step:
    """Builds the step of one model, schedule and mesh.

    Attributes:
      model: The model.
      tables: What each rank does in each tick.
      mesh: The device mesh; axes not named here are left to XLA's partitioner.
      axis: The pipeline axis.
      batch_axes: The axes over which the batch's leading dim is sharded.
      manual_axes: The axes of which the model's functions use collectives by name.
      param_specs: How parameters lie over the manual axes: a tree as `_parameters.specs` takes it.
      trainable: Which parameters get a gradient: a tree as `_parameters.wanted` takes it.
      block: `(params, x, ctx) -> (x, aux)`, rematerialisation included.
      num_layers: The layers in `params["blocks"]`.
      poison: Whether dead values are overwritten with values that spread, in tests.
    """

    model: Model
    tables: Tables
    mesh: jax.sharding.Mesh
    axis: str
    block: Callable[..., tuple[PyTree, Any]]
    num_layers: int
    batch_axes: tuple[str, ...] = ()
    manual_axes: tuple[str, ...] = ()
    param_specs: PyTree = None
    trainable: PyTree = True
    poison: bool = False

    @cached_property
    def layout(self) -> Layout:
        """Where the layers lie."""
        return Layout(
            axis=self.axis,
            num_layers=self.num_layers,
            num_stages=self.tables.num_stages,
            stage_of=np.asarray(self.tables.stage_of),
        )

    @property
    def num_shards(self) -> int:
        """Shards of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    def __call__(self, params: PyTree, batch: PyTree, rng: jax.Array | None) -> tuple[Any, PyTree]:
        """Runs the step.

        Returns:
          The loss (with `has_aux` and the metrics), and the gradients in accumulation dtype: for
          each part of `params` a list with those of the leaves that get one. None for a
          forward-only program.
        """
        plan = self._plan(params)
        params = {part: params[part] for part in params}
        if not explicit_axes(self.mesh):
            return self._shard_mapped(params, batch, rng, plan=plan, mesh=self.mesh)
        return run_as_auto(
            partial(self._shard_mapped, plan=plan),
            params,
            batch,
            rng,
            mesh=self.mesh,
            out_shardings=self._out_shardings(params, plan),
        )

    def _plan(self, params: PyTree) -> "_Plan":
        return _Plan(
            wanted=_parameters.wanted(params, self.trainable),
            specs=_parameters.specs(
                params,
                self.param_specs,
                mesh=self.mesh,
                axis=self.axis,
                manual_axes=self.manual_axes,
            ),
            lead=self.axis if self.layout.is_sharded else None,
        )

    def _shard_mapped(
        self,
        params: PyTree,
        batch: PyTree,
        rng: Any,
        *,
        plan: "_Plan",
        mesh: jax.sharding.Mesh | None = None,
    ) -> Any:
        """Runs the step on a mesh of Auto axes, or on that of the context."""
        outer = {self.axis, *self.batch_axes} - set(self.manual_axes)
        traced = _varying.inside(
            lambda: functions.trace(
                self.model,
                self.block,
                self._arguments(params, batch, rng, plan),
                forward_only=self.tables.forward_only,
                hidden_axes=outer,
            ),
            mesh=mesh,
            outer=outer,
            manual=self.manual_axes,
        )
        replicated = PartitionSpec()
        in_specs = {
            part: jax.tree.unflatten(jax.tree.structure(params[part]), plan.over_mesh(part))
            for part in params
        }
        grads_specs = {part: pick(plan.over_mesh(part), plan.wanted[part]) for part in params}
        return jax.shard_map(
            partial(self._run, traced, plan),
            mesh=mesh,
            in_specs=(in_specs, PartitionSpec(self.batch_axes or None), replicated),
            out_specs=(replicated, None if self.tables.forward_only else grads_specs),
            axis_names={self.axis, *self.batch_axes, *self.manual_axes},
            check_vma=False,
        )(params, batch, rng)

    def _arguments(self, params: PyTree, batch: PyTree, rng: Any, plan: "_Plan") -> Arguments:
        """Says what the model's functions are given on one device."""
        loss_axes = tuple(name for name in self.batch_axes if name in self.manual_axes)

        def local(part: str) -> PyTree:
            leaves, structure = jax.tree.flatten(params[part])
            skip = int(part == "blocks")  # one layer, without the layers' dim
            avals = []
            for leaf, spec in zip(leaves, plan.specs[part], strict=True):
                shape = _parameters.local_shape(leaf.shape, spec, self.mesh)
                plain = jax.ShapeDtypeStruct(shape[skip:], leaf.dtype)
                # Where microbatches differ, a parameter's gradient does: it is summed once, last.
                avals.append(_varying.aval(plain, {*_parameters.axes_of(spec), *loss_axes}))
            return jax.tree.unflatten(structure, avals)

        rows = self.tables.num_microbatches * self.num_shards

        def microbatch(leaf: Any) -> Any:
            plain = jax.ShapeDtypeStruct((leaf.shape[0] // rows, *leaf.shape[1:]), leaf.dtype)
            return _varying.aval(plain, loss_axes)

        shard = None
        if self.num_shards > 1:
            shard = _varying.aval(jax.ShapeDtypeStruct((), np.int32), loss_axes)
        return Arguments(
            outside={part: local(part) for part in params if part != "blocks"},
            layer=local("blocks"),
            microbatch=jax.tree.map(microbatch, batch),
            rng=None if rng is None else _varying.aval(rng),
            shard=shard,
            wanted={
                "layer": plan.wanted["blocks"],
                "ends": plan.wanted["ends"],
                "shared": plan.wanted.get("shared", []),
            },
            loss_axes=loss_axes,
        )

    def _out_shardings(self, params: PyTree, plan: "_Plan") -> Any:
        """Shardings of the results over Explicit axes: gradients lie as their parameters do."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        if self.tables.forward_only:
            return replicated, None

        def sharding(part: str, leaf: Any, spec: PartitionSpec) -> NamedSharding:
            lead = plan.lead if part == "blocks" else None
            mine = {self.axis, *self.batch_axes} - set(_parameters.axes_of(spec))
            return sharding_like(leaf, mesh=self.mesh, without=tuple(mine), lead=lead)

        return replicated, {
            part: [
                sharding(part, leaf, spec)
                for leaf, spec, is_wanted in zip(
                    jax.tree.leaves(tree), plan.specs[part], plan.wanted[part], strict=True
                )
                if is_wanted
            ]
            for part, tree in params.items()
        }

    def _run(
        self, traced: Functions, plan: "_Plan", params: PyTree, batch: PyTree, rng: Any
    ) -> tuple[Any, PyTree]:
        """The program of one device."""
        batches = _microbatches.split(batch, self.tables.num_microbatches)
        rank, state, weight = self._start(traced, plan, params, batches, rng)
        num_ranks = self.tables.num_ranks
        table = np.stack([getattr(self.tables, name) for name in _COLUMNS], axis=-1)
        rows = lax.dynamic_index_in_dim(
            jnp.asarray(table, jnp.int32), lax.axis_index(self.axis), axis=1, keepdims=False
        )
        tick = make_tick(rank, num_ranks=num_ranks, wraps=self.tables.wraps)

        def scan_body(state: State, row: jax.Array) -> tuple[State, None]:
            return tick(state, dict(zip(_COLUMNS, row, strict=True))), None

        state, _ = lax.scan(scan_body, state, rows)
        return self._finish(rank, plan, state, weight)

    def _start(
        self, traced: Functions, plan: "_Plan", params: PyTree, batches: PyTree, rng: Any
    ) -> tuple[Rank, State, Any]:
        """Brings the parameters to their ranks, and makes empty buffers."""
        model, tables, layout = self.model, self.tables, self.layout
        outs, gradients = traced.outputs, traced.gradients
        split = None if gradients is None else gradients.block
        chunks = layout.fetch(params["blocks"])
        weight = _microbatches.total_weight(model, batches)
        if weight is not None and self.batch_axes:
            weight = lax.psum(weight, self.batch_axes)
        count = tables.num_microbatches * self.num_shards
        seed_dtype = _microbatches.accumulator_dtype(outs.loss.dtype)
        # d loss / d head: 1 / count, or 1 / total weight; d loss / d aux: 1 / count.
        loss_seed = 1 / (jnp.asarray(count) if weight is None else weight).astype(seed_dtype)
        rank = Rank(
            functions=traced,
            layout=layout,
            chunks=chunks,
            outside={part: tree for part, tree in params.items() if part != "blocks"},
            microbatches=batches,
            rng=rng,
            shard=lax.axis_index(self.batch_axes) if self.num_shards > 1 else None,
            loss_seed=loss_seed.astype(outs.loss.dtype),
            aux_seed=None if outs.aux is None else jnp.asarray(1 / count, outs.aux.dtype),
            poison=self.poison,
        )
        loss, aux, metrics = _microbatches.zeros_for_sum((outs.loss, outs.aux, outs.metrics))
        slots, layers = tables.num_slots, layout.max_layers

        def buffers(name: str) -> PyTree:
            avals = () if split is None else getattr(split, name)
            return registers.allocate(avals, slots[name], layers, poison=self.poison)

        nothing = registers.allocate(outs.x, poison=self.poison)
        state = State(
            received=registers.allocate(outs.x, slots["received"] + 1, poison=self.poison),
            residual=buffers("residual"),
            weight_residual=buffers("weight_residual"),
            stash=buffers("stash"),
            block_grads=[]
            if split is None
            else [
                layout.zero_grads(pick(chunk, split.has_grad[: len(jax.tree.leaves(chunk))]))
                for chunk in chunks
            ],
            outside_grads=[]
            if split is None
            else _microbatches.zeros_for_sum(pick(rank.outside, plan.wanted_outside)),
            loss=loss,
            aux=aux,
            metrics=metrics,
            from_left=nothing,
            from_right=nothing,
        )
        return rank, state, weight

    def _finish(self, rank: Rank, plan: "_Plan", state: State, weight: Any) -> tuple[Any, PyTree]:
        """Sums over ranks and shards, and brings the layers' gradients back to their places."""
        sums = state.loss, state.aux, state.metrics
        loss, aux, metrics = lax.psum(sums, (self.axis, *self.batch_axes))
        count = self.tables.num_microbatches * self.num_shards
        model = self.model
        result = _microbatches.result(model, loss, aux, metrics, weight, count)
        gradients = rank.functions.gradients
        if gradients is None:
            return result, None

        def axes(specs: Iterable[PartitionSpec], more: Iterable[tuple[str, ...]]) -> list[Any]:
            """The axes over which each gradient is summed: where its parameter is the same."""
            return [
                (*(name for name in self.batch_axes if name not in _parameters.axes_of(spec)), *own)
                for spec, own in zip(specs, more, strict=True)
            ]

        outside_axes = axes(pick(plan.specs_outside, plan.wanted_outside), gradients.reduce_axes)
        outside = _sums(state.outside_grads, [(self.axis, *each) for each in outside_axes])
        num_ends = sum(plan.wanted["ends"])
        # Leaves without a gradient of their own get zeros.
        leaves, specs = jax.tree.leaves(rank.chunks[0]), plan.specs["blocks"]
        has_grad = gradients.block.has_grad[: len(leaves)]
        own = gradients.block.reduce_axes[: gradients.num_of_layer]
        summed = _sums(self.layout.collect(state.block_grads), axes(pick(specs, has_grad), own))
        rest = iter(summed)
        size = self.layout.shard_layers
        blocks = [
            next(rest) if has else jnp.zeros((size, *leaf.shape[1:]), leaf.dtype)
            for leaf, has, is_wanted in zip(leaves, has_grad, plan.wanted["blocks"], strict=True)
            if is_wanted
        ]
        parts = {"ends": outside[:num_ends], "blocks": blocks, "shared": outside[num_ends:]}
        return result, {part: parts[part] for part in plan.wanted}


@dataclass(frozen=True, eq=False)
class _Plan:
    """How each leaf of each part of `params` is treated.

    Attributes:
      wanted: Whether it gets a gradient.
      specs: How it lies over the manual axes.
      lead: The axis over which the layers' dim of blocks lies, if it does.
    """

    wanted: dict[str, list[bool]]
    specs: dict[str, list[PartitionSpec]]
    lead: str | None

    def over_mesh(self, part: str) -> list[PartitionSpec]:
        """Lists the specs over all axes that the step names."""
        if part != "blocks":
            return self.specs[part]
        return [PartitionSpec(self.lead, *spec[1:]) for spec in self.specs[part]]

    @property
    def wanted_outside(self) -> list[bool]:
        """As `wanted`, of ends and shared together."""
        return [*self.wanted["ends"], *self.wanted.get("shared", [])]

    @property
    def specs_outside(self) -> list[PartitionSpec]:
        """As `specs`, of ends and shared together."""
        return [*self.specs["ends"], *self.specs.get("shared", [])]


def _sums(values: list[jax.Array], axes: list[tuple[str, ...]]) -> list[jax.Array]:
    """Sums each value over its axes, those with the same axes in one collective."""
    out = list(values)
    for over in set(axes) - {()}:
        places = [i for i, each in enumerate(axes) if each == over]
        for i, total in zip(places, lax.psum([values[i] for i in places], over), strict=True):
            out[i] = total
    return out
