"""Splits equations that hold programs of their own: shared by `scan`, `cond` and `shard_map`.

A transposed scan, conditional or shard_map makes dx and dW together. Each is replaced by two: the
first makes the outputs that dx needs, and passes the values that the second needs; the second makes
the rest from them. The body is divided as a whole block is, by liveness and a minimum cut.

Calls (jit, remat, custom_vjp) never come here: `equations.append` has opened them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dualpipe_jax._split_vjp.cut import minimum_cut
from dualpipe_jax._split_vjp.graph import Atom, Graph, Node, When, needed, numbers
from dualpipe_jax._split_vjp.primitives import CHEAP
from dualpipe_jax._split_vjp.with_input_grad import is_made_with

# Appends a body's equations to a graph, given atoms for its inputs, and returns its outputs.
Body = Callable[[Graph, Sequence[Atom]], list[Atom]]


@dataclass(frozen=True)
class Opened:
    """The body of an equation as a graph of its own, and its inputs and outputs there."""

    graph: Graph
    inputs: list[Atom]
    outputs: list[Atom]


@dataclass(frozen=True)
class Division:
    """A body's nodes, divided.

    Attributes:
      first: The nodes that make the first equation's outputs and `passed`.
      second: The nodes that make the other outputs from `passed` and the body's inputs.
      passed: The values that pass from the first to the second; none is an input.
    """

    first: list[Node]
    second: list[Node]
    passed: list[int]


def open_body(graph: Graph, body: Body, values: Sequence[Atom]) -> Opened:
    """Makes a graph of an equation's body, whose inputs are known when `values` of `graph` are."""
    inner = Graph()
    inputs: list[Atom] = [
        inner.new_value(graph.avals[v], min(graph.when[v], When.FORWARD))
        if isinstance(v, int)
        else v
        for v in values
    ]
    return Opened(inner, inputs, body(inner, inputs))


def split_bodies(graph: Graph, wanted: Iterable[Atom], *, only: When | None = None) -> list[Node]:
    """Splits each equation that holds programs and makes more than `wanted` needs.

    `scan.py`, `cond.py` and `shard_map.py` have an example each.

    Args:
      graph: A graph; values that pass from a first equation to its second are added to it.
      wanted: The outputs that the first equations are for.
      only: Which equations to split, by the time they run; None for all.

    Returns:
      The nodes of the graph, in an order in which they can run.
    """
    live = set(numbers(wanted))
    nodes: list[Node] = []
    for node in reversed(graph.nodes):
        live_outputs = live.intersection(node.outputs)
        parts = [node]
        if live_outputs:
            if node.inner is not None and only in (None, node.when):
                parts = node.inner.split(graph, node, live_outputs)
            live.update(parts[0].reads)
        nodes.extend(reversed(parts))
    return nodes[::-1]


def divide_body(body: Opened, wanted: set[int]) -> Division:
    """Divides `body` into the nodes that its outputs of the indices `wanted` need, and the rest.

    A minimum cut chooses the values that the second part reads, the body's inputs among them: they
    have to be kept for it like any other value, unless they depend on parameters alone.
    """
    graph = body.graph
    wanted_first = [v for i, v in enumerate(body.outputs) if i in wanted]
    wanted_second = numbers(v for i, v in enumerate(body.outputs) if i not in wanted)
    nodes = split_bodies(graph, wanted_first)
    first = needed(nodes, wanted_first)
    passed = cut_between(graph, nodes, first, wanted_second, is_free=graph.is_free)
    given = set(numbers(body.inputs))
    return Division(first, needed(nodes, wanted_second, known=passed), sorted(passed - given))


def cut_between(
    graph: Graph,
    nodes: Sequence[Node],
    first: Sequence[Node],
    wanted: Iterable[int],
    *,
    is_free: Callable[[int], bool],
) -> set[int]:
    """Chooses the values that the nodes `first` keep for making `wanted` later."""
    in_first = {id(n) for n in first}
    return minimum_cut(
        nodes,
        wanted=wanted,
        can_keep=lambda n: id(n) in in_first,
        can_redo=lambda n: id(n) not in in_first or n.name in CHEAP,
        size=graph.num_bytes,
        is_free=is_free,
        prefer_late=False,
    )


def outputs_made_with(body: Opened, wanted: set[int]) -> set[int]:
    """Finds the other outputs that the first part makes for `wanted` anyway, or nearly so."""
    wanted_first = [v for i, v in enumerate(body.outputs) if i in wanted]
    nodes = split_bodies(body.graph, wanted_first)
    first = needed(nodes, wanted_first)
    rest = [i for i in range(len(body.outputs)) if i not in wanted]
    return {i for i in rest if is_made_with(body.graph, nodes, first, body.outputs[i])}
