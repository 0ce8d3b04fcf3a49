"""Takes the sums over mesh axes off the end of gradients, to be done once after the loop.

Where a parameter is the same on all devices of an axis and the values that it meets are not, its
gradient ends in a sum over them. A sum over devices commutes with the sum over microbatches: the
gradient is accumulated before it is summed over devices.

>>> import numpy as np
>>> graph = Graph()
>>> x, total, dw = (graph.new_value(np.zeros(3), When.BACKWARD) for _ in range(3))
>>> graph.nodes += [
...     Node("psum", len, (x,), (total,), When.BACKWARD, reduces=("data",)),
...     Node("neg", len, (total,), (dw,), When.BACKWARD),
... ]
>>> without_reductions(graph, [dw])  # its value without the sum is the negative of x
([3], [('data',)])
>>> graph.nodes[-1].name, graph.nodes[-1].inputs == (x,)
('neg', True)
"""

import dataclasses
from collections.abc import Mapping, Sequence

from dualpipe_jax._split_vjp.graph import Atom, Graph, Node, When
from dualpipe_jax._split_vjp.primitives import COMMUTE_WITH_SUMS


def without_reductions(
    graph: Graph, gradients: Sequence[Atom]
) -> tuple[list[Atom], list[tuple[str, ...]]]:
    """Finds the operands of the sums over mesh axes that end `gradients`.

    Returns:
      For every gradient a value, for which nodes are added to the graph where it needs some, and
      the axes over which it is still to be summed.
    """
    producer = {value: node for node in graph.nodes for value in node.outputs}
    found = [_before(graph, producer, value) for value in gradients]
    return [value for value, _ in found], [tuple(sorted(axes)) for _, axes in found]


def _before(
    graph: Graph, producer: Mapping[int, Node], value: Atom
) -> tuple[Atom, tuple[str, ...]]:
    node = producer.get(value) if isinstance(value, int) else None
    if node is None or len(node.outputs) != 1:
        return value, ()
    if node.reduces:
        inner, axes = _before(graph, producer, node.inputs[0])
        return inner, (*axes, *node.reduces)
    if node.name == "add_any" or (node.name in COMMUTE_WITH_SUMS and len(node.inputs) == 1):
        found = [_before(graph, producer, part) for part in node.inputs]
        axes_found = {tuple(sorted(axes)) for _, axes in found}
        if len(axes_found) == 1 and found[0][1]:
            output = graph.new_value(graph.avals[node.outputs[0]], node.when)
            inputs = tuple(part for part, _ in found)
            latest = max((graph.when[i] for i in inputs if isinstance(i, int)), default=When.ALWAYS)
            assert latest <= node.when
            graph.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=(output,)))
            return output, found[0][1]
    return value, ()
