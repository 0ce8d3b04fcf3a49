"""Helps compilers with the programs of a block, without changing a value.

Compilers fuse the equations that make a value with those that read it unless something stands in
between, read a value whole where a part of it would do, and repeat in every trip of a loop a cast
that could be done once before it. `memory_order.py` helps with the layout of slots.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from jax import lax

from dualpipe_jax._split_vjp.graph import Graph, Node, When
from dualpipe_jax._split_vjp.primitives import (
    CHEAP,
    CHEAP_IN_BACKWARD,
    KEEP_MOVED,
    MOVES,
    VIEWS,
)

_MOST_PARTS = 8
# By leaf of params and dtype the values that are that leaf cast to that dtype.
Casts = dict[tuple[int, Any], list[int]]


def finish_chains(graph: Graph, nodes: Sequence[Node], stored: Collection[int]) -> list[Node]:
    """Puts a barrier before each contraction that reads the end of an elementwise chain.

    XLA's compiler for TPUs may fuse an activation function into the contraction that reads it,
    which then computes it again for every tile. It mostly does not where the activation's input is
    stored besides; where nothing is, as in a rematerialised block's forward, it may. (TPU v5e, a
    GELU of width 4096 between matmuls of width 1024: the second matmul took 431,000 cycles instead
    of 273,000, the layer 3 % more.) A barrier before the contraction keeps the chain with its
    producer.

    Only a chain with a step that is no plain arithmetic counts, and only if the result of the
    contraction at its beginning is not stored anyway. A chain through a reduction, such as a
    softmax, is left as it is.

    >>> import numpy as np
    >>> from dualpipe_jax._split_vjp.graph import show
    >>> graph = Graph()
    >>> x, a, b, y = (graph.new_value(np.zeros(3), When.FORWARD) for _ in range(4))
    >>> names = ["dot_general", "tanh", "dot_general"]
    >>> chain = [Node(name, len, (i,), (i + 1,), When.FORWARD) for i, name in enumerate(names)]
    >>> show(finish_chains(graph, chain, stored=[]), {x: "x", a: "a", b: "b", y: "y"})
    a = dot_general x
    b = tanh a
    v4 = optimization_barrier b
    y = dot_general v4

    Args:
      graph: The graph; it gets a new value for each barrier.
      nodes: Nodes in order.
      stored: The values that are stored.

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
            contracted.update(set(node.outputs).difference(stored))
        elif node.name in CHEAP_IN_BACKWARD and before and before <= contracted | chained:
            is_plain = node.name in CHEAP and not before & chained
            made = contracted if is_plain else chained
            made.update(set(node.outputs).difference(stored))
        out.append(node)
    return out


def _barrier(value: int, held: int, when: When) -> Node:
    def run(array: object) -> list[object]:
        return [lax.optimization_barrier(array)]

    return Node("optimization_barrier", run, (value,), (held,), when)


def may_wait(
    nodes: Sequence[Node], stash: Sequence[int], cotangents: Iterable[int]
) -> tuple[bool, ...]:
    """For each value of a stash, whether a barrier may hold it up at no cost.

    A barrier has a value written to memory as it is. A value that is only recomputed, or only
    moved, else never is: the contractions that read it make it as they go. So only values computed
    from the cotangents wait, and with them the contractions that read some of them; contractions
    that read moved values alone may run earlier. If nothing was computed all of the stash waits.

    (TPU v5e, DualPipe's steady loop, estimated cycles: an MLP block of width 1024 under
    rematerialisation 1.3 % less than if all of the stash waits, a transformer's 1.5 to 2 %.)

    >>> nodes = [
    ...     Node("mul", len, (0, 1), (2,), When.BACKWARD),
    ...     Node("transpose", len, (2,), (3,), When.BACKWARD),
    ...     Node("tanh", len, (1,), (4,), When.BACKWARD),
    ... ]
    >>> may_wait(nodes, stash=[2, 3, 4], cotangents=[0])
    (True, False, False)

    Args:
      nodes: The nodes that make the values, in order.
      stash: The values.
      cotangents: The input grad's cotangents, received from the next layer.
    """
    computed = set(cotangents)
    moved: set[int] = set()
    for node in nodes:
        if computed.intersection(node.reads):
            computed.update(node.outputs)
        keeps = node.name in KEEP_MOVED and moved.issuperset(node.reads)
        if node.name in MOVES or (node.reads and keeps):
            moved.update(node.outputs)
    may = tuple(value in computed and value not in moved for value in stash)
    return may if any(may) else (True,) * len(stash)


def parts_of(
    graph: Graph, nodes: Sequence[Node], values: Sequence[int], wanted: Iterable[int]
) -> tuple[int, ...]:
    """For each of the values, into how many parts along its first dim all its readers cut it.

    Such a value, as stacked queries, keys and values are, is read from a slot part by part: a
    contraction reads a part in place, while a whole that several contractions read would be copied.
    (TPU v5e, a transformer's steady loop, estimated cycles: 1 % less.) A value with many parts,
    such as the rows of an unrolled loop, is read as a whole.

    Args:
      graph: The graph.
      nodes: The nodes that may read them.
      values: The values.
      wanted: The values that are read besides.
    """
    whole = set(wanted)
    for node in nodes:
        for value in node.reads:
            shape = tuple(graph.avals[value].shape)
            outputs = [tuple(graph.avals[v].shape) for v in node.outputs]
            is_part = (node.name == "slice" and outputs == [(1, *shape[1:])]) or (
                node.name == "unstack" and outputs == [shape[1:]] * shape[0]
            )
            if len(shape) < 2 or shape[0] > _MOST_PARTS or not is_part:
                whole.add(value)
    read = {value for node in nodes for value in node.reads}
    return tuple(graph.avals[value].shape[0] if value in read - whole else 1 for value in values)


def find_casts(graph: Graph, params: Sequence[int]) -> Casts:
    """Finds the casts of parameters to smaller dtypes.

    Within a loop over microbatches they would be done once for each, and XLA takes them out on some
    platforms only.
    """
    index = {value: i for i, value in enumerate(params)}
    found: Casts = {}
    for node in graph.nodes:
        # A cast of a constant of the trace reads nothing.
        value = node.reads[0] if node.reads else None
        if node.name != "convert_element_type" or value not in index:
            continue
        source, target = (graph.avals[v] for v in (value, node.outputs[0]))
        if target.dtype.itemsize < source.dtype.itemsize:
            found.setdefault((index[value], target.dtype), []).append(node.outputs[0])
    return dict(sorted(found.items(), key=lambda item: item[0][0]))


def find_reads(params: Sequence[int], casts: Casts, nodes: Sequence[Node]) -> tuple[bool, ...]:
    """For every parameter, whether any node but the casts reads it."""
    made_by_casts = {v for values in casts.values() for v in values}
    read = {v for n in nodes if not made_by_casts.intersection(n.outputs) for v in n.reads}
    return tuple(value in read for value in params)


def find_rounded(params: Sequence[int], nodes: Sequence[Node]) -> tuple[bool, ...]:
    """For every parameter, whether only rough contractions read it, as it is or moved."""
    readers: dict[int, list[Node]] = {}
    for node in nodes:
        for value in node.reads:
            readers.setdefault(value, []).append(node)

    def is_rounded(value: int) -> bool:
        return value in readers and all(
            node.is_rough or (node.name in VIEWS and all(map(is_rounded, node.outputs)))
            for node in readers[value]
        )

    return tuple(map(is_rounded, params))
