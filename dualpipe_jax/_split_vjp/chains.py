"""Elementwise chains between two contractions: computed where they begin, not where they are read.

XLA's compiler for TPUs may fuse an activation function into the contraction that reads it, which
then computes it again for every tile. It mostly does not where the activation's input is stored
besides; where nothing is, as in a rematerialised block's forward, it may. (TPU v5e, a GELU of width
4096 between matmuls of width 1024: the second matmul took 431,000 cycles instead of 273,000, the
layer 3 % more.) A barrier before the contraction keeps the chain with its producer.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace

from jax import lax

from dualpipe_jax._split_vjp.cut import CHEAP, CHEAP_LATER
from dualpipe_jax._split_vjp.graph import Graph, Node, When


def finish_chains(graph: Graph, nodes: Sequence[Node], kept: Collection[int]) -> list[Node]:
    """Puts a barrier before each contraction that reads what is made elementwise of others alone.

    Only chains with a step that is no plain arithmetic count, and only of contractions whose
    results are not kept anyway. What goes through a reduction, as a softmax, is left as it is.

    Args:
      graph: The graph; it gets a new value for each barrier.
      nodes: Nodes in order.
      kept: The values that are stored.

    Returns:
      The nodes, with the barriers between them.
    """
    contracted: set[int] = set()  # by a contraction, or by plain arithmetic on its results
    chained: set[int] = set()  # by more than that
    out = []
    for node in nodes:
        before = {v for v in node.reads if graph.when[v] is not When.ALWAYS}
        if node.name == "dot_general":
            waiting = {v: graph.new_value(graph.avals[v], graph.when[v]) for v in before & chained}
            out += [_barrier(v, held, node.when) for v, held in sorted(waiting.items())]
            inputs = (waiting.get(i, i) if isinstance(i, int) else i for i in node.inputs)
            node = replace(node, inputs=tuple(inputs))
            contracted.update(set(node.outputs).difference(kept))
        elif node.name in CHEAP_LATER and before and before <= contracted | chained:
            is_plain = node.name in CHEAP and not before & chained
            made = contracted if is_plain else chained
            made.update(set(node.outputs).difference(kept))
        out.append(node)
    return out


def _barrier(value: int, held: int, when: When) -> Node:
    def run(array: object) -> list[object]:
        return [lax.optimization_barrier(array)]

    return Node("optimization_barrier", run, (value,), (held,), when)
