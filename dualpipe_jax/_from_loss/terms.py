"""Takes the loss, and the metrics beside it, apart into terms of single layers and of the head.

A loss that adds up losses of its layers (a mixture of experts' balance, a penalty on parameters)
would have to carry them all to the head; as terms they stay in their layers, `Aux(loss=)`. So do
metrics that hold a value of each layer, `Aux(metrics=)`.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from dualpipe_jax._from_loss.values import Literal, Operand, Value

_ADDITIONS = ("add", "add_any", "sub")


@dataclass(frozen=True, eq=False)
class Term:
    """One output of a layer, or of the head, beside x.

    Attributes:
      value: The value; a loss's term is the sum of its elements.
      factor: The factor of a loss's term; None for a metric.
      leaf: The number of the metric's leaf.
      row: The number of its row in the leaf; None if it is the whole leaf.
    """

    value: Operand
    factor: float | None = None
    leaf: int = -1
    row: int | None = None


@dataclass
class Terms:
    """Holds the terms of the layers and of the head.

    Attributes:
      of_layers: The terms of each layer.
      of_head: The head's.
      is_split: Whether the loss is a sum of several terms.
    """

    of_layers: list[list[Term]]
    of_head: list[Term] = field(default_factory=list)
    is_split: bool = False

    def add(self, term: Term) -> None:
        """Adds a term where it belongs; the last layer's terms stay in the head at first."""
        position = term.value.position if isinstance(term.value, Value) else -1
        last = len(self.of_layers) - 1
        is_penalty = isinstance(term.value, Value) and term.value.is_weights
        if 0 <= position < last or (position == last and is_penalty and term.factor is not None):
            self.of_layers[position].append(term)
            self.is_split |= term.factor is not None
        else:
            self.of_head.append(term)

    @property
    def values(self) -> list[Value]:
        """The values of all terms."""
        terms = [*self.of_head, *(term for terms in self.of_layers for term in terms)]
        return [term.value for term in terms if isinstance(term.value, Value)]


def split_outputs(outputs: Sequence[Operand], num_layers: int, *, is_weighted: bool) -> Terms:
    """Takes a loss and its metrics apart.

    Args:
      outputs: The loss, then the leaves of the metrics.
      num_layers: The number of layers.
      is_weighted: Whether the loss is divided by a weight of the batch; losses of layers never are,
        so that it stays whole.
    """
    terms = Terms([[] for _ in range(num_layers)])
    loss, *metrics = outputs
    parts = [(1.0, loss)] if is_weighted else _sum(loss)
    for factor, value in parts:
        terms.add(Term(value, factor=factor))
    if not terms.is_split:
        terms.of_head = [Term(loss, factor=1.0)]
    for leaf, value in enumerate(metrics):
        rows = _rows(value)
        positions = [v.position for v in rows if isinstance(v, Value)]
        if any(0 <= position < num_layers - 1 for position in positions):
            for row, of_row in enumerate(rows):
                terms.add(Term(of_row, leaf=leaf, row=row))
        else:
            terms.add(Term(value, leaf=leaf))
    return terms


def _sum(loss: Operand) -> list[tuple[float, Operand]]:
    """Lists the terms, and their factors, of which a value is the sum.

    A value that is added several times (a moving average's) is taken apart once: the equations are
    visited from the last to the first, when all that read a value have been.
    """
    factors: dict[Operand, float] = {loss: 1.0}
    todo = [(-_number(loss), 0, loss)]
    pushed, terms = 1, []
    while todo:
        _, _, value = heapq.heappop(todo)
        factor, parts = factors.pop(value), _parts(value)
        if parts is None:
            terms.append((factor, value))
        for part, operand in parts or ():
            if operand not in factors:
                heapq.heappush(todo, (-_number(operand), pushed, operand))
                pushed += 1
            factors[operand] = factors.get(operand, 0.0) + factor * part
    return terms[::-1]


def _number(operand: Operand) -> int:
    """Gives the number of the equation that makes a value; -1 for inputs and literals."""
    return operand.node.number if isinstance(operand, Value) and operand.node is not None else -1


def _parts(value: Operand) -> list[tuple[float, Operand]] | None:
    """Takes one addition, or scaling, apart; None for other values."""
    if isinstance(value, Literal) or value.node is None:
        return None
    if not jnp.issubdtype(value.aval.dtype, jnp.floating):
        return None
    node, name = value.node, value.node.name
    operands = node.operands
    if name in _ADDITIONS and all(a.aval.shape == value.aval.shape for a in operands):
        return [(1.0, operands[0]), (-1.0 if name == "sub" else 1.0, operands[1])]
    if name == "neg":
        return [(-1.0, operands[0])]
    literals = [a for a in operands if isinstance(a, Literal)]
    if name == "mul" and len(literals) == 1:
        other = operands[1] if operands[0] is literals[0] else operands[0]
        return [(float(literals[0].value), other)]
    if name == "div" and len(literals) == 1 and operands[1] is literals[0]:
        return [(1 / float(literals[0].value), operands[0])]
    if name == "convert_element_type" and isinstance(operands[0], Value):
        is_float = jnp.issubdtype(operands[0].aval.dtype, jnp.floating)
        return [(1.0, operands[0])] if is_float else None
    if name == "reduce_sum" and len(node.eqn.params["axes"]) == len(operands[0].aval.shape):
        joined = _joined(operands[0])
        return None if joined is None else [(1.0, part) for part in joined]
    return None


def _joined(value: Operand) -> list[Operand] | None:
    """Lists the values of which a value is a stack or a concatenation, in any shape."""
    if isinstance(value, Literal) or value.node is None:
        return None
    node = value.node
    if node.name in ("concatenate", "stack"):
        return [part for operand in node.operands for part in _joined(operand) or [operand]]
    if node.name in ("reshape", "squeeze", "broadcast_in_dim") and len(node.operands) == 1:
        inner = node.operands[0]
        if math.prod(inner.aval.shape) == math.prod(value.aval.shape):
            return _joined(inner) or [inner]
    return None


def _rows(value: Operand) -> list[Operand]:
    """Lists the values that are stacked on the leading dim of a value; none for another value."""
    if isinstance(value, Literal) or value.node is None:
        return []
    node, shape = value.node, value.aval.shape
    if node.name == "stack" and node.eqn.params["axis"] == 0:
        return list(node.operands)
    if node.name != "concatenate" or node.eqn.params["dimension"] != 0:
        return []
    rows = []
    for part in node.operands:
        if isinstance(part, Literal) or part.node is None or part.aval.shape[0] != 1:
            return []
        if part.node.name not in ("broadcast_in_dim", "reshape") or len(part.node.operands) != 1:
            return []
        inner = part.node.operands[0]
        # One element in front of another changes nothing but the shape.
        dims = part.node.eqn.params.get("broadcast_dimensions", tuple(range(1, len(shape))))
        if inner.aval.shape != shape[1:] or tuple(dims) != tuple(np.arange(1, len(shape))):
            return []
        rows.append(inner)
    return rows
