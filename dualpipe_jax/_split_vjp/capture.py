"""A function traced once, to be run where JAX's types of varying values are not kept."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from dualpipe_jax._model.varying import without_types
from dualpipe_jax._split_vjp.cut import CHEAP_LATER
from dualpipe_jax._split_vjp.graph import Graph, Node, When, evaluate, needed, read
from dualpipe_jax._split_vjp.reductions import without_reductions


def capture(
    function: Callable[..., tuple[Any, list[Any]]], *avals: Any
) -> tuple[Callable[..., tuple[Any, list[Any]]], list[tuple[str, ...] | None]]:
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
    graph = Graph()
    inputs = [graph.new_value(var.aval, When.FORWARD) for var in jaxpr.jaxpr.invars]
    outputs = graph.add(jaxpr.jaxpr, jaxpr.consts, inputs)
    first = len(outputs) - len(out[1])
    is_zero = [graph.is_zero(value) for value in outputs[first:]]
    gradients, found = without_reductions(graph, outputs[first:])
    axes = [None if zero else each for zero, each in zip(is_zero, found, strict=True)]
    outputs = [*outputs[:first], *gradients]
    nodes = with_effects(graph.nodes, needed(graph.nodes, outputs))

    def run(*args: Any) -> tuple[Any, list[Any]]:
        env = dict(zip(inputs, jax.tree.leaves(args), strict=True))
        evaluate(nodes, env)
        return jax.tree.unflatten(jax.tree.structure(out), [read(env, v) for v in outputs])

    run.__name__ = function.__name__  # what a profile shows
    # Under jit it is traced once, however many branches call it.
    return jax.jit(run), axes


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


# What a look-up in a table may consist of, besides elementwise steps.
_LOOK_UP = CHEAP_LATER | {"concatenate", "dynamic_slice", "gather", "iota", "pad"}


def is_look_up(function: Callable[..., Any], *avals: Any) -> bool:
    """Whether `function` is little work, such as rows of a table: less than choosing to run it."""
    jaxpr = without_types(jax.make_jaxpr(function)(*avals))
    graph = Graph()
    inputs = [graph.new_value(var.aval, When.FORWARD) for var in jaxpr.jaxpr.invars]
    graph.add(jaxpr.jaxpr, jaxpr.consts, inputs)
    return all(node.name in _LOOK_UP and not node.has_effect for node in graph.nodes)


def with_effects(nodes: Sequence[Node], selected: Iterable[Node]) -> list[Node]:
    """Adds to the `selected` nodes those that have an effect (a debug print), with what they need.

    Effects of the backward are left alone.

    Args:
      nodes: All nodes, in order.
      selected: Some of them.
    """
    ids = {id(n) for n in selected}
    effects = [n for n in nodes if n.has_effect and n.when is not When.BACKWARD]
    ids |= {id(n) for n in (*effects, *needed(nodes, {v for n in effects for v in n.reads}))}
    return [n for n in nodes if id(n) in ids]
