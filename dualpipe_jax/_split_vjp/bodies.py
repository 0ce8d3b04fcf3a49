"""Divides the body of an equation: what its first half runs, what its second, what passes between.

In: the body as a graph and the outputs that the first half is for. Out: `Halves`, from which
`cond.py` builds two conditionals and `shard_map.py` two `shard_map`s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dualpipe_jax._split_vjp.cut import CHEAP, minimum_cut
from dualpipe_jax._split_vjp.graph import Constant, Graph, Node, When, needed
from dualpipe_jax._split_vjp.with_input_grad import is_early

# Splits the nodes of a graph, given the outputs that the first halves are for.
SplitInner = Callable[[Graph, Sequence[Any]], list[Node]]


@dataclass(frozen=True)
class Halves:
    """The body of an equation, divided.

    Attributes:
      first: The nodes that make the first half's outputs and `passed`.
      second: The nodes that make the other outputs from `passed` and the body's inputs.
      passed: The values that pass from one to the other; none is an input.
    """

    first: list[Node]
    second: list[Node]
    passed: list[int]


def halve(
    body: Graph,
    inputs: Sequence[int | Constant],
    outputs: Sequence[int | Constant],
    wanted: set[int],
    split_inner: SplitInner,
) -> Halves:
    """Divides `body` into what the outputs of the indices `wanted` need, and the rest.

    What the second half reads is chosen by a minimum cut, the body's inputs among it: they have to
    be kept for it like anything else, unless they depend on parameters alone.
    """
    wanted_first = [v for i, v in enumerate(outputs) if i in wanted]
    wanted_later = [v for i, v in enumerate(outputs) if i not in wanted and isinstance(v, int)]
    nodes = split_inner(body, wanted_first)
    first = needed(nodes, wanted_first)
    in_first = {id(n) for n in first}
    kept = minimum_cut(
        nodes,
        wanted=wanted_later,
        can_keep=lambda n: id(n) in in_first,
        can_redo=lambda n: id(n) not in in_first or n.name in CHEAP,
        size=body.num_bytes,
        is_free=lambda v: body.when[v] is When.ALWAYS,
        prefer_late=False,
    )
    given = {v for v in inputs if isinstance(v, int)}
    return Halves(first, needed(nodes, wanted_later, known=kept), sorted(kept - given))


def made_early(
    body: Graph,
    outputs: Sequence[int | Constant],
    wanted: set[int],
    split_inner: SplitInner,
) -> set[int]:
    """Lists the outputs that the first half makes for `wanted` anyway, or nearly so."""
    wanted_first = [v for i, v in enumerate(outputs) if i in wanted]
    nodes = split_inner(body, wanted_first)
    first = needed(nodes, wanted_first)
    rest = [i for i in range(len(outputs)) if i not in wanted]
    return {i for i in rest if is_early(body, nodes, first, outputs[i])}


def open_body(
    graph: Graph, add: Callable[[Graph, Sequence[Any]], list[Any]], values: Sequence[int | Constant]
) -> tuple[Graph, list[int | Constant], list[int | Constant]]:
    """Makes a graph of an equation's body, its inputs as late as `values` are in `graph`.

    Returns:
      The body, its inputs and its outputs.
    """
    body = Graph()
    inputs = [
        body.new_value(graph.avals[v], min(graph.when[v], When.FORWARD))
        if isinstance(v, int)
        else v
        for v in values
    ]
    return body, inputs, add(body, inputs)
