"""Reductions over mesh axes at the end of a gradient, taken out, to be done once after the loop.

Where a parameter is the same on all devices of an axis and what it meets is not, its gradient ends
in a sum over them. A sum commutes with the sum over microbatches: what is accumulated is what goes
into it.
"""

import dataclasses
from collections.abc import Sequence

from dualpipe_jax._split_vjp.graph import Constant, Graph, Node, When

# Linear, and alike for every device: a reduction may change places with these.
_MOVABLE = frozenset(
    {"convert_element_type", "copy", "expand_dims", "neg", "reshape", "squeeze", "transpose"}
)


def without_reductions(
    graph: Graph, gradients: Sequence[int | Constant]
) -> tuple[list[int | Constant], list[tuple[str, ...]]]:
    """Finds what is to be summed over which mesh axes to give `gradients`.

    Returns:
      For every gradient a value, for which nodes are added to the graph where it needs some, and
      the axes over which it is still to be summed.
    """
    producer = {value: node for node in graph.nodes for value in node.outputs}
    found = [_before(graph, producer, value) for value in gradients]
    return [value for value, _ in found], [tuple(sorted(axes)) for _, axes in found]


def _before(
    graph: Graph, producer: dict[int, Node], value: int | Constant
) -> tuple[int | Constant, tuple[str, ...]]:
    node = producer.get(value) if isinstance(value, int) else None
    if node is None or len(node.outputs) != 1:
        return value, ()
    if node.reduces:
        inner, axes = _before(graph, producer, node.inputs[0])
        return inner, (*axes, *node.reduces)
    if node.name == "add_any" or (node.name in _MOVABLE and len(node.inputs) == 1):
        found = [_before(graph, producer, part) for part in node.inputs]
        kinds = {tuple(sorted(axes)) for _, axes in found}
        if len(kinds) == 1 and found[0][1]:
            output = graph.new_value(graph.avals[node.outputs[0]], node.when)
            inputs = tuple(part for part, _ in found)
            late = max((graph.when[i] for i in inputs if isinstance(i, int)), default=When.ALWAYS)
            assert late <= node.when
            graph.nodes.append(dataclasses.replace(node, inputs=inputs, outputs=(output,)))
            return output, found[0][1]
    return value, ()
