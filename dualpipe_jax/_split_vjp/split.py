"""Splits `jax.vjp` of a block into forward, input_grad and weight_grad.

In: a block as a pure function, and avals. Out: three functions and the avals of what passes
between them. As Qi et al., "Zero Bubble Pipeline Parallelism" (2023), section 2, for any block.

One trace holds the block and its vjp. Liveness divides it: what dx needs of the backward is the
input gradient, what only the parameters' gradients need is the weight gradient. Values that depend
on parameters, constants or the context alone are computed again wherever they are needed; the rest
of what crosses from one part to the next is chosen by a minimum cut in bytes.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp.capture import with_effects
from dualpipe_jax._split_vjp.chains import finish_chains
from dualpipe_jax._split_vjp.cond import inline_free
from dualpipe_jax._split_vjp.cut import CHEAP, CHEAP_LATER, REDUCTIONS, minimum_cut
from dualpipe_jax._split_vjp.for_compilers import may_wait, parts_of
from dualpipe_jax._split_vjp.graph import Node, When, evaluate, needed, read
from dualpipe_jax._split_vjp.memory_order import MemoryOrder, memory_orders
from dualpipe_jax._split_vjp.nested import split_nested
from dualpipe_jax._split_vjp.readers import find_casts, find_reads, find_rounded
from dualpipe_jax._split_vjp.shard_map import hoist_free
from dualpipe_jax._split_vjp.trace import Joint, is_differentiable, trace_joint
from dualpipe_jax._split_vjp.with_input_grad import part_early
from dualpipe_jax._split_vjp.working import working_bytes

PyTree = Any
Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True, kw_only=True)
class SplitVjp:
    """A block's forward and the two halves of its backward.

    Attributes:
      forward: `(params, x, ctx) -> (y, aux, residual, weight_residual)`. `residual` is what only
        the input gradient needs, `weight_residual` what the weight gradient needs (the input
        gradient may read both); tuples of arrays. `aux` is the block's Aux.
      input_grad: `(params, ctx, residual, weight_residual, dy, daux) -> (dx, stash, deferred,
        early)`; dy and dx are lists with an array for every floating-point leaf of x, daux is the
        aux loss's cotangent, or None, `stash` is what the weight gradient needs of the input
        gradient's work, `deferred` the same for a deferred one, which may recompute, and `early` a
        list of gradients for the leaves of params in which `is_early` is True.
      weight_grad: `(params, ctx, weight_residual, stash) -> late`, a list of gradients for the
        leaves of params in which `is_late` is True.
      deferred_weight_grad: `(params, ctx, weight_residual, deferred) -> late`, the same from less
        if it recomputes.
      residual: Avals of `residual`; so are `weight_residual`, `stash` and `deferred` of theirs.
      residual_parts: For each of `residual` in how many parts its readers take it; so are
        `weight_residual_parts`. See `for_compilers.parts_of`.
      residual_orders: For each of `residual` how it lies best in memory; so are
        `weight_residual_orders`.
      stash_may_wait: For each of `stash` whether a barrier may hold it up:
        `for_compilers.may_wait`.
      is_early: For every leaf of params, whether its gradient is made with the input gradient, by
        an equation that makes both. Where `is_late` holds too, the gradient is the sum of the two.
      is_late: For every leaf of params, whether its gradient waits for the weight grad's turn.
      is_sum: For every leaf of params, whether its gradient is a sum over several uses.
      reduce_axes: For every leaf of params, the mesh axes over which its gradient is still to be
        summed.
      casts: The leaves of params that the block casts to smaller dtypes, as (place, dtype): `cast`
        does it once for many calls; each of the functions takes `(params, casts)` for `params`.
      is_read: For every leaf of params, whether it is read other than to be cast.
      is_rounded: For every leaf of params, whether only contractions read it, as it is or moved,
        whose precision is left to the platform: TPUs have what these read rounded to bfloat16.
      working_bytes: An estimate of what one call of the largest part holds besides arguments and
        results: what its contractions and reductions make, as long as it is still to be read.
    """

    forward: Callable[..., tuple[PyTree, Any, Arrays, Arrays]]
    input_grad: Callable[..., tuple[list[jax.Array], Arrays, Arrays, list[jax.Array]]]
    weight_grad: Callable[..., list[jax.Array]]
    deferred_weight_grad: Callable[..., list[jax.Array]]
    residual: tuple[Any, ...]
    weight_residual: tuple[Any, ...]
    stash: tuple[Any, ...]
    deferred: tuple[Any, ...]
    residual_parts: tuple[int, ...]
    weight_residual_parts: tuple[int, ...]
    residual_orders: tuple[MemoryOrder, ...]
    weight_residual_orders: tuple[MemoryOrder, ...]
    stash_may_wait: tuple[bool, ...]
    is_early: tuple[bool, ...]
    is_late: tuple[bool, ...]
    is_sum: tuple[bool, ...]
    reduce_axes: tuple[tuple[str, ...], ...]
    casts: tuple[tuple[int, Any], ...]
    is_read: tuple[bool, ...]
    is_rounded: tuple[bool, ...]
    working_bytes: int

    def cast(self, leaves: Sequence[Any], places: range) -> list[jax.Array]:
        """Casts the leaves of params that stand at `places`."""
        casts = (c for c in self.casts if c[0] in places)
        return [leaves[i - places.start].astype(dtype) for i, dtype in casts]

    @property
    def has_grad(self) -> tuple[bool, ...]:
        """For every leaf of params, whether its gradient can be other than zero."""
        return tuple(map(operator.or_, self.is_early, self.is_late))


def split_vjp(
    block: Callable[..., tuple[PyTree, Aux]],
    params: PyTree,
    x: PyTree,
    ctx: PyTree,
    *,
    wanted: Sequence[bool] | None = None,
    recomputes: bool = False,
) -> SplitVjp:
    """Traces `block` once and splits its vjp.

    Args:
      block: `(params, x, ctx) -> (y, aux)`; y has the structure, shapes and dtypes of x; aux is an
        Aux, whose metrics have no gradient.
      params: The block's parameters, arrays or avals.
      x: The activation, arrays or avals.
      ctx: The context, arrays or avals; it has no cotangent.
      wanted: For every leaf of params whether it gets a gradient; None for all floating-point ones.
      recomputes: Whether deferred weight gradients are to recompute; else `deferred` is the stash.

    Returns:
      A SplitVjp.
    """
    if wanted is None:
        wanted = [is_differentiable(leaf) for leaf in jax.tree.leaves(params)]
    trace = trace_joint(block, params, x, ctx, wanted)
    graph = trace.graph
    inline_free(graph, [*trace.y, *trace.aux, *trace.metrics, *trace.dx, *trace.dparams])
    hoist_free(graph)
    nodes = split_nested(graph, trace.dx, only=When.BACKWARD)
    backward = [n for n in nodes if n.when is When.BACKWARD]
    # Not every gradient depends on the cotangents: a custom_vjp may make its own.
    has_grad = tuple(isinstance(v, int) and v not in graph.zeros for v in trace.dparams)
    sums = {v for n in nodes if n.name == "add_any" for v in n.outputs}
    for_dx = needed(backward, trace.dx)
    parts = [
        part_early(graph, backward, for_dx, v) if h and isinstance(v, int) else (None, None)
        for v, h in zip(trace.dparams, has_grad, strict=True)
    ]
    early = [v for v, _ in parts if v is not None]
    dparams = [v for _, v in parts if v is not None]
    for_dx = needed(backward, [*trace.dx, *early])
    ids = {id(n) for n in for_dx}
    stash = minimum_cut(
        backward,
        wanted=dparams,
        can_keep=lambda n: id(n) in ids or n.name in CHEAP | REDUCTIONS,
        can_redo=lambda n: id(n) not in ids,
        size=graph.num_bytes,
        is_free=lambda v: graph.when[v] is not When.BACKWARD,
        prefer_late=False,
    )
    input_nodes = needed(backward, [*trace.dx, *early, *stash])
    weight_nodes = needed(backward, dparams, known=stash)

    # Of the forward, the backward reads these; cheap steps from what is kept are run again.
    forward = [n for n in nodes if n.when is When.FORWARD]
    reads = {v for n in (*input_nodes, *weight_nodes) for v in n.reads}
    reads |= {v for v in (*trace.dx, *early, *dparams) if isinstance(v, int)}
    kept = minimum_cut(
        forward,
        wanted=[v for v in reads if graph.when[v] is When.FORWARD],
        can_keep=lambda _: True,
        can_redo=lambda n: n.name in CHEAP_LATER and not n.has_effect,
        size=graph.num_bytes,
        is_free=lambda v: graph.when[v] is not When.FORWARD,
        prefer_late=True,
    )
    known = [n for n in nodes if n.when is not When.BACKWARD]
    input_nodes = needed([*known, *input_nodes], [*trace.dx, *early, *stash], known=kept)
    weight_nodes = needed([*known, *weight_nodes], dparams, known={*kept, *stash})
    weight_residual = kept & ({v for n in weight_nodes for v in n.reads} | set(dparams))

    deferred, deferred_nodes = set(stash), weight_nodes
    if recomputes:
        # It may run everything again, from what is kept for it anyway and the fewest bytes besides:
        # the cotangents of the block's outputs, or less.
        again = needed([*known, *backward], dparams, known=kept)
        in_input_grad = {id(n) for n in input_nodes}
        deferred = minimum_cut(
            again,
            wanted=dparams,
            can_keep=lambda n: id(n) in in_input_grad,
            can_redo=lambda n: not n.has_effect,
            size=graph.num_bytes,
            is_free=lambda v: graph.when[v] is When.ALWAYS or v in weight_residual,
            prefer_late=True,
        )
        deferred_nodes = needed(again, dparams, known={*weight_residual, *deferred})
    return _assemble(
        trace,
        residual=tuple(sorted(kept - weight_residual)),
        weight_residual=tuple(sorted(weight_residual)),
        stash=tuple(sorted(stash)),
        deferred=tuple(sorted(deferred)),
        is_early=tuple(v is not None for v, _ in parts),
        is_late=tuple(v is not None for _, v in parts),
        is_sum=tuple(isinstance(v, int) and v in sums for v in trace.dparams),
        forward_nodes=finish_chains(
            graph,
            with_effects(nodes, needed(known, [*trace.y, *trace.aux, *trace.metrics, *kept])),
            kept,
        ),
        input_nodes=input_nodes,
        weight_nodes=weight_nodes,
        deferred_nodes=deferred_nodes,
        early=early,
        late=dparams,
        casts=find_casts(graph, trace.params, nodes),
    )


def _assemble(
    trace: Joint,
    *,
    residual: tuple[int, ...],
    weight_residual: tuple[int, ...],
    stash: tuple[int, ...],
    deferred: tuple[int, ...],
    is_early: tuple[bool, ...],
    is_late: tuple[bool, ...],
    is_sum: tuple[bool, ...],
    forward_nodes: list[Node],
    input_nodes: list[Node],
    weight_nodes: list[Node],
    deferred_nodes: list[Node],
    early: list[int],
    late: list[int],
    casts: dict[tuple[int, Any], list[int]],
) -> SplitVjp:
    """Makes the functions from their nodes."""
    avals = trace.graph.avals

    def given(params: PyTree) -> dict[int, Any]:
        """What is known of params, or of (params, casts)."""
        leaves = jax.tree.leaves(params)
        env = dict(zip(trace.params, leaves, strict=False))
        for values, array in zip(casts.values(), leaves[len(trace.params) :], strict=False):
            env.update(dict.fromkeys(values, array))
        return env

    def environment(params: PyTree, *groups: tuple[Sequence[int], Any]) -> dict[int, Any]:
        env = given(params)
        for values, arrays in groups:
            env.update(zip(values, arrays, strict=True))
        return env

    def forward(params: PyTree, x: PyTree, ctx: PyTree) -> Any:
        env = environment(
            params,
            (trace.x, jax.tree.leaves(x)),
            (trace.ctx, jax.tree.leaves(ctx)),
        )
        evaluate(forward_nodes, env)
        y = jax.tree.unflatten(trace.y_structure, [read(env, v) for v in trace.y])
        aux = Aux(
            loss=read(env, trace.aux[0]) if trace.aux else None,
            metrics=jax.tree.unflatten(
                trace.metrics_structure, [read(env, v) for v in trace.metrics]
            ),
        )
        return y, aux, tuple(env[v] for v in residual), tuple(env[v] for v in weight_residual)

    def input_grad(
        params: PyTree, ctx: PyTree, kept_here: Arrays, kept_longer: Arrays, dy: Any, daux: Any
    ) -> Any:
        env = environment(
            params,
            (trace.ctx, jax.tree.leaves(ctx)),
            (residual, kept_here),
            (weight_residual, kept_longer),
            (trace.dy, dy),
            (trace.daux, [] if daux is None else [daux]),
        )
        evaluate(input_nodes, env)
        dx = [read(env, v) for v in trace.dx]
        stashed, put_off = (tuple(env[v] for v in values) for values in (stash, deferred))
        return dx, stashed, put_off, [env[v] for v in early]

    def weight_grad_from(values: tuple[int, ...], nodes: list[Node]) -> Callable[..., Any]:
        def weight_grad(params: PyTree, ctx: PyTree, kept_longer: Arrays, arrays: Arrays) -> Any:
            env = environment(
                params,
                (trace.ctx, jax.tree.leaves(ctx)),
                (weight_residual, kept_longer),
                (values, arrays),
            )
            evaluate(nodes, env)
            return [env[v] for v in late]

        return jax.jit(weight_grad)

    def parts(values: tuple[int, ...]) -> tuple[int, ...]:
        outputs = (*trace.dx, *stash, *deferred, *early, *late)
        wanted = [v for v in outputs if isinstance(v, int)]
        return parts_of(trace.graph, [*input_nodes, *weight_nodes], values, wanted)

    readers = [*forward_nodes, *input_nodes, *weight_nodes]
    return SplitVjp(
        # Under jit each is traced once however many layers and branches call it.
        forward=jax.jit(forward),
        input_grad=jax.jit(input_grad),
        weight_grad=weight_grad_from(stash, weight_nodes),
        deferred_weight_grad=weight_grad_from(deferred, deferred_nodes),
        residual=tuple(avals[v] for v in residual),
        weight_residual=tuple(avals[v] for v in weight_residual),
        stash=tuple(avals[v] for v in stash),
        deferred=tuple(avals[v] for v in deferred),
        residual_parts=parts(residual),
        weight_residual_parts=parts(weight_residual),
        residual_orders=memory_orders(trace.graph, readers, residual),
        weight_residual_orders=memory_orders(trace.graph, readers, weight_residual),
        stash_may_wait=may_wait(input_nodes, stash, [*trace.dy, *trace.daux]),
        is_early=is_early,
        is_late=is_late,
        is_sum=is_sum,
        reduce_axes=tuple(trace.reduce_axes),
        casts=tuple(casts),
        is_read=find_reads(trace.params, casts, readers),
        is_rounded=find_rounded(trace.params, readers),
        working_bytes=max(
            working_bytes(trace.graph, forward_nodes, {*residual, *weight_residual}),
            working_bytes(trace.graph, input_nodes, {*stash, *deferred}),
            working_bytes(trace.graph, deferred_nodes),
        ),
    )
