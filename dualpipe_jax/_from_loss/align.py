"""Finds the boundaries at which layers are alike: x_0, x_L, and between layers.

A minimum cut decides between two layers. A layer whose boundaries are known shows where another one
of the same program begins and ends: the other's equations are followed from its parameters, which
have the same names, on to their readers and back to the values that they read. Without a like layer
x_0 is a minimum cut among the equations of the ends, and the head begins where parameters of the
ends that no layer reads come in.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

from dualpipe_jax._from_loss.crossing import (
    Slots,
    can_move,
    cut,
    position,
    read_before,
    region_of,
    same_type,
)
from dualpipe_jax._from_loss.equality import same_value
from dualpipe_jax._from_loss.layers import Layer, Pairs, pair
from dualpipe_jax._from_loss.terms import Term, Terms
from dualpipe_jax._from_loss.values import Literal, Node, Operand, Value, needed, same_made

LayerAt = Callable[[int], Layer]
Parameters = Sequence[dict[str, Value]]
Readers = dict[Value, list[Node]]


def align(
    nodes: Sequence[Node],
    terms: Terms,
    slots: Slots,
    layer_at: LayerAt,
    parameters: Parameters,
    *,
    prefer_late: bool,
) -> None:
    """Completes the slots; terms of the head that belong to the last layer go there.

    Args:
      nodes: All nodes.
      terms: The terms.
      slots: The slots, with minimum cuts between the layers.
      layer_at: Gives a layer, from the slots as they are.
      parameters: The parameters of each layer, by name.
      prefer_late: As `crossing.cut`.
    """
    readers: Readers = defaultdict(list)
    for node in nodes:
        for value in dict.fromkeys(node.reads):
            readers[value].append(node)
    _between(slots, layer_at, readers, parameters)
    _first(terms, slots, layer_at, readers, parameters, prefer_late=prefer_late)
    _last(nodes, terms, slots, layer_at, readers, parameters)


def _between(slots: Slots, layer_at: LayerAt, readers: Readers, parameters: Parameters) -> None:
    """Cuts behind a layer as behind one before it, if both are the same program so.

    The last layers may need fewer values than those before: a minimum cut then adds two values up,
    say, that travel apart elsewhere.
    """
    for target in range(2, len(parameters) - 1):
        models = [layer_at(index) for index in reversed(range(1, target))]
        layer = layer_at(target)
        if any(isinstance(pair(like, layer), Pairs) for like in models):
            continue
        for like in models:
            found = _Follower(like, target, layer.x, readers, parameters[target]).follow()
            after = _after(like, slots, found, target) if found is not None else None
            wanted = list(slots.before[target + 1].values())
            if after and _is_enough(wanted, set(after)):
                slots.before[target + 1] = {}
                slots.place(target + 1, after, after)
                break


def _is_enough(wanted: Sequence[Value], after: set[Value]) -> bool:
    """Whether the values of another cut, and cheap equations on them, make those of this one."""
    between = needed(wanted, known=after)
    made = {v for node in between for v in node.results}
    reads = [v for node in between for v in node.reads if v not in after]
    return (
        all(map(can_move, between))
        and all(v.is_at_hand or v in made for v in reads)
        and all(v in after or v.node is not None for v in wanted)
    )


def _after(
    like: Layer, slots: Slots, pairs: dict[Value, Operand], target: int
) -> dict[Value, int] | None:
    """Gives a layer's outputs, and the values that stay, the slots that they want."""
    before, after = slots.of(target), {}
    for slot, value in slots.before[like.index + 1].items():
        found = pairs.get(value)
        if found is None and like.x.get(slot) is value:
            found = slots.before[target].get(slot)  # it stays, and this layer does not read it
        if not isinstance(found, Value):
            return None
        after[found] = before.get(found, slot)
    return after


def _first(
    terms: Terms,
    slots: Slots,
    layer_at: LayerAt,
    readers: Readers,
    parameters: Parameters,
    *,
    prefer_late: bool,
) -> None:
    """Gives x_0 its slots."""
    num_layers = len(parameters)
    after = slots.before[1] if num_layers > 1 else {}
    stays = {slot: v for slot, v in after.items() if v.position < 0}
    for like in map(layer_at, range(1, num_layers - 1)):
        pairs = _Follower(like, 0, None, readers, parameters[0]).follow()
        if pairs is None:
            continue
        made = [pairs.get(v) for v in like.targets if isinstance(v, Value)]
        if not all(v in made for v in after.values() if v.position >= 0):
            continue
        slots.before[0] = dict(stays)
        for slot, value in like.x.items():
            found = pairs.get(value)
            if isinstance(found, Value):
                slots.place(0, [found], {found: slot})
        return
    targets = [*after.values()] if num_layers > 1 else [t.value for t in terms.of_head]
    wanted = read_before([*targets, *(term.value for term in terms.of_layers[0])], 0)
    slots.before[0] = dict(stays)
    values = cut(wanted, region_of(wanted), prefer_late=prefer_late)
    slots.place(0, values, slots.of(1) if num_layers > 1 else {})


def _last(
    nodes: Sequence[Node],
    terms: Terms,
    slots: Slots,
    layer_at: LayerAt,
    readers: Readers,
    parameters: Parameters,
) -> None:
    """Gives x_L its slots."""
    last = len(parameters) - 1
    for like in map(layer_at, reversed(range(last))):
        pairs = _Follower(like, last, slots.before[last], readers, parameters[last]).follow()
        if pairs is None:
            continue
        after = _after(like, slots, pairs, last)
        moved = _terms_like(like.terms, terms, pairs, last)
        if moved is None or after is None:
            continue
        of_head = [term for term in terms.of_head if term not in moved]
        kept = _read_by_head(of_head, after, slots.of(last))
        in_head = needed([term.value for term in of_head], known={*kept, *after})
        if any(v.source and v.source.kind == "layer" for node in in_head for v in node.reads):
            continue  # the layer has more parameters: only its beginning is like the other one
        terms.of_head, terms.of_layers[last] = of_head, moved
        slots.place(last + 1, kept, kept)
        slots.place(last + 1, after, after)
        return
    values = _cut_by_ends(nodes, terms, last)
    slots.place(last + 1, values, slots.of(last))


def _terms_like(
    of_like: list[Term], terms: Terms, pairs: dict[Value, Operand], last: int
) -> list[Term] | None:
    """Finds the last layer's terms among its own and the head's; None if one is missing."""
    own = [*terms.of_layers[last], *terms.of_head]
    found: list[Term] = []
    for term in of_like:
        there = pairs.get(term.value) if isinstance(term.value, Value) else None
        hits = [t for t in own if t.value is there and t.is_loss == term.is_loss and t not in found]
        if there is None or not hits:
            return None
        found.append(hits[0])
    return found if all(term in found for term in terms.of_layers[last]) else None


def _read_by_head(
    of_head: Sequence[Term], after: dict[Value, int], before: dict[Value, int]
) -> dict[Value, int]:
    """Finds the values before the last layer that the head reads beside x_L, with their slots."""
    targets = [term.value for term in of_head]
    nodes = needed(targets, known={*after, *before})
    read = {v for node in nodes for v in node.reads} | {v for v in targets if isinstance(v, Value)}
    return {v: slot for v, slot in before.items() if v in read and v not in after}


def _cut_by_ends(nodes: Sequence[Node], terms: Terms, last: int) -> list[Value]:
    """Cuts before the equations with parameters of the ends that no layer reads."""
    in_layers = {v for n in nodes if position(n) < last for v in n.reads if v.is_weights}
    in_head: set[int] = set()
    head: list[Node] = []
    for node in nodes:
        if position(node) == last and any(
            (v.node is not None and id(v.node) in in_head)
            or (v.is_weights and v.of_ends and v not in in_layers and node.results[0].of_batch)
            for v in node.reads
        ):
            in_head.add(id(node))
            head.append(node)
    region = [n for n in nodes if position(n) == last and id(n) not in in_head]
    made = {v for node in head for v in node.results}
    read = [v for node in head for v in node.reads]
    read += [t.value for t in terms.of_head if isinstance(t.value, Value)]
    return cut(
        dict.fromkeys(v for v in read if v.crosses and v not in made), region, prefer_late=True
    )


class _Follower:
    """Pairs the values of a layer with those of another one, whose boundaries are not known.

    Attributes:
      like: The layer.
      target: The index of the other one.
      x: The values that the other one is given, by slot, if they are known.
      readers: The nodes that read each value.
      parameters: The parameters of the other layer, by name.
    """

    def __init__(
        self,
        like: Layer,
        target: int,
        x: dict[int, Value] | None,
        readers: Readers,
        parameters: dict[str, Value],
    ):
        self._like, self._target, self._x = like, target, x
        self._readers, self._parameters = readers, parameters
        self._pairs: dict[Value, Operand] = {}
        self._nodes: dict[Node, Node] = {}
        # Set back to a shorter one where a node did not fit.
        self._trail: list[Value | Node] = []

    def follow(self) -> dict[Value, Operand] | None:
        """Pairs the layer's values; None if the other one is another program."""
        # Made of values at hand alone: free, or of parameters that all layers use.
        nodes = [n for n in self._like.nodes if position(n) >= 0 or n.results[0].crosses]
        left = [n for n in nodes if n not in self._nodes]
        while left:
            for node in left:
                if node not in self._nodes and not self._match(node):
                    return None
            count = len(left)
            left = [n for n in left if n not in self._nodes]
            if len(left) == count and not self._bind_by_slots(left):
                return None
        return self._pairs

    def _bind_by_slots(self, left: Sequence[Node]) -> bool:
        """Pairs values to which no parameter leads by their slots; False if there are none."""
        read = {v for node in left for v in node.reads}
        count = len(self._trail)
        for slot, value in self._like.x.items():
            there = (self._x or {}).get(slot)
            if value in read and value not in self._pairs and there is not None:
                self._bind(value, there)
        return len(self._trail) > count

    def _match(self, node: Node) -> bool:
        """Finds the other layer's node, if the pairs so far tell; False if there is none."""
        candidates = next(filter(None, map(self._read_there, node.reads)), None)
        if candidates is None:
            return True  # later
        used = set(self._nodes.values())
        order = sorted(candidates, key=lambda found: (found in used, -_num_equal(node, found)))
        return any(self._try(node, found) for found in order)

    def _read_there(self, value: Value) -> list[Node] | None:
        """Lists the nodes that read the other layer's value for one of this layer, if known."""
        there = self._pairs.get(value)
        if value.source is not None and value.source.kind == "layer":
            there = self._parameters.get(value.source.name)
        return self._readers.get(there, []) if isinstance(there, Value) else None

    def _try(self, node: Node, found: Node) -> bool:
        count = len(self._trail)
        if self._unify(node, found):
            return True
        for key in self._trail[count:]:
            if isinstance(key, Node):
                del self._nodes[key]
            else:
                del self._pairs[key]
        del self._trail[count:]
        return False

    def _unify(self, node: Node, found: Node) -> bool:
        """Pairs two nodes, and back from them all that they read."""
        todo = [(node, found)]
        while todo:
            a, b = todo.pop()
            if a in self._nodes:
                if self._nodes[a] is not b:
                    return False
                continue
            if a.token != b.token or position(b) > self._target:
                return False
            self._nodes[a] = b
            self._trail.append(a)
            for one, other in zip(a.results, b.results, strict=True):
                if not self._bind(one, other):
                    return False
            for number, one in enumerate(a.operands):
                other = b.operands[number]
                if self._x is None and isinstance(other, Literal) and one in self._like.known:
                    other = b.as_value(number)  # the first layer begins with a number
                if isinstance(one, Literal):
                    if not isinstance(other, Literal):
                        return False
                    continue
                known = self._is_known(one, other)
                if known is False:
                    return False
                if known is None:
                    assert one.node is not None
                    if not isinstance(other, Value) or other.node is None:
                        return False
                    if one.index != other.index:
                        return False
                    todo.append((one.node, other.node))
        return True

    def _bind(self, one: Value, other: Operand) -> bool:
        if one in self._pairs:
            return self._pairs[one] is other
        self._pairs[one] = other
        self._trail.append(one)
        return True

    def _is_known(self, one: Value, other: Operand) -> bool | None:
        """Whether two operands are a pair; None if their nodes tell."""
        if one in self._pairs:
            return self._pairs[one] is other
        if not isinstance(other, Value) or not same_type(one, other):
            return False
        if one in self._like.known:
            is_given = other in self._x.values() if self._x is not None else other.position < 0
            return is_given and self._bind(one, other)
        if one.source is not None and one.source.kind == "layer":
            return self._parameters.get(one.source.name) is other
        if one.is_free:
            return other.is_free
        if one.is_weights and one.position < 0:
            # Layers may read other rows of one parameter: those are literals.
            return same_made(one, other, with_literals=False)
        return None if one.node is not None else False


def _num_equal(one: Node, other: Node) -> int:
    """Counts the operands that are one value, or equal literals: all layers read one mask, say."""
    pairs = zip(one.operands, other.operands, strict=False)
    return sum(
        a is b
        or (isinstance(a, Literal) and isinstance(b, Literal) and same_value(a.value, b.value))
        for a, b in pairs
    )
