"""Chooses the values that cross from each layer to the next, and their slots in x.

Between layers l - 1 and l the values are a minimum cut, in bytes, through the equations before
layer l: those behind the cut are cheap, and run in layer l as well. No equation that reads a
layer's parameters runs in another layer. x is a tuple of slots: a value keeps its slot for as
long as it is needed, and a new one takes an empty slot of its shape and dtype.
"""

import math
from collections.abc import Iterable, Sequence

from dualpipe_jax._from_loss.terms import Terms
from dualpipe_jax._from_loss.values import Node, Operand, Value
from dualpipe_jax._split_vjp import graph as cut_graph
from dualpipe_jax._split_vjp.cut import minimum_cut
from dualpipe_jax._split_vjp.primitives import CHEAP_IN_BACKWARD, MOVES, REDUCTIONS

_CHEAP = CHEAP_IN_BACKWARD | MOVES | REDUCTIONS | {"custom_jvp_call", "optimization_barrier"}


class Slots:
    """Holds the slots of x, and which value each has before every layer and before the head.

    Attributes:
      avals: The shape and dtype of each slot.
      before: For layer b, the value in each slot; entry num_layers is the head's.
    """

    def __init__(self, num_layers: int):
        self.avals: list[Value] = []
        self.before: list[dict[int, Value]] = [{} for _ in range(num_layers + 1)]

    def place(self, boundary: int, values: Iterable[Value], wanted: dict[Value, int]) -> None:
        """Gives the values that cross a boundary their slots.

        Args:
          boundary: The boundary, at which some slots may be taken.
          values: The values; those that have a slot there keep it.
          wanted: The slots that values have before, or should have, if these are empty.
        """
        slots = self.before[boundary]
        values = [v for v in values if v not in slots.values()]
        late = []
        for value in values:
            slot = wanted.get(value)
            if slot is None or slot in slots or not same_type(self.avals[slot], value):
                late.append(value)
            else:
                slots[slot] = value
        for value in late:
            slots[self.empty(boundary, value)] = value

    def empty(self, boundary: int, value: Value) -> int:
        """Finds an empty slot for a value, or makes one."""
        taken = self.before[boundary]
        fits = (s for s, a in enumerate(self.avals) if s not in taken and same_type(a, value))
        slot = next(fits, len(self.avals))
        if slot == len(self.avals):
            self.avals.append(value)
        return slot

    def of(self, boundary: int) -> dict[Value, int]:
        """Gives the slot of each value before a layer; of a value in two slots, the first one."""
        return {v: slot for slot, v in sorted(self.before[boundary].items(), reverse=True)}


def same_type(one: Operand, other: Operand) -> bool:
    """Whether two values have the same shape and dtype."""
    return one.aval.shape == other.aval.shape and one.aval.dtype == other.aval.dtype


def cut(wanted: Iterable[Value], region: Sequence[Node], *, prefer_late: bool) -> list[Value]:
    """Chooses the values that cross a boundary.

    Args:
      wanted: The values that are read behind the boundary.
      region: The nodes among which the cut is.
      prefer_late: Among equal cuts, the last one, and sizes in bytes; else the first one, and sizes
        in elements (so that a narrower copy of a value is not preferred).
    """
    wanted = list(wanted)
    inside = [v for node in region for v in (*node.results, *node.reads)]
    values = list(dict.fromkeys([*inside, *wanted]))
    numbers = {v: number for number, v in enumerate(values)}
    nodes = [
        cut_graph.Node(
            node.name,
            node.run,
            tuple(numbers[v] for v in node.reads),
            tuple(numbers[v] for v in node.results),
            cut_graph.When.FORWARD,
        )
        for node in region
    ]
    movable = {made.outputs for node, made in zip(region, nodes, strict=True) if can_move(node)}

    def size(number: int) -> int:
        value = values[number]
        return value.num_bytes if prefer_late else 8 * math.prod(value.aval.shape)

    kept = minimum_cut(
        nodes,
        wanted=[numbers[v] for v in wanted],
        can_keep=lambda node: True,
        can_redo=lambda node: node.outputs in movable,
        size=size,
        is_free=lambda number: values[number].is_at_hand,
        prefer_late=prefer_late,
    )
    return sorted((values[number] for number in kept), key=order_of)


def order_of(value: Value) -> tuple[int, int, str]:
    """Sorts values by the order in which they are made."""
    if value.node is not None:
        return value.node.number, value.index, ""
    return -1, 0, str(value.source)


def cut_between_layers(terms: Terms, *, prefer_late: bool) -> Slots:
    """Cuts between all layers, and gives the values their slots; x_0 and x_L are left empty."""
    num_layers = len(terms.of_layers)
    slots = Slots(num_layers)
    crossing: list[list[Value]] = [[] for _ in range(num_layers)]
    after = [term.value for term in terms.of_head]
    for boundary in reversed(range(1, num_layers)):
        targets = [*after, *(term.value for term in terms.of_layers[boundary])]
        wanted = read_before(targets, boundary)
        crossing[boundary] = cut(wanted, region_of(wanted), prefer_late=prefer_late)
        after = list(crossing[boundary])
    for boundary in range(1, num_layers):
        slots.place(boundary, crossing[boundary], slots.of(boundary - 1))
    return slots


def read_before(targets: Iterable[Operand], boundary: int) -> dict[Value, None]:
    """Lists the values from before a boundary that make `targets` behind it."""
    found: dict[Value, None] = {}
    seen: set[Node] = set()
    todo = [v for v in targets if isinstance(v, Value)]
    while todo:
        value = todo.pop()
        if value.position < boundary:
            if value.crosses:
                found[value] = None
        elif value.node is not None and value.node not in seen:
            seen.add(value.node)
            todo.extend(value.node.reads)
    return found


def region_of(wanted: Iterable[Value]) -> list[Node]:
    """Lists the equations that make `wanted`, back to those that may not run behind a cut."""
    found: set[Node] = set()
    todo = list(wanted)
    while todo:
        node = todo.pop().node
        if node is not None and node not in found:
            found.add(node)
            if can_move(node):
                todo.extend(v for v in node.reads if not v.is_at_hand)
    return sorted(found, key=lambda node: node.number)


def can_move(node: Node) -> bool:
    """Whether an equation may run behind the cut: it is cheap, and reads no layer's parameters."""
    return node.name in _CHEAP and not any(v.is_weights and not v.is_at_hand for v in node.reads)


def position(node: Node) -> int:
    """The position of a node's results."""
    return node.results[0].position if node.results else -1
