"""The whole step as one program: shard_map, parameters in, the tables run, sums and gradients out.

In: a model, tables, a mesh. Out: a function of (params, batch, rng) that runs every tick of the
tables in one `lax.scan`; program size does not depend on their length. The straight-line steady
state will be a second segment beside that scan.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dualpipe_jax import _microbatches, _validate
from dualpipe_jax._executor import registers
from dualpipe_jax._executor.explicit import explicit_axes, run_as_auto, sharding_like
from dualpipe_jax._executor.layout import Layout
from dualpipe_jax._executor.tick import Rank, State, make_tick
from dualpipe_jax._schedule.ir import DEFERRED, Tables
from dualpipe_jax._split_vjp import is_differentiable, split_vjp
from dualpipe_jax._types import Model, PyTree


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Step:
    """Builds the step of one model, schedule and mesh.

    Attributes:
      model: The model.
      tables: What each rank does in each tick.
      mesh: The device mesh; axes not named here are left to XLA's partitioner.
      axis: The pipeline axis.
      batch_axes: The axes over which the batch's leading dim is sharded.
      block: `(params, x, ctx) -> (x, aux)`, rematerialisation included.
      num_layers: The layers in `params["blocks"]`.
      poison: Whether dead values are overwritten with values that spread, in tests.
    """

    model: Model
    tables: Tables
    mesh: jax.sharding.Mesh
    axis: str
    batch_axes: tuple[str, ...]
    block: Callable[..., tuple[PyTree, Any]]
    num_layers: int
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
    def num_deferred(self) -> int:
        """Slots for what deferred weight gradients recompute from; 0 if none does."""
        return self.tables.num_slots.get(DEFERRED, 0)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a tick needs of the tables."""
        return tuple(c for c in Tables.columns() if c != DEFERRED or self.num_deferred)

    @property
    def num_shards(self) -> int:
        """Shards of the batch."""
        return math.prod(self.mesh.shape[axis] for axis in self.batch_axes)

    def __call__(self, params: PyTree, batch: PyTree, rng: jax.Array | None) -> tuple[Any, PyTree]:
        """Runs the step.

        Returns:
          The loss (with `has_aux` and the metrics), and the gradients in accumulation dtype, a
          list of leaves for the differentiable leaves of each of `ends` and `blocks`; None for a
          forward-only program.
        """
        args = params["ends"], params["blocks"], batch, rng
        if not explicit_axes(self.mesh):
            return self._shard_mapped(*args, mesh=self.mesh)
        out_shardings = self._out_shardings(params)
        return run_as_auto(self._shard_mapped, *args, mesh=self.mesh, out_shardings=out_shardings)

    def _shard_mapped(
        self,
        ends: PyTree,
        blocks: PyTree,
        batch: PyTree,
        rng: Any,
        *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> Any:
        """Runs the step on a mesh of Auto axes, or on that of the context."""
        blocks_spec = PartitionSpec(self.axis) if self.layout.is_sharded else PartitionSpec()
        replicated = PartitionSpec()
        grads_spec = {"ends": replicated, "blocks": blocks_spec}
        return jax.shard_map(
            self._run,
            mesh=mesh,
            in_specs=(replicated, blocks_spec, PartitionSpec(self.batch_axes or None), replicated),
            out_specs=(replicated, None if self.tables.forward_only else grads_spec),
            axis_names={self.axis, *self.batch_axes},
            check_vma=False,
        )(ends, blocks, batch, rng)

    def _out_shardings(self, params: PyTree) -> Any:
        """Shardings of the results over Explicit axes: gradients lie as their parameters do."""
        replicated = NamedSharding(self.mesh, PartitionSpec())
        if self.tables.forward_only:
            return replicated, None
        leads = {"ends": None, "blocks": self.axis if self.layout.is_sharded else None}
        mine = (self.axis, *self.batch_axes)
        return replicated, {
            part: [
                sharding_like(leaf, mesh=self.mesh, without=mine, lead=lead)
                for leaf in jax.tree.leaves(params[part])
                if is_differentiable(leaf)
            ]
            for part, lead in leads.items()
        }

    def _run(self, ends: PyTree, blocks: PyTree, batch: PyTree, rng: Any) -> tuple[Any, PyTree]:
        """The program of one device."""
        batches = _microbatches.split(batch, self.tables.num_microbatches)
        rank, state, weight = self._start(ends, blocks, batches, rng)
        num_ranks = self.tables.num_ranks
        table = np.stack([getattr(self.tables, name) for name in self.columns], axis=-1)
        rows = lax.dynamic_index_in_dim(
            jnp.asarray(table, jnp.int32), lax.axis_index(self.axis), axis=1, keepdims=False
        )
        tick = make_tick(rank, num_ranks=num_ranks, wraps=self.tables.wraps)

        def scan_body(state: State, row: jax.Array) -> tuple[State, None]:
            return tick(state, dict(zip(self.columns, row, strict=True))), None

        state, _ = lax.scan(scan_body, state, rows)
        return self._finish(rank, state, weight)

    def _start(
        self, ends: PyTree, blocks: PyTree, batches: PyTree, rng: Any
    ) -> tuple[Rank, State, Any]:
        """Brings the parameters to their ranks, splits the block, and makes empty buffers."""
        model, tables, layout = self.model, self.tables, self.layout
        chunks = layout.fetch(blocks)
        shard = lax.axis_index(self.batch_axes) if self.num_shards > 1 else None

        layer, microbatch = jax.eval_shape(
            lambda *trees: registers.read(trees, 0), chunks[0], batches
        )
        outs = _validate.outputs(model, ends, layer, microbatch, rng, shard)
        split = (
            None
            if tables.forward_only
            else split_vjp(self.block, layer, outs.x, outs.ctx, recomputes=self.num_deferred > 0)
        )
        weight = _microbatches.total_weight(model, batches)
        if weight is not None and self.batch_axes:
            weight = lax.psum(weight, self.batch_axes)
        count = tables.num_microbatches * self.num_shards
        seed_dtype = _microbatches.accumulator_dtype(outs.loss.dtype)
        # d loss / d head: 1 / count, or 1 / total weight; d loss / d aux: 1 / count.
        loss_seed = 1 / (jnp.asarray(count) if weight is None else weight).astype(seed_dtype)
        rank = Rank(
            model=model,
            layout=layout,
            split=split,
            block=self.block,
            chunks=chunks,
            ends=ends,
            microbatches=batches,
            rng=rng,
            shard=shard,
            loss_seed=loss_seed,
            aux_seed=None if outs.aux is None else jnp.asarray(1 / count, outs.aux.dtype),
            x=outs.x,
            num_deferred=self.num_deferred,
            poison=self.poison,
        )
        loss, aux, metrics = _microbatches.zeros_for_sum((outs.loss, outs.aux, outs.metrics))
        slots, layers = tables.num_slots, layout.max_layers

        def buffers(name: str) -> PyTree:
            avals = () if split is None else getattr(split, name)
            count = slots[name]
            if self.num_deferred:
                # Every I writes a stash and what is deferred; one of them to where nobody reads.
                count = {"stash": max(count, 1), DEFERRED: count + 1}.get(name, count)
            return registers.allocate(avals, count, layers, poison=self.poison)

        nothing = registers.allocate(outs.x, poison=self.poison)
        state = State(
            received=registers.allocate(outs.x, slots["received"] + 1, poison=self.poison),
            residual=buffers("residual"),
            weight_residual=buffers("weight_residual"),
            stash=buffers("stash"),
            deferred=buffers(DEFERRED) if self.num_deferred else (),
            block_grads=[]
            if split is None
            else [
                layout.zero_grads(
                    [
                        leaf
                        for leaf, has in zip(jax.tree.leaves(chunk), split.has_grad, strict=True)
                        if has
                    ]
                )
                for chunk in chunks
            ],
            ends_grads=[]
            if split is None
            else _microbatches.zeros_for_sum(
                [leaf for leaf in jax.tree.leaves(ends) if is_differentiable(leaf)]
            ),
            loss=loss,
            aux=aux,
            metrics=metrics,
            from_left=nothing,
            from_right=nothing,
        )
        return rank, state, weight

    def _finish(self, rank: Rank, state: State, weight: Any) -> tuple[Any, PyTree]:
        """Sums over ranks and shards, and brings the layers' gradients back to their places."""
        everywhere = (self.axis, *self.batch_axes)
        sums = state.loss, state.aux, state.metrics
        loss, aux, metrics = lax.psum(sums, everywhere)
        count = self.tables.num_microbatches * self.num_shards
        result = _microbatches.result(self.model, loss, aux, metrics, weight, count)
        if rank.split is None:
            return result, None
        ends_grads = lax.psum(state.ends_grads, everywhere)
        block_grads = self.layout.collect(state.block_grads)
        if self.batch_axes:
            block_grads = lax.psum(block_grads, self.batch_axes)
        # Leaves without a gradient of their own get zeros.
        grads = iter(block_grads)
        leaves = jax.tree.leaves(rank.chunks[0])
        size = self.layout.shard_layers
        blocks = [
            next(grads) if has else jnp.zeros((size, *leaf.shape[1:]), leaf.dtype)
            for leaf, has in zip(leaves, rank.split.has_grad, strict=True)
            if is_differentiable(leaf)
        ]
        return result, {"ends": ends_grads, "blocks": blocks}
