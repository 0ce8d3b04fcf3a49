"""Which weight gradients are made with the input gradient, and so added up at once.

An equation that makes dx and dW and cannot be opened (a `pallas_call`, a callback, a `jit` with
shardings, a `while`) runs for dx. Its dW would have to wait in the stash for the weight grad's
turn, as large as the parameter; adding it up at once costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dualpipe_jax._split_vjp.cut import CHEAP, minimum_cut
from dualpipe_jax._split_vjp.graph import Constant, Graph, Node, When, needed

_SUMS = ("add", "add_any")
# What may follow the equation: cheap steps, and the sum over devices of a weight that they share.
_STEPS = CHEAP | {"psum", "psum_invariant", "reduce_scatter"}


def is_early(
    graph: Graph, nodes: Sequence[Node], first: Sequence[Node], value: int | Constant
) -> bool:
    """Whether `value` should be made by the first half of `nodes`, though it does not need it.

    It is if cheap steps, and sums over devices, make it from what a node of `first` that is not
    cheap has made, and if nothing smaller could be kept for making it later. A bias's sum over
    rows is not: the sum, a little work of the second half, stays there.
    """
    if isinstance(value, Constant):
        return False
    in_first = {id(n) for n in first}
    made_first = {v: n for n in first for v in n.outputs}
    steps = needed(nodes, [value], known=made_first)
    sources = {value, *(v for n in steps for v in n.reads)}.intersection(made_first)
    if not all(n.name in _STEPS for n in steps):
        return False
    if all(made_first[v].name in CHEAP for v in sources):
        return False
    kept = minimum_cut(
        nodes,
        wanted=[value],
        can_keep=lambda n: id(n) in in_first or n.name in _STEPS,
        can_redo=lambda n: id(n) not in in_first,
        size=graph.num_bytes,
        is_free=lambda v: graph.when[v] is When.ALWAYS,
        prefer_late=False,
    )
    return sum(map(graph.num_bytes, kept)) >= graph.num_bytes(value)


def part_early(
    graph: Graph, nodes: list[Node], first: Sequence[Node], value: int
) -> tuple[int | None, int | None]:
    """Parts a gradient in what is made early and the rest; their sum is the gradient.

    A weight that is used twice has a sum for a gradient, of which one term may be early. Nodes
    that add the terms up anew are appended to `nodes`.
    """
    producer = {v: n for n in nodes for v in n.outputs}
    in_first = {id(n) for n in first}

    def terms(value: int) -> list[int]:
        node = producer.get(value)
        is_sum = node is not None and node.name in _SUMS and id(node) not in in_first
        if node is None or not is_sum or len(node.reads) != 2:
            return [value]
        if any(graph.avals[v].shape != graph.avals[value].shape for v in node.reads):
            return [value]
        return [term for v in node.reads for term in terms(v)]

    def total(values: list[int]) -> int | None:
        while len(values) > 1:
            a, b, *values = values
            together = graph.new_value(graph.avals[a], max(graph.when[a], graph.when[b]))
            add: Callable[[Any, Any], list[Any]] = lambda a, b: [a + b]  # noqa: E731
            nodes.append(Node("add", add, (a, b), (together,), graph.when[together]))
            values = [together, *values]
        return values[0] if values else None

    parts = terms(value)
    early = [v for v in parts if is_early(graph, nodes, first, v)]
    late = [v for v in parts if v not in early]
    if not late or not early:
        return (value, None) if early else (None, value)
    return total(early), total(late)
