"""How much memory the nodes of a graph take while they run, roughly: before any compiler is asked.

In: a graph, nodes in order, and their results. Out: bytes. Elementwise steps are taken to be fused
into who reads them, so that only what other steps make is held, from then on until its last reader
has run; results are held by who takes them.
"""

from collections.abc import Collection, Sequence

from dualpipe_jax._split_vjp.cut import CHEAP_LATER
from dualpipe_jax._split_vjp.graph import Graph, Node, When


def working_bytes(graph: Graph, nodes: Sequence[Node], results: Collection[int] = ()) -> int:
    """Estimates the most bytes held at once of what `nodes` make, parameters' own values left out.

    So are `results` but for the step that makes them, as whoever calls has a place for them.

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
        if node.name in CHEAP_LATER:
            reader = max((last.get(v, step) for v in node.outputs), default=step)
        for value in node.reads:
            last[value] = max(last.get(value, reader), reader)
    for value in results:
        last.pop(value, None)
    held, most = 0, 0
    ends: dict[int, int] = {}
    for step, node in enumerate(nodes):
        if node.name not in CHEAP_LATER:
            for value in node.outputs:
                if value in last and graph.when[value] is not When.ALWAYS:
                    held += graph.num_bytes(value)
                    ends[last[value]] = ends.get(last[value], 0) + graph.num_bytes(value)
        elsewhere = sum(
            graph.num_bytes(v)
            for v in node.outputs
            if v not in last and node.name not in CHEAP_LATER
        )
        most = max(most, held + elsewhere)
        held -= ends.pop(step, 0)
    return most
