"""How a block and its vjp read the block's parameters: cast, rounded, or as they are.

In: nodes of the graph of both, and the values that the parameters are in it.
"""

from collections.abc import Sequence
from typing import Any

from dualpipe_jax._split_vjp.graph import Graph, Node

# They give a value or parts of it, in another order or shape.
_VIEWS = frozenset(
    "copy expand_dims reshape rev slice split squeeze transpose unstack".split()  # noqa: SIM905
)


def find_casts(
    graph: Graph, params: Sequence[int], nodes: Sequence[Node]
) -> dict[tuple[int, Any], list[int]]:
    """Finds the casts of parameters to smaller dtypes: by place and dtype the values that they are.

    Done within a loop over microbatches they are done once for each, and XLA only takes them out
    on some platforms.
    """
    place = {value: i for i, value in enumerate(params)}
    found: dict[tuple[int, Any], list[int]] = {}
    for node in nodes:
        # A cast of what is a constant of the trace reads nothing.
        value = node.reads[0] if node.reads else None
        if node.name != "convert_element_type" or value not in place:
            continue
        source, target = (graph.avals[v] for v in (value, node.outputs[0]))
        if target.dtype.itemsize < source.dtype.itemsize:
            found.setdefault((place[value], target.dtype), []).append(node.outputs[0])
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def find_reads(
    params: Sequence[int], casts: dict[tuple[int, Any], list[int]], nodes: Sequence[Node]
) -> tuple[bool, ...]:
    """For every parameter, whether any node but the casts reads it."""
    made_by_casts = {v for values in casts.values() for v in values}
    read = {v for n in nodes if not made_by_casts.intersection(n.outputs) for v in n.reads}
    return tuple(value in read for value in params)


def find_rounded(params: Sequence[int], nodes: Sequence[Node]) -> tuple[bool, ...]:
    """For every parameter, whether nothing but rough contractions reads it, be it moved first."""
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for value in node.reads:
            readers.setdefault(value, []).append(node)

    def is_rounded(value: int) -> bool:
        return value in readers and all(
            node.is_rough or (node.name in _VIEWS and all(map(is_rounded, node.outputs)))
            for node in readers[value]
        )

    return tuple(map(is_rounded, params))
