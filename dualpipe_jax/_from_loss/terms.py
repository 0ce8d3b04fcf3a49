"""Takes the loss, and the metrics beside it, apart into terms of single layers and of the head.

A loss that adds up losses of its layers (a mixture of experts' balance, a penalty on parameters)
would have to carry them all to the head; as terms they stay in their layers, `Aux(loss=)`. So do
metrics that are sums over layers, or hold a value of each, `Aux(metrics=)`.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp

from dualpipe_jax._from_loss.graph import Graph
from dualpipe_jax._from_loss.values import Literal, Node, Operand, Stack, Value, needed
from dualpipe_jax._model import semantics

_ADDITIONS = ("add", "add_any", "sub")


@dataclass(frozen=True, eq=False)
class Term:
    """One output of a layer, or of the head, beside x.

    Attributes:
      value: The value.
      factor: Its factor.
      places: The metrics that it is a term of: the number of the leaf, and that of its row in the
        leaf, or None for a term of the whole leaf. Empty for a term of the loss.
    """

    value: Operand
    factor: float = 1.0
    places: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def is_loss(self) -> bool:
        """Whether it belongs to the loss."""
        return not self.places


@dataclass
class Terms:
    """Holds the terms of the layers and of the head.

    Attributes:
      of_layers: The terms of each layer.
      of_head: The head's.
    """

    of_layers: list[list[Term]]
    of_head: list[Term] = field(default_factory=list)

    def add(self, terms: Sequence[Term], whole: Term) -> None:
        """Adds the terms of one output where they belong, or else the whole of it to the head."""
        if len(terms) == 1 or not any(map(self._is_of_layer, terms)):
            terms = [whole]
        for term in terms:
            own = self.of_head
            if self._is_of_layer(term):
                assert isinstance(term.value, Value)
                own = self.of_layers[term.value.position]
            same = (
                t
                for t in own
                if t.value is term.value
                and t.factor == term.factor
                and not (t.is_loss or term.is_loss)
            )
            known = next(same, None)
            if known is None:
                own.append(term)
            else:
                known.places.extend(term.places)

    def _is_of_layer(self, term: Term) -> bool:
        """Whether a term stays in its layer; the last layer's may stay in the head at first."""
        if not isinstance(term.value, Value):
            return False
        return 0 <= term.value.position < len(self.of_layers) - (not term.value.is_weights)

    @property
    def values(self) -> list[Value]:
        """The values of all terms."""
        terms = [*self.of_head, *(term for terms in self.of_layers for term in terms)]
        return [term.value for term in terms if isinstance(term.value, Value)]


def split_outputs(
    graph: Graph, outputs: Sequence[Operand | Stack], num_layers: int, *, is_weighted: bool
) -> Terms:
    """Takes a loss and its metrics apart.

    Args:
      graph: The graph.
      outputs: The loss, then the leaves of the metrics.
      num_layers: The number of layers.
      is_weighted: Whether the loss is divided by a weight of the batch; losses of layers never are,
        so that it stays whole.
    """
    terms = Terms([[] for _ in range(num_layers)])
    sums = _Sums(outputs, is_weighted=is_weighted)
    for number, value in enumerate(outputs):
        leaf = number - 1
        whole: list[tuple[int, int | None]] = [(leaf, None)] if number else []
        if isinstance(value, Stack):
            rows = map(graph.as_value, value.items)
            parts = [Term(v, places=[(leaf, row)]) for row, v in enumerate(rows)]
            value = graph.as_value(value)
        elif number or not is_weighted:
            parts = [Term(v, factor, list(whole)) for factor, v in sums.parts(value)]
        else:
            parts = []
        terms.add(parts, Term(value, places=whole))
    return terms


class _Sums:
    """Takes outputs apart that are sums.

    An equation is taken apart if its operands need not travel to it: nothing else in a later layer
    reads them.
    """

    def __init__(self, outputs: Sequence[Operand | Stack], *, is_weighted: bool):
        read = [a for a in outputs if not isinstance(a, Stack)]
        read += [v for a in outputs if isinstance(a, Stack) for v in a.values]
        readers: dict[Value, list[Node]] = defaultdict(list)
        for node in needed(read):
            for value in node.reads:
                readers[value].append(node)
        self._parts: dict[Node, list[tuple[float, Operand]]] = {}
        # A metric takes nothing apart that the loss, which comes first, has whole.
        seen: set[Node] = set(needed(read[:1])) if is_weighted else set()
        of_metrics = [a for a in outputs[1:] if isinstance(a, Value)]
        for roots in (() if is_weighted else outputs[:1], of_metrics):
            todo = [value for value in roots if isinstance(value, Value)]
            while todo:
                node = todo.pop().node
                if node is None or node in seen:
                    continue
                seen.add(node)
                parts = _parts(node, is_loss=roots is not of_metrics)
                if parts is not None:
                    self._parts[node] = parts
                    todo.extend(v for _, v in parts if isinstance(v, Value))

        def travels(value: Value) -> bool:
            behind = (node for node in readers[value] if _position(node) > value.position)
            return any(node not in self._parts for node in behind)

        is_stable = False
        while not is_stable:
            whole = [
                node
                for node, parts in self._parts.items()
                if any(
                    isinstance(v, Value) and 0 <= v.position < _position(node) and travels(v)
                    for _, v in parts
                )
            ]
            for node in whole:
                del self._parts[node]
            is_stable = not whole

    def parts(self, output: Operand) -> list[tuple[float, Operand]]:
        """Lists the terms, and their factors, of which an output is the sum.

        A value that is added several times (a moving average's) is taken apart once: the equations
        are visited from the last to the first, when all that read a value have been.
        """
        factors: dict[Operand, float] = {output: 1.0}
        todo = [(-_number(output), 0, output)]
        pushed, terms = 1, []
        while todo:
            _, _, value = heapq.heappop(todo)
            factor = factors.pop(value)
            node = value.node if isinstance(value, Value) else None
            if node is None or node not in self._parts:
                terms.append((factor, value))
                continue
            for part, operand in self._parts[node]:
                if operand not in factors:
                    heapq.heappush(todo, (-_number(operand), pushed, operand))
                    pushed += 1
                factors[operand] = factors.get(operand, 0.0) + factor * part
        return terms[::-1]


def _position(node: Node) -> int:
    return node.results[0].position


def _number(operand: Operand) -> int:
    """Gives the number of the equation that makes a value; -1 for inputs and literals."""
    return operand.node.number if isinstance(operand, Value) and operand.node is not None else -1


def _parts(node: Node, *, is_loss: bool) -> list[tuple[float, Operand]] | None:
    """Takes one addition, or scaling, apart; None for other equations."""
    operands, aval, name = node.operands, node.results[0].aval, node.name
    dtype = aval.dtype
    if jnp.issubdtype(dtype, jnp.integer) and semantics.accumulator_dtype(dtype) != dtype:
        return None  # small and unsigned integers may wrap, and sums over microbatches do not
    if name in _ADDITIONS and all(
        isinstance(a, Literal) or a.aval.shape == aval.shape for a in operands
    ):
        return [(1.0, operands[0]), (-1.0 if name == "sub" else 1.0, operands[1])]
    if name == "neg":
        return [(-1.0, operands[0])]
    if name == "stop_gradient" and not is_loss:
        return [(1.0, operands[0])]
    if not all(jnp.issubdtype(a.aval.dtype, jnp.floating) for a in (node.results[0], *operands)):
        return None
    literals = [a for a in operands if isinstance(a, Literal)]
    if name == "mul" and len(literals) == 1:
        other = operands[1] if operands[0] is literals[0] else operands[0]
        return _scaling(float(literals[0].value), other)
    if name == "div" and len(literals) == 1 and operands[1] is literals[0]:
        divisor = float(literals[0].value)
        return _scaling(1 / divisor, operands[0]) if divisor else None
    if name == "convert_element_type" and isinstance(operands[0], Value):
        return [(1.0, operands[0])]
    return None


def _scaling(factor: float, operand: Operand) -> list[tuple[float, Operand]] | None:
    return [(factor, operand)] if math.isfinite(factor) else None
