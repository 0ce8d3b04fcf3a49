"""Layers as programs from x to x, and whether two of them are the same program.

Two layers are compared from their outputs backwards, in pairs of values: equations must be the
same (`equality`), and parameters have the same names. Literals, slots of x and free values may
differ; they become tables, or are made again in the block.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dualpipe_jax._from_loss.crossing import Slots, order_of
from dualpipe_jax._from_loss.equality import Equality, same_value
from dualpipe_jax._from_loss.terms import Term
from dualpipe_jax._from_loss.values import Node, Operand, Value, needed, same_function

# How a layer knows a value that it does not make: by its slot of x, its parameter's name, ...
Token = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer.

    Attributes:
      index: Its index.
      x: The value in each slot that it is given.
      outputs: The values that it puts into slots, in the order in which they are made; values that
        stay in theirs are left out.
      terms: Its losses and metrics.
      parameters: The types of its parameters, by name.
    """

    index: int
    x: dict[int, Value]
    outputs: list[tuple[int, Value]]
    terms: list[Term]
    parameters: dict[str, Any]

    @classmethod
    def of(cls, index: int, slots: Slots, terms: list[Term], parameters: dict[str, Any]) -> "Layer":
        """Takes a layer from the slots before and after it."""
        before, after = slots.before[index], slots.before[index + 1]
        outputs = [(slot, v) for slot, v in after.items() if before.get(slot) is not v]
        outputs.sort(key=lambda output: (order_of(output[1]), output[0]))
        return cls(index, before, outputs, terms, parameters)

    @cached_property
    def known(self) -> set[Value]:
        """The values that it is given in x."""
        return set(self.x.values())

    @property
    def targets(self) -> list[Operand]:
        """All values that it computes."""
        return [*(value for _, value in self.outputs), *(term.value for term in self.terms)]

    @cached_property
    def nodes(self) -> list[Node]:
        """The equations that compute them."""
        return needed(self.targets, known=self.known)

    @cached_property
    def _made_of_x(self) -> set[Value]:
        """The values that it makes of x; the first layer's x may be the batch itself."""
        made: set[Value] = set()
        for node in self.nodes:
            if any(v in self.known or v in made for v in node.reads):
                made.update(node.results)
        return made

    @property
    def where(self) -> str:
        """The file and the line of one of its equations."""
        return self.nodes[-1].where if self.nodes else "an unknown line"

    def slot_of(self, value: Value, wanted: int) -> int:
        """Finds the slot in which it is given a value: the wanted one, if the value is there."""
        slots = [slot for slot, v in self.x.items() if v is value]
        return wanted if wanted in slots else slots[0]

    def token(self, value: Value) -> Token | None:
        """Says how the layer knows a value; None if it makes it by an equation.

        Raises:
          ValueError: If it can neither know nor make it.
        """
        if value in self.known:
            return ("x",)
        if value.is_free and value not in self._made_of_x:
            return ("free",)
        if value.source is None:
            return None
        if value.source.kind == "layer" and value.source.layer == self.index:
            return ("layer", value.source.name)
        if value.source.kind == "ends":
            return ("ends", value.source.name)
        raise ValueError(f"loss_fn: layer {self.index} reads {value}, which it is not given")


@dataclass(frozen=True)
class Difference:
    """Says where two layers differ: the values, and a reason."""

    one: Operand | None
    other: Operand | None
    reason: str = ""

    @property
    def swapped(self) -> "Difference":
        """The same difference, seen from the other layer."""
        return Difference(self.other, self.one, self.reason)

    def __str__(self) -> str:
        if self.one is None or self.other is None:
            return self.reason
        return f"{_show(self.one)}, and {_show(self.other)}{self.reason}"


@dataclass(frozen=True)
class Pairs:
    """Pairs the values of one layer with those of another one that is the same program.

    Two values of the one may have the same value of the other as their pair, not the reverse.

    Attributes:
      values: The other layer's value for each of the one's.
      nodes: The other layer's equation for each of the one's.
      literals: The other layer's operand for each literal of the one: by node and number.
    """

    values: dict[Value, Value]
    nodes: dict[Node, Node]
    literals: dict[tuple[Node, int], Operand]


def pair(one: Layer, other: Layer) -> Pairs | Difference:
    """Pairs the values of two layers, or finds a difference between them."""
    if len(one.outputs) != len(other.outputs):
        for layer, without in ((one, other), (other, one)):
            slots = {slot for slot, _ in without.outputs}
            for slot, value in layer.outputs:
                if slot not in slots:
                    place = f"only layer {layer.index} puts {value} into that place of x"
                    return Difference(None, None, place)
        counts = " and ".join(f"{len(layer.outputs)}" for layer in (one, other))
        lines = " and ".join(layer.where for layer in (one, other))
        return Difference(None, None, f"they put {counts} values into x (layers at {lines})")
    lines = " and ".join(layer.where for layer in (one, other))
    if [t.is_loss for t in one.terms] != [t.is_loss for t in other.terms]:
        counts = " and ".join(f"{len(layer.terms)}" for layer in (one, other))
        text = f"they have {counts} losses and metrics of their own (layers at {lines})"
        return Difference(None, None, text)
    if one.parameters != other.parameters:
        names = sorted(
            name
            for name in {*one.parameters, *other.parameters}
            if one.parameters.get(name) != other.parameters.get(name)
        )
        names = names[:6] + ["..."] * (len(names) > 6)
        text = f"their parameters differ: {', '.join(names)} (layers at {lines})"
        return Difference(None, None, text)
    pairs = Pairs({}, {}, {})
    todo: list[tuple[Operand, Operand]] = list(zip(one.targets, other.targets, strict=True))[::-1]
    while todo:
        a, b = todo.pop()
        if not isinstance(a, Value) or not isinstance(b, Value):
            if isinstance(a, Value) or isinstance(b, Value) or not same_value(a.value, b.value):
                return Difference(a, b)
            continue
        if a in pairs.values:
            if pairs.values[a] is not b:
                return Difference(a, b, " (one value there, two here)")
            continue
        known, expected = one.token(a), other.token(b)
        if known != expected or a.aval.shape != b.aval.shape or a.aval.dtype != b.aval.dtype:
            return Difference(a, b)
        pairs.values[a] = b
        if known is None:
            assert a.node is not None
            assert b.node is not None
            if a.index != b.index or not same_function(a.node, b.node):
                names = Equality().differing(a.node.eqn, b.node.eqn)
                return Difference(a, b, f" (they differ in {', '.join(names)})" if names else "")
            if a.node in pairs.nodes:
                if pairs.nodes[a.node] is not b.node:
                    return Difference(a, b, " (one equation there, two here)")
                continue
            pairs.nodes[a.node] = b.node
            todo.extend(_operands(a.node, b.node, pairs)[::-1])
    return pairs


def _operands(one: Node, other: Node, pairs: Pairs) -> list[tuple[Operand, Operand]]:
    """Lists the pairs of operands that are values, and notes those that are literals."""
    values: list[tuple[Operand, Operand]] = []
    for number, (a, b) in enumerate(zip(one.operands, other.operands, strict=True)):
        if isinstance(a, Value):
            values.append((a, b))
        else:
            pairs.literals[one, number] = b
    return values


def _show(operand: Operand) -> str:
    return str(operand) if isinstance(operand, Value) else f"the literal {operand.value}"
