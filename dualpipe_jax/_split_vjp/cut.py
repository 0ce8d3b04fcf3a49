"""What to keep between two phases: a minimum cut through the values of a graph.

Values that one phase makes and a later phase needs must be kept in memory, or made again from
others that are kept. The cheapest choice, counted in bytes, is a minimum cut of a flow network
(as in Horwitz et al.'s register rematerialisation, and PyTorch AOTAutograd's partitioner).
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from dualpipe_jax._split_vjp.graph import Node

# Cheap enough to run twice anywhere: no reduction, no contraction, nothing transcendental. XLA
# fuses these into whatever reads them.
CHEAP = frozenset(
    """
    abs add add_any and broadcast_in_dim ceil clamp convert_element_type copy div eq expand_dims
    floor ge gt integer_pow iota is_finite le lt max min mul ne neg not one_minus_square or real
    reshape rev round rsqrt select_n sign slice sqrt square squeeze stop_gradient sub transpose
    unstack xor
    """.split()  # noqa: SIM905
)
# Cheap enough to run again in the backward, rather than keep a value for each: elementwise too, and
# a small part of the work of the contraction that reads them. (On a TPU v5e, a GELU's input and
# output kept in slots cost more time than its second tanh; a softmax kept its exponentials twice.)
CHEAP_LATER = CHEAP | frozenset(
    """
    acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1
    lgamma log log1p log2 logistic pow rem sin sinh tan tanh
    """.split()  # noqa: SIM905
)
# What a weight gradient's tail may do early, so that its small result is kept instead of its input.
REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or"})

_LARGEST = 2**20  # scipy's flow counts in int32: sizes are scaled so that their sum stays below


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
    values, frontier = set(wanted), list(wanted)
    while frontier:
        node = producer.get(frontier.pop())
        if node is not None and can_redo(node):
            fresh = [v for v in node.reads if v not in values and not is_free(v)]
            values.update(fresh)
            frontier.extend(fresh)

    order = sorted(values)
    index = {v: i for i, v in enumerate(order)}
    # Vertices: 2i is value i before the choice to keep it, 2i + 1 after; the edge between them
    # costs its bytes. Cutting it means keeping it.
    source, sink = 2 * len(order), 2 * len(order) + 1
    total = sum(size(v) for v in order) or 1
    unit = max(1.0, total / (_LARGEST * 512))
    infinite = _LARGEST * 1024
    edges: dict[tuple[int, int], int] = {}
    for v in order:
        node = producer.get(v)
        # One byte at least, so that a smaller number of empty values is preferred as well.
        edges[2 * index[v], 2 * index[v] + 1] = (
            int(np.ceil(size(v) / unit)) + 1 if v not in too_late else infinite
        )
        if node is not None and can_redo(node):
            for u in node.reads:
                if u in index:
                    edges[2 * index[u] + 1, 2 * index[v]] = infinite
        else:
            edges[source, 2 * index[v]] = infinite
    for v in wanted:
        edges[2 * index[v] + 1, sink] = infinite

    shape = (sink + 1, sink + 1)
    rows, cols = np.array(list(edges), np.int32).T
    capacity = csr_array((np.array(list(edges.values()), np.int32), (rows, cols)), shape=shape)
    flow = maximum_flow(capacity, source, sink).flow
    left = csr_array((capacity - flow).maximum(0))
    left.eliminate_zeros()
    start, graph = (sink, csr_array(left.T)) if prefer_late else (source, left)
    reached = set(breadth_first_order(graph, start, return_predecessors=False).tolist())
    is_before = (lambda i: i not in reached) if prefer_late else (lambda i: i in reached)
    return {v for v in order if is_before(2 * index[v]) and not is_before(2 * index[v] + 1)}
