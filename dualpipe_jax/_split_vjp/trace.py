"""Traces a function once, as a graph: a block with its vjp, or any function with gradients.

In: a pure function, and avals. Out: `BlockTrace`, for `split` to divide; or a function to be run
where JAX's types of varying values are not kept.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from dualpipe_jax._model.types import Aux, PyTree
from dualpipe_jax._model.varying import eval_shape, without_types
from dualpipe_jax._split_vjp.equations import graph_of
from dualpipe_jax._split_vjp.graph import (
    Atom,
    Constant,
    Graph,
    When,
    evaluate,
    needed,
    read,
    with_effects,
)
from dualpipe_jax._split_vjp.reductions import without_reductions

_T = TypeVar("_T")

# `(params, x, ctx) -> (y, aux)`
Block = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, Aux]]
# Any function that returns results and a list of gradients.
WithGradients = Callable[..., tuple[PyTree, list[jax.Array]]]


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """A block and its vjp as one graph, and which of its values the arguments and results are.

    Attributes:
      graph: The forward's equations, then the backward's.
      y_structure, metrics_structure: The structures of the trees y and metrics.
      params, x, ctx: Their leaves.
      dy: The cotangents of y's differentiable leaves.
      daux: The cotangent of the aux loss, or nothing.
      y, metrics: Their leaves.
      aux: The aux loss, or nothing.
      dx: The gradients of x's differentiable leaves.
      dparams: For every leaf of params its gradient before `reduce_axes` are summed over, or a
        zero.
      reduce_axes: For every leaf of params the mesh axes over which its gradient is still to be
        summed.
    """

    graph: Graph
    y_structure: Any
    metrics_structure: Any
    params: list[int]
    x: list[int]
    ctx: list[int]
    dy: list[int]
    daux: list[int]
    y: list[Atom]
    aux: list[Atom]
    metrics: list[Atom]
    dx: list[Atom]
    dparams: list[Atom]
    reduce_axes: list[tuple[str, ...]]

    @property
    def results(self) -> list[Atom]:
        """The values that the forward returns."""
        return [*self.y, *self.aux, *self.metrics]


def is_differentiable(leaf: Any) -> bool:
    """Whether `leaf` has a cotangent: floating-point and complex leaves have."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def trace_block(
    block: Block, params: PyTree, x: PyTree, ctx: PyTree, wanted: Sequence[bool]
) -> BlockTrace:
    """Traces `block` and its vjp together.

    Args:
      block: `(params, x, ctx) -> (y, aux)`.
      params: The block's parameters, arrays or avals.
      x: The activation, arrays or avals.
      ctx: The context, arrays or avals.
      wanted: For every leaf of params whether it gets a gradient.
    """
    param_leaves, param_structure = jax.tree.flatten(params)
    x_leaves, x_structure = jax.tree.flatten(x)
    ctx_leaves = jax.tree.leaves(ctx)
    _, aux_aval = eval_shape(block, params, x, ctx)
    has_aux = aux_aval.loss is not None

    def joint(param_leaves: list, x_leaves: list, ctx: PyTree, dy: list, daux: list) -> Any:
        def differentiable(params: list, xs: list) -> Any:
            y, aux = block(
                jax.tree.unflatten(param_structure, _put_leaves(params, param_leaves, wanted)),
                jax.tree.unflatten(x_structure, _merge(xs, x_leaves)),
                ctx,
            )
            y = jax.tree.leaves(y)
            return (_pick(y), [aux.loss] if has_aux else []), (y, jax.tree.leaves(aux.metrics))

        args = [p for p, is_on in zip(param_leaves, wanted, strict=True) if is_on], _pick(x_leaves)
        (_, aux), pull, (y, metrics) = jax.vjp(differentiable, *args, has_aux=True)
        dparams, dx = pull((dy, daux))
        return y, aux, metrics, dx, dparams

    dy = _pick(x_leaves)
    daux = [aux_aval.loss] if has_aux else []
    jaxpr, out = jax.make_jaxpr(joint, return_shape=True)(param_leaves, x_leaves, ctx, dy, daux)
    times = [
        *[When.ALWAYS] * len(param_leaves),
        *[When.FORWARD] * len(x_leaves),
        *[When.ALWAYS] * len(ctx_leaves),
        *[When.BACKWARD] * len([*dy, *daux]),
    ]
    graph, inputs, outputs = graph_of(without_types(jaxpr), times)
    params_in, x_in, ctx_in, dy_in, daux_in = _divide(
        inputs, param_leaves, x_leaves, ctx_leaves, dy, daux
    )
    y, aux, metrics, dx, picked = _divide(outputs, *out)
    picked, axes = without_reductions(graph, picked)
    # One entry a leaf of params: integer and frozen leaves have no gradient.
    zeros: list[Atom] = [Constant(0)] * len(param_leaves)
    return BlockTrace(
        graph=graph,
        y_structure=x_structure,
        metrics_structure=jax.tree.structure(aux_aval.metrics),
        params=params_in,
        x=x_in,
        ctx=ctx_in,
        dy=dy_in,
        daux=daux_in,
        y=y,
        aux=aux,
        metrics=metrics,
        dx=dx,
        dparams=_put_leaves(picked, zeros, wanted),
        reduce_axes=_put_leaves(axes, [()] * len(param_leaves), wanted),
    )


def capture(
    function: WithGradients, *avals: PyTree
) -> tuple[WithGradients, list[tuple[str, ...] | None]]:
    """Traces `function`, which returns any results and a list of gradients.

    Args:
      function: The function.
      *avals: Pytrees of avals of its arguments.

    Returns:
      A function that does the same, but leaves out reductions of gradients over mesh axes at their
      end; and for each gradient the axes over which it is still to be summed, None if it is zero.
    """
    jaxpr, out = jax.make_jaxpr(function, return_shape=True)(*avals)
    jaxpr = without_types(jaxpr)
    graph, inputs, outputs = graph_of(jaxpr, [When.FORWARD] * len(jaxpr.jaxpr.invars))
    first = len(outputs) - len(out[1])
    is_zero = [graph.is_zero(value) for value in outputs[first:]]
    gradients, found = without_reductions(graph, outputs[first:])
    reduce_axes = [None if zero else axes for zero, axes in zip(is_zero, found, strict=True)]
    outputs = [*outputs[:first], *gradients]
    nodes = with_effects(graph.nodes, needed(graph.nodes, outputs))

    def run(*args: Any) -> tuple[Any, list[Any]]:
        env = dict(zip(inputs, jax.tree.leaves(args), strict=True))
        evaluate(nodes, env)
        return jax.tree.unflatten(jax.tree.structure(out), [read(env, v) for v in outputs])

    run.__name__ = function.__name__  # a profile shows it
    # Under jit it is traced once, however many branches call it.
    return jax.jit(run), reduce_axes


def traced_once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function for the first arguments of each type, and then runs the trace of that call.

    So a user's Python runs once for all that is asked of it (shapes, types, derivatives), which
    saves seconds with deep Flax modules. It must be called within one trace.
    """
    traces: dict[Any, Any] = {}

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        types = structure, tuple(map(jax.typeof, leaves))
        if types not in traces:
            traces[types] = jax.make_jaxpr(function, return_shape=True)(*args)
        jaxpr, out = traces[types]
        return jax.tree.unflatten(jax.tree.structure(out), jaxpr_as_fun(jaxpr)(*leaves))

    return run


def _pick(leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf in leaves if is_differentiable(leaf)]


def _merge(picked: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """Puts `picked` back for the differentiable leaves."""
    return _put_leaves(picked, leaves, [is_differentiable(leaf) for leaf in leaves])


def _put_leaves(picked: Sequence[_T], leaves: Sequence[_T], flags: Sequence[bool]) -> list[_T]:
    """Puts `picked`, one after the other, for the `leaves` whose flag is True."""
    rest = iter(picked)
    return [next(rest) if is_on else leaf for leaf, is_on in zip(leaves, flags, strict=True)]


def _divide(values: Sequence[_T], *like: Sequence[Any]) -> list[list[_T]]:
    """Divides `values` into lists as long as each of `like`."""
    rest = iter(values)
    lists = [[next(rest) for _ in group] for group in like]
    assert not [*rest]
    return lists
