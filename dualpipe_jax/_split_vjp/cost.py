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

# A device does so many FLOPs in the time in which it moves a byte: TPU v5e 240, TPU v5p 166, H100
# 295, in bfloat16, by their published figures.
_FLOPS_PER_BYTE = 240


def contraction_flops(function: Callable[..., Any], *args: Any) -> int:
    """Counts the floating-point operations of a function's `dot_general`s; nothing runs.

    A loop's count times its trips, where they are known; of branches all are counted.

    >>> import jax.numpy as jnp
    >>> contraction_flops(jnp.matmul, jnp.ones((2, 3)), jnp.ones((3, 5)))
    60
    """
    return _sum_of(jax.make_jaxpr(function)(*args).jaxpr, _contracted)


def time_in_flops(function: Callable[..., Any], *args: Any) -> int:
    """Counts the FLOPs that a device could do in the time that a function takes; nothing runs.

    These are the FLOPs of each contraction, or those in the time in which its operands and its
    result move, whichever are more (the roofline: Williams et al. 2009). Rows that are looked up in
    a table, or added to it, move only; all else is taken to be fused.

    >>> import jax.numpy as jnp
    >>> matrices = jnp.ones((2, 3), "float32"), jnp.ones((3, 5), "float32")
    >>> time_in_flops(jnp.matmul, *matrices) == 240 * 4 * (6 + 15 + 10)
    True
    """
    return _sum_of(jax.make_jaxpr(function)(*args).jaxpr, _time_of)


def _sum_of(jaxpr: Any, figure: Callable[[Any], int]) -> int:
    """Adds up a figure of all equations, nested ones included."""
    total = 0
    for eqn in jaxpr.eqns:
        inner = sum(_sum_of(each, figure) for each in jcore.jaxprs_in_params(eqn.params))
        total += figure(eqn) + inner * eqn.params.get("length", 1)
    return total


def _contracted(eqn: Any) -> int:
    if eqn.primitive.name != "dot_general":
        return 0
    contracted = eqn.params["dimension_numbers"][0][0]
    summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    return 2 * summed * eqn.outvars[0].aval.size


def _time_of(eqn: Any) -> int:
    match eqn.primitive.name:
        case "dot_general":
            return max(_contracted(eqn), _FLOPS_PER_BYTE * _bytes(*eqn.invars, *eqn.outvars))
        case "gather":
            # Rows are read and written.
            return _FLOPS_PER_BYTE * 2 * _bytes(*eqn.outvars)
        case "scatter-add":
            # Rows and updates are read, rows are written.
            return _FLOPS_PER_BYTE * 3 * _bytes(eqn.invars[2])
    return 0


def _bytes(*variables: Any) -> int:
    return sum(each.aval.size * each.aval.dtype.itemsize for each in variables)


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
