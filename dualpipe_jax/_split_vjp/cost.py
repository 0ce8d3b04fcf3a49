"""Estimates the work and the memory of programs, before any compiler is asked."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.extend import core as jcore

from dualpipe_jax._model.varying import without_types
from dualpipe_jax._split_vjp.equations import graph_of
from dualpipe_jax._split_vjp.graph import Graph, Node, When
from dualpipe_jax._split_vjp.primitives import CHEAP_IN_BACKWARD, LOOK_UP


def contraction_flops(function: Callable[..., Any], *args: Any) -> int:
    """Counts the floating-point operations of a function's `dot_general`s; nothing runs.

    A loop's count times its trips, where they are known; of branches all are counted.

    >>> import jax.numpy as jnp
    >>> contraction_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            flops += 2 * summed * eqn.outvars[0].aval.size
        else:
            inner = sum(map(_of_jaxpr, jcore.jaxprs_in_params(eqn.params)))
            flops += inner * eqn.params.get("length", 1)
    return flops


def is_look_up(function: Callable[..., Any], *avals: Any) -> bool:
    """Whether `function` is little work, such as rows of a table: less than choosing to run it."""
    jaxpr = without_types(jax.make_jaxpr(function)(*avals))
    graph, _, _ = graph_of(jaxpr, [When.FORWARD] * len(jaxpr.jaxpr.invars))
    return all(node.name in LOOK_UP and not node.has_effect for node in graph.nodes)


def working_bytes(graph: Graph, nodes: Sequence[Node], results: Collection[int] = ()) -> int:
    """Estimates the most bytes held at once of the values that `nodes` make.

    Elementwise steps are taken to be fused into their readers, so that only the values of other
    steps are held, from then on until their last reader has run. Values of parameters alone are
    left out. So are `results` but for the step that makes them, as the caller has buffers for them.

    >>> import numpy as np
    >>> graph = Graph()
    >>> x, y, z = (graph.new_value(np.zeros(n, np.float32), When.FORWARD) for n in (1, 8, 2))
    >>> nodes = [Node("dot_general", len, (x,), (y,), When.FORWARD)]
    >>> nodes = [*nodes, Node("dot_general", len, (y,), (z,), When.FORWARD)]
    >>> working_bytes(graph, nodes), working_bytes(graph, nodes, results=[y])
    (40, 32)
    """
    # The steps that read a value, be it through elementwise ones.
    last: dict[int, int] = {}
    for step in reversed(range(len(nodes))):
        node = nodes[step]
        reader = step
        if node.name in CHEAP_IN_BACKWARD:
            reader = max((last.get(v, step) for v in node.outputs), default=step)
        for value in node.reads:
            last[value] = max(last.get(value, reader), reader)
    for value in results:
        last.pop(value, None)
    held, most = 0, 0
    freed: dict[int, int] = {}  # bytes by step
    for step, node in enumerate(nodes):
        others = 0
        if node.name not in CHEAP_IN_BACKWARD:
            for value in node.outputs:
                if value not in last:
                    others += graph.num_bytes(value)
                elif graph.when[value] is not When.ALWAYS:
                    held += graph.num_bytes(value)
                    freed[last[value]] = freed.get(last[value], 0) + graph.num_bytes(value)
        most = max(most, held + others)
        held -= freed.pop(step, 0)
    return most
