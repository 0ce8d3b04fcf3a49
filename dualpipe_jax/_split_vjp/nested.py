"""Splits every equation of a graph that holds a program of its own.

Scans, conditionals and `shard_map`s. Other calls are opened when the graph is made, or left whole.
"""

from collections.abc import Iterable
from typing import Any

from dualpipe_jax._split_vjp.cond import split_branches
from dualpipe_jax._split_vjp.graph import Branches, Graph, Mapped, Node, Scan, When
from dualpipe_jax._split_vjp.scan import split_scan
from dualpipe_jax._split_vjp.shard_map import split_mapped


def split_nested(graph: Graph, wanted: Iterable[Any], *, only: When | None = None) -> list[Node]:
    """Splits what holds a program of its own, and makes more than `wanted` needs.

    Args:
      graph: A graph; values that pass between the halves are added to it.
      wanted: The outputs that the first halves are for.
      only: Which equations to open; None for all.

    Returns:
      The nodes of the graph, in an order in which they can run.
    """
    live = {v for v in wanted if isinstance(v, int)}
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        mine = live.intersection(node.outputs)
        parts = [node]
        if mine and only in (None, node.when):
            if isinstance(node.inner, Scan):
                parts = split_scan(graph, node, node.inner, mine, split_nested)
            elif isinstance(node.inner, Branches):
                parts = split_branches(graph, node, node.inner, mine, split_nested)
            elif isinstance(node.inner, Mapped):
                parts = split_mapped(graph, node, node.inner, mine, split_nested)
        if mine:
            live.update(parts[0].reads)
        nodes.extend(reversed(parts))
    return nodes[::-1]
