"""Splits `jax.vjp` of a block into forward (F), input_grad (I) and weight_grad (W). Read first.

In: a block as a pure function, and avals. Out: `SplitVjp`, functions and the avals of the values
that pass between them. As Qi et al., "Zero Bubble Pipeline Parallelism" (2023), section 2, for any
block. Take `y = sin(x @ w)`. `trace.py` traces the block and its vjp into one `graph.Graph`, which
`equations.py` fills:

>>> import jax.numpy as jnp
>>> from dualpipe_jax._model.types import Aux
>>> from dualpipe_jax._split_vjp.graph import show
>>> block = lambda w, x, ctx: (jnp.sin(x @ w), Aux())
>>> trace = trace_block(block, jnp.ones((8, 8)), jnp.ones((4, 8)), (), wanted=[True])
>>> names = dict(zip([*trace.params, *trace.x, *trace.dy], ["w", "x", "dy"]))
>>> names |= dict(zip([*trace.y, *trace.dx, *trace.dparams], ["y", "dx", "dw"]))
>>> show(trace.graph.nodes, names)
v3 = dot_general x w
y = sin v3
v5 = cos v3
v6 = mul dy v5
v7 = dot_general v6 x
dw = transpose v7
dx = dot_general v6 w

`divide.py` divides the backward by liveness: the nodes that dx needs are the input grad, the nodes
that only gradients of parameters need are the weight grad. (`bodies.py` first does the same inside
of scans, conditionals and `shard_map`s, and `with_input_grad.py` leaves a gradient with dx where
one equation makes both.) Minimum cuts in bytes (`cut.py`) choose the values that pass: the stash
from I to W, then the residuals from F to both. Cheap nodes (`primitives.py`) run again where that
saves a value; nodes that depend on parameters, constants or the context alone always do.

>>> programs = divide_block(trace)
>>> show(programs.forward, names)
v3 = dot_general x w
y = sin v3
v5 = cos v3
>>> show(programs.input_grad, names)
v6 = mul dy v5
dx = dot_general v6 w
>>> show(programs.weight_grad, names)
v7 = dot_general v6 x
dw = transpose v7
>>> programs.residual, [names[v] for v in programs.weight_residual], programs.stash
((5,), ['x'], (6,))

`assemble.py` makes functions of these nodes; `for_compilers.py`, `memory_order.py` and `cost.py`
add notes that help compilers. The functions together give the gradients of `jax.vjp`:

>>> parts = split_vjp(block, w := jnp.ones((8, 8)), x := jnp.ones((4, 8)), ())
>>> y, aux, residual, weight_residual = parts.forward(w, x, ())
>>> dx, stash, *_ = parts.input_grad(w, (), residual, weight_residual, [y], None)
>>> dw = parts.weight_grad(w, (), weight_residual, stash)
>>> [(tuple(a.shape), tuple(b.shape)) for a, b in zip(dx, dw)]
[((4, 8), (8, 8))]
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from dualpipe_jax._model.types import PyTree
from dualpipe_jax._split_vjp.assemble import Forward, InputGrad, WeightGrad, make_functions
from dualpipe_jax._split_vjp.cost import working_bytes
from dualpipe_jax._split_vjp.divide import divide_block
from dualpipe_jax._split_vjp.for_compilers import (
    find_casts,
    find_reads,
    find_rounded,
    may_wait,
    parts_of,
)
from dualpipe_jax._split_vjp.memory_order import MemoryOrder, memory_orders
from dualpipe_jax._split_vjp.trace import Block, is_differentiable, trace_block


@dataclass(frozen=True, kw_only=True)
class SplitVjp:
    """A block's forward, and its backward in two.

    Attributes:
      forward: `(params, x, ctx) -> (y, aux, residual, weight_residual)`.
      input_grad: `(params, ctx, residual, weight_residual, dy, daux) -> (dx, stash, deferred,
        dparams)`.
      weight_grad: `(params, ctx, weight_residual, stash) -> dparams`.
      deferred_weight_grad: `(params, ctx, weight_residual, deferred) -> dparams`, the same from
        less if it recomputes.
      residual: Avals of `residual`; so are `weight_residual`, `stash` and `deferred` of theirs.
      residual_parts: For each of `residual` the number of parts in which its readers take it; so
        are `weight_residual_parts`. See `for_compilers.parts_of`.
      residual_orders: For each of `residual` the memory order that suits its readers; so are
        `weight_residual_orders`.
      residual_offloaded: For each of `residual` whether a policy of `jax.checkpoint` in the block
        offloads it to the host's memory; so are `weight_residual_offloaded`.
      residual_made: For each of `residual` a number, in the order in which the forward makes them;
        so are `weight_residual_made`, in one order with these.
      stash_may_wait: For each of `stash` whether a barrier may hold it up at no cost. See
        `for_compilers.may_wait`.
      made_with_input_grad: For every leaf of params, whether the input grad makes its gradient, by
        an equation that makes both. Where `made_with_weight_grad` holds too, the gradient is the
        sum of the two.
      made_with_weight_grad: For every leaf of params, whether the weight grad makes its gradient.
      is_sum: For every leaf of params, whether its gradient is a sum over several uses.
      reduce_axes: For every leaf of params, the mesh axes over which its gradient is still to be
        summed.
      casts: The leaves of params that the block casts to smaller dtypes, as (index, dtype): `cast`
        does it once for many calls; each of the functions takes `(params, casts)` for `params`.
      is_read: For every leaf of params, whether it is read other than to be cast.
      is_rounded: For every leaf of params, whether only contractions read it, as it is or moved,
        whose precision is left to the platform: TPUs round the operands of these to bfloat16.
      working_bytes: An estimate of the memory that one call of the largest part holds besides
        arguments and results: the results of its contractions and reductions, until they are read.
    """

    forward: Forward
    input_grad: InputGrad
    weight_grad: WeightGrad
    deferred_weight_grad: WeightGrad
    residual: tuple[Any, ...]
    weight_residual: tuple[Any, ...]
    stash: tuple[Any, ...]
    deferred: tuple[Any, ...]
    residual_parts: tuple[int, ...]
    weight_residual_parts: tuple[int, ...]
    residual_orders: tuple[MemoryOrder, ...]
    weight_residual_orders: tuple[MemoryOrder, ...]
    residual_offloaded: tuple[bool, ...]
    weight_residual_offloaded: tuple[bool, ...]
    residual_made: tuple[int, ...]
    weight_residual_made: tuple[int, ...]
    stash_may_wait: tuple[bool, ...]
    made_with_input_grad: tuple[bool, ...]
    made_with_weight_grad: tuple[bool, ...]
    is_sum: tuple[bool, ...]
    reduce_axes: tuple[tuple[str, ...], ...]
    casts: tuple[tuple[int, Any], ...]
    is_read: tuple[bool, ...]
    is_rounded: tuple[bool, ...]
    working_bytes: int

    def cast(self, leaves: Sequence[Any], indices: range) -> list[jax.Array]:
        """Casts `leaves`, which are the leaves of params at `indices`."""
        casts = (c for c in self.casts if c[0] in indices)
        return [leaves[i - indices.start].astype(dtype) for i, dtype in casts]

    @property
    def has_grad(self) -> tuple[bool, ...]:
        """For every leaf of params, whether its gradient can be other than zero."""
        return tuple(map(operator.or_, self.made_with_input_grad, self.made_with_weight_grad))


def split_vjp(
    block: Block,
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
    trace = trace_block(block, params, x, ctx, wanted)
    programs = divide_block(trace, recomputes=recomputes)
    graph, avals = trace.graph, trace.graph.avals
    casts = find_casts(graph, trace.params)
    forward, input_grad, weight_grad, deferred_weight_grad = make_functions(trace, programs, casts)
    backward = [*programs.input_grad, *programs.weight_grad]
    nodes = [*programs.forward, *backward]
    residual, weight_residual = programs.residual, programs.weight_residual
    stash, deferred = programs.stash, programs.deferred
    dparams = (*programs.made_with_input_grad, *programs.made_with_weight_grad)
    outputs = {v for v in (*trace.dx, *stash, *deferred, *dparams) if isinstance(v, int)}
    sums = {v for n in graph.nodes if n.name == "add_any" for v in n.outputs}
    return SplitVjp(
        forward=forward,
        input_grad=input_grad,
        weight_grad=weight_grad,
        deferred_weight_grad=deferred_weight_grad,
        residual=tuple(avals[v] for v in residual),
        weight_residual=tuple(avals[v] for v in weight_residual),
        stash=tuple(avals[v] for v in stash),
        deferred=tuple(avals[v] for v in deferred),
        residual_parts=parts_of(graph, backward, residual, outputs),
        weight_residual_parts=parts_of(graph, backward, weight_residual, outputs),
        residual_orders=memory_orders(graph, nodes, residual),
        weight_residual_orders=memory_orders(graph, nodes, weight_residual),
        residual_offloaded=tuple(v in graph.offloaded for v in residual),
        weight_residual_offloaded=tuple(v in graph.offloaded for v in weight_residual),
        residual_made=residual,
        weight_residual_made=weight_residual,
        stash_may_wait=may_wait(programs.input_grad, stash, [*trace.dy, *trace.daux]),
        made_with_input_grad=tuple(v is not None for v in programs.made_with_input_grad),
        made_with_weight_grad=tuple(v is not None for v in programs.made_with_weight_grad),
        is_sum=tuple(isinstance(v, int) and v in sums for v in trace.dparams),
        reduce_axes=tuple(trace.reduce_axes),
        casts=tuple(casts),
        is_read=find_reads(trace.params, casts, nodes),
        is_rounded=find_rounded(trace.params, nodes),
        working_bytes=max(
            working_bytes(graph, programs.forward, {*residual, *weight_residual}),
            working_bytes(graph, programs.input_grad, {*stash, *deferred}),
            working_bytes(graph, programs.deferred_weight_grad),
        ),
    )
