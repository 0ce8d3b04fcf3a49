"""Chooses the values to keep between two phases: a minimum cut through the values of a graph.

Values that one phase makes and a later phase needs must be kept in memory, or made again from
others that are kept. The cheapest choice, counted in bytes, is a minimum cut of a flow network
(as in Horwitz et al.'s register rematerialisation, and PyTorch AOTAutograd's partitioner).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from dualpipe_jax._split_vjp.graph import Node

_LARGEST = 2**20  # scipy's flow counts in int32: sizes are scaled so that their sum stays below
_INFINITE = _LARGEST * 1024


def minimum_cut(
    nodes: Sequence[Node],
    *,
    wanted: Iterable[int],
    can_keep: Callable[[Node], bool],
    can_redo: Callable[[Node], bool],
    size: Callable[[int], int],
    is_free: Callable[[int], bool],
    prefer_late: bool,
) -> set[int]:
    """Chooses the values to keep so that `wanted` can be made from them, in the fewest bytes.

    A sum over rows and its square root: with 8 bytes a row, the sum or its root is the narrowest
    value, and of the two the root is nearest to the result.

    >>> from dualpipe_jax._split_vjp.graph import When
    >>> names = ["multiply", "sum", "sqrt", "broadcast"]
    >>> nodes = [Node(name, len, (i,), (i + 1,), When.FORWARD) for i, name in enumerate(names)]
    >>> sizes = [800, 800, 8, 8, 800]
    >>> for prefer_late in (False, True):
    ...     minimum_cut(
    ...         nodes,
    ...         wanted=[4],
    ...         can_keep=bool,
    ...         can_redo=bool,
    ...         size=sizes.__getitem__,
    ...         is_free=lambda v: False,
    ...         prefer_late=prefer_late,
    ...     )
    {2}
    {3}

    Args:
      nodes: All nodes between which to choose. A value without a node here is an input: it can be
        kept but not made.
      wanted: The values that the later phase needs.
      can_keep: Whether a node may run in the earlier phase, its outputs being kept; it can if all
        nodes before it can.
      can_redo: Whether a node may run in the later phase.
      size: A value's bytes.
      is_free: Whether a value is at hand in both phases.
      prefer_late: Among equal cuts, keep those nearest to `wanted` (the least work in the later
        phase), or those farthest from it.
    """
    wanted = {v for v in wanted if not is_free(v)}
    if not wanted:
        return set()
    producer = {v: node for node in nodes for v in node.outputs}
    too_late: set[int] = set()  # made by a node that must run in the later phase, or after one
    for node in nodes:
        if not can_keep(node) or too_late.intersection(node.reads):
            too_late.update(node.outputs)
    order = sorted(_reachable(wanted, producer, can_redo, is_free))
    index = {v: i for i, v in enumerate(order)}
    # Vertices: 2i is value i before the choice to keep it, 2i + 1 after; the edge between them
    # costs its bytes. Cutting it means keeping it.
    source, sink = 2 * len(order), 2 * len(order) + 1
    total = sum(size(v) for v in order) or 1
    unit = max(1.0, total / (_LARGEST * 512))
    edges: dict[tuple[int, int], int] = {}
    for v in order:
        node = producer.get(v)
        # One byte at least, so that a smaller number of empty values is preferred as well.
        edges[2 * index[v], 2 * index[v] + 1] = (
            int(np.ceil(size(v) / unit)) + 1 if v not in too_late else _INFINITE
        )
        if node is not None and can_redo(node):
            for u in node.reads:
                if u in index:
                    edges[2 * index[u] + 1, 2 * index[v]] = _INFINITE
        else:
            edges[source, 2 * index[v]] = _INFINITE
    for v in wanted:
        edges[2 * index[v] + 1, sink] = _INFINITE
    is_before = _source_side(edges, source, sink, prefer_late=prefer_late)
    return {v for v in order if is_before(2 * index[v]) and not is_before(2 * index[v] + 1)}


def _reachable(
    wanted: set[int],
    producer: Mapping[int, Node],
    can_redo: Callable[[Node], bool],
    is_free: Callable[[int], bool],
) -> set[int]:
    """Collects `wanted` and all values from which the later phase could make them."""
    values, frontier = set(wanted), list(wanted)
    while frontier:  # a value enters it once, when it is first seen
        node = producer.get(frontier.pop())
        if node is not None and can_redo(node):
            fresh = {v for v in node.reads if v not in values and not is_free(v)}
            values.update(fresh)
            frontier.extend(fresh)
    return values


def _source_side(
    edges: Mapping[tuple[int, int], int], source: int, sink: int, *, prefer_late: bool
) -> Callable[[int], bool]:
    """Finds which vertices a minimum cut leaves on the source's side."""
    shape = (sink + 1, sink + 1)
    rows, cols = np.array(list(edges), np.int32).T
    capacity = csr_array((np.array(list(edges.values()), np.int32), (rows, cols)), shape=shape)
    flow = maximum_flow(capacity, source, sink).flow
    left = csr_array((capacity - flow).maximum(0))
    left.eliminate_zeros()
    start, graph = (sink, csr_array(left.T)) if prefer_late else (source, left)
    reached = set(breadth_first_order(graph, start, return_predecessors=False).tolist())
    return (lambda i: i not in reached) if prefer_late else (lambda i: i in reached)
