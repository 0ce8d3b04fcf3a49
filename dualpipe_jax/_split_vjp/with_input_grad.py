"""Chooses the weight gradients that are made with the input gradient, and so added up at once.

An equation that makes dx and dW and cannot be opened (a `pallas_call`, a callback, a `jit` with
shardings, a `while`) runs for dx. Its dW would have to wait in the stash for the weight grad's
turn, as large as the parameter; adding it up at once costs nothing.

>>> import numpy as np
>>> from dualpipe_jax._split_vjp.graph import When
>>> graph = Graph()
>>> dy, dx, dw = (graph.new_value(np.zeros(4, np.float32), When.BACKWARD) for _ in range(3))
>>> fused = Node("pallas_call", len, (dy,), (dx, dw), When.BACKWARD)
>>> divide_gradient(graph, [fused], [fused], dw) == (dw, None)  # with I, nothing with W
True
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from dualpipe_jax._split_vjp.cut import minimum_cut
from dualpipe_jax._split_vjp.graph import Atom, Constant, Graph, Node, needed
from dualpipe_jax._split_vjp.primitives import AFTER_JOINT_GRADIENT, CHEAP, SUMS


def is_made_with(graph: Graph, nodes: Sequence[Node], first: Sequence[Node], value: Atom) -> bool:
    """Whether the nodes `first` should make `value` too, though their own outputs do not need it.

    They should if cheap steps, and sums over devices, make it from the result of a node of `first`
    that is not cheap, and if nothing smaller could be kept for making it later. A bias's sum over
    rows is not made with them: the sum, a little work of the other nodes, stays there.

    Args:
      graph: The graph.
      nodes: All its nodes that may run.
      first: Those of them that run first.
      value: A value that some of `nodes` make.
    """
    if isinstance(value, Constant):
        return False
    in_first = {id(n) for n in first}
    made_first = {v: n for n in first for v in n.outputs}
    steps = needed(nodes, [value], known=made_first)
    sources = {value, *(v for n in steps for v in n.reads)}.intersection(made_first)
    if not all(n.name in AFTER_JOINT_GRADIENT for n in steps):
        return False
    if all(made_first[v].name in CHEAP for v in sources):
        return False
    kept = minimum_cut(
        nodes,
        wanted=[value],
        can_keep=lambda n: id(n) in in_first or n.name in AFTER_JOINT_GRADIENT,
        can_redo=lambda n: id(n) not in in_first,
        size=graph.num_bytes,
        is_free=graph.is_free,
        prefer_late=False,
    )
    return sum(map(graph.num_bytes, kept)) >= graph.num_bytes(value)


def divide_gradient(
    graph: Graph, nodes: list[Node], first: Sequence[Node], gradient: int
) -> tuple[int | None, int | None]:
    """Divides a gradient into the part made with the nodes `first` and the rest.

    The gradient is the sum of the two; None stands for a part without a term. A weight that is used
    twice has a sum for a gradient, of which one term may come with the input gradient. Nodes that
    add the terms up anew are appended to `nodes`.
    """
    producer = {v: n for n in nodes for v in n.outputs}
    in_first = {id(n) for n in first}

    def terms(value: int) -> list[int]:
        node = producer.get(value)
        is_sum = node is not None and node.name in SUMS and id(node) not in in_first
        if node is None or not is_sum or len(node.reads) != 2:
            return [value]
        if any(graph.avals[v].shape != graph.avals[value].shape for v in node.reads):
            return [value]
        return [term for v in node.reads for term in terms(v)]

    def add(a: int, b: int) -> int:
        total = graph.new_value(graph.avals[a], max(graph.when[a], graph.when[b]))
        run: Callable[[Any, Any], list[Any]] = lambda a, b: [a + b]  # noqa: E731
        nodes.append(Node("add", run, (a, b), (total,), graph.when[total]))
        return total

    found = terms(gradient)
    made_with = [v for v in found if is_made_with(graph, nodes, first, v)]
    rest = [v for v in found if v not in made_with]
    if not made_with or not rest:
        return (gradient, None) if made_with else (None, gradient)
    return functools.reduce(add, made_with), functools.reduce(add, rest)
