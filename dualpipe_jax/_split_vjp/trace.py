"""A block and its vjp in one trace, as a graph that knows where arguments and results stand in it.

In: a block as a pure function, and avals. Out: `Joint`, for `split` to divide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._model.varying import eval_shape, without_types
from dualpipe_jax._split_vjp.graph import Constant, Graph, When
from dualpipe_jax._split_vjp.reductions import without_reductions

PyTree = Any


def is_differentiable(leaf: Any) -> bool:
    """Whether `leaf` has a cotangent: floating-point and complex leaves have."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


@dataclass(frozen=True, kw_only=True)
class Joint:
    """A block and its vjp as one graph, and where the arguments and results stand in it."""

    graph: Graph
    y_structure: Any
    metrics_structure: Any
    params: list[int]
    x: list[int]
    ctx: list[int]
    dy: list[int]
    daux: list[int]
    y: list[int | Constant]
    aux: list[int | Constant]
    metrics: list[int | Constant]
    dx: list[int | Constant]
    dparams: list[int | Constant]
    reduce_axes: list[tuple[str, ...]]


def trace_joint(
    block: Callable[..., Any], params: PyTree, x: PyTree, ctx: PyTree, wanted: Sequence[bool]
) -> Joint:
    param_leaves, param_structure = jax.tree.flatten(params)
    x_leaves, x_structure = jax.tree.flatten(x)
    _, aux_aval = eval_shape(block, params, x, ctx)
    has_aux = aux_aval.loss is not None

    def joint(param_leaves: list, x_leaves: list, ctx: PyTree, dy: list, daux: list) -> Any:
        def differentiable(params: list, xs: list) -> Any:
            y, aux = block(
                jax.tree.unflatten(param_structure, _place(params, param_leaves, wanted)),
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
    jaxpr = without_types(jaxpr)
    graph = Graph()
    groups = [
        (len(param_leaves), When.ALWAYS),
        (len(x_leaves), When.FORWARD),
        (len(jax.tree.leaves(ctx)), When.ALWAYS),
        (len(dy) + len(daux), When.BACKWARD),
    ]
    times = [when for count, when in groups for _ in range(count)]
    inputs = [graph.new_value(v.aval, t) for v, t in zip(jaxpr.jaxpr.invars, times, strict=True)]
    outputs = graph.add(jaxpr.jaxpr, jaxpr.consts, inputs)
    params_in, x_in, ctx_in, rest = _divide(inputs, param_leaves, x_leaves, jax.tree.leaves(ctx))
    dy_in, daux_in = _divide(rest, dy)
    y, aux, metrics, dx, picked = _divide(outputs, *out[:4])
    # One entry a leaf of params: integer and frozen leaves have no gradient.
    none = [Constant(0)] * len(param_leaves)
    picked, axes = without_reductions(graph, picked)
    dparams = _place(picked, none, wanted)
    reduce_axes = _place(axes, [()] * len(param_leaves), wanted)
    return Joint(
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
        dparams=dparams,
        reduce_axes=reduce_axes,
    )


def _pick(leaves: Sequence[Any]) -> list[Any]:
    return [leaf for leaf in leaves if is_differentiable(leaf)]


def _merge(picked: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """Puts `picked` back in the places of the differentiable leaves."""
    return _place(picked, leaves, [is_differentiable(leaf) for leaf in leaves])


def _place(picked: Sequence[Any], leaves: Sequence[Any], where: Sequence[bool]) -> list[Any]:
    """Puts `picked` in the places of `leaves` that `where` says."""
    rest = iter(picked)
    return [next(rest) if here else leaf for leaf, here in zip(leaves, where, strict=True)]


def _divide(values: Sequence[Any], *like: Sequence[Any]) -> list[list[Any]]:
    """Divides `values` into lists as long as each of `like`, and the rest."""
    rest = iter(values)
    return [*([next(rest) for _ in group] for group in like), list(rest)]
