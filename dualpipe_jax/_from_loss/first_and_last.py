"""Finds x_0, which the first layer is given, and x_L, which the last one makes.

Between two layers a minimum cut decides; before the first and behind the last one a neighbour shows
the way: x_0 is found by walking back from x_1 as another layer walks back from its output, and x_L
by walking on from x_(L-1) as another layer walks on from its input. Without a like layer x_0 is a
minimum cut among the equations of the ends, and the head begins where parameters of the ends that
no layer reads come in.
"""

from collections import defaultdict
from collections.abc import Sequence

from dualpipe_jax._from_loss.crossing import Slots, cut, position, same_type
from dualpipe_jax._from_loss.equality import Equality, same_array, same_value
from dualpipe_jax._from_loss.layers import Layer, same_node
from dualpipe_jax._from_loss.terms import Term, Terms
from dualpipe_jax._from_loss.values import Node, Operand, Value, needed


def place_first(
    nodes: Sequence[Node], terms: Terms, slots: Slots, equality: Equality, *, prefer_late: bool
) -> None:
    """Gives x_0 its slots."""
    num_layers = len(terms.of_layers)
    for like in range(1, num_layers - 1):
        found = _walk_back(like, terms, slots, equality)
        if found is not None:
            slots.before[0] = found
            return
    region = [node for node in nodes if position(node) < 0 and node.results[0].crosses]
    read = [v for node in nodes if position(node) >= 0 for v in node.reads]
    outputs = [*terms.of_head, *(term for of_layer in terms.of_layers for term in of_layer)]
    read += [term.value for term in outputs if isinstance(term.value, Value)]
    wanted = dict.fromkeys(v for v in read if v.crosses and v.position < 0)
    if num_layers > 1:
        wanted |= dict.fromkeys(v for v in slots.before[1] if v.position < 0)
    values = cut(wanted, region, prefer_late=prefer_late)
    slots.place(0, values, slots.before[1] if num_layers > 1 else {})


def _walk_back(
    like: int, terms: Terms, slots: Slots, equality: Equality
) -> dict[Value, int] | None:
    """Finds the values that stand in layer 0 where the layer `like` has its x."""
    own, after, first = slots.before[like], slots.before[like + 1], slots.before[1]
    if set(own.values()) != set(after.values()) or set(after.values()) != set(first.values()):
        return None
    if len(terms.of_layers[like]) != len(terms.of_layers[0]):
        return None
    in_first = {slot: v for v, slot in first.items()}
    todo: list[tuple[Operand, Operand]] = [(v, in_first[slot]) for v, slot in after.items()]
    todo += [
        (a.value, b.value) for a, b in zip(terms.of_layers[like], terms.of_layers[0], strict=True)
    ]
    found: dict[int, Value] = {}
    pairs: dict[Value, Value] = {}
    while todo:
        a, b = todo.pop()
        if not isinstance(a, Value) or not isinstance(b, Value):
            return None
        if a in pairs:
            if pairs[a] is not b:
                return None
            continue
        if not same_type(a, b):
            return None
        pairs[a] = b
        if a in own:
            if b.position >= 0:
                return None
            found[own[a]] = b
        elif a.is_free or b.is_free:
            if not (a.is_free and b.is_free):
                return None
        elif a.source is not None or b.source is not None:
            if a.source is None or b.source is None or a.source[:2] != b.source[:2]:
                return None
        else:
            assert a.node is not None
            assert b.node is not None
            if a.index != b.index or not same_node(a.node, b.node, equality):
                return None
            todo.extend(_values(a.node, b.node))
    before = {v: slot for slot, v in found.items()}
    return before if len(before) == len(own) else None


def place_last(
    nodes: Sequence[Node],
    terms: Terms,
    slots: Slots,
    layers: Sequence[Layer],
    parameters: dict[str, Value],
    equality: Equality,
) -> None:
    """Gives x_L its slots; terms of the head that belong to the last layer go there.

    Args:
      nodes: All nodes.
      terms: The terms.
      slots: The slots, complete but for x_L.
      layers: All layers but the last one.
      parameters: The parameters of the last layer, by name.
      equality: Compares equations.
    """
    last = len(terms.of_layers) - 1
    readers: dict[Value, list[Node]] = defaultdict(list)
    for node in nodes:
        for value in dict.fromkeys(node.reads):
            readers[value].append(node)
    for like in reversed(layers):
        pairs = _walk_on(like, slots, readers, parameters, equality)
        if pairs is None:
            continue
        after = {pairs.get(v): slot for v, slot in slots.before[like.index + 1].items()}
        moved = _terms_like(like.terms, terms, pairs, last)
        if moved is None or None in after or len(after) < len(slots.before[like.index + 1]):
            continue
        terms.of_head = [term for term in terms.of_head if term not in moved]
        terms.of_layers[last] = moved
        slots.before[last + 1] = {v: slot for v, slot in after.items() if v is not None}
        _add_read_by_head(terms, slots, last)
        return
    values = _cut_by_ends(nodes, terms, last)
    slots.place(last + 1, values, slots.before[last])


def _walk_on(
    like: Layer,
    slots: Slots,
    readers: dict[Value, list[Node]],
    parameters: dict[str, Value],
    equality: Equality,
) -> dict[Value, Value] | None:
    """Pairs the values of the layer `like` with those of the last layer, from x onwards."""
    last = len(slots.before) - 2
    of_last = {slot: v for v, slot in slots.before[last].items()}
    if set(of_last) != set(like.x.values()):
        return None
    pairs = {v: of_last[slot] for v, slot in like.x.items()}
    used: set[int] = set()

    def fits(node: Node, found: Node) -> bool:
        return (
            id(found) not in used
            and position(found) <= last
            and same_node(node, found, equality)
            and all(
                _is_known(a, b, pairs, parameters, equality)
                for a, b in zip(node.operands, found.operands, strict=True)
            )
        )

    for node in needed(like.targets, known=like.x):
        if position(node) < 0:  # free, or made of parameters that all layers use
            continue
        candidates: list[Node] = []
        for value in node.reads:
            there = _counterpart(value, pairs, parameters)
            if there is not None:
                candidates = readers[there]
                break
        matches = [found for found in candidates if fits(node, found)]
        if not matches:
            return None
        found = max(matches, key=lambda found: _num_equal_literals(node, found))
        used.add(id(found))
        pairs.update(zip(node.results, found.results, strict=True))
    return pairs


def _counterpart(
    value: Value, pairs: dict[Value, Value], parameters: dict[str, Value]
) -> Value | None:
    """Finds the last layer's value for another layer's, if it can be told by itself."""
    if value.source is not None and value.source.kind == "layer":
        return parameters.get(value.source.name)
    return pairs.get(value)


def _is_known(
    a: Operand,
    b: Operand,
    pairs: dict[Value, Value],
    parameters: dict[str, Value],
    equality: Equality,
) -> bool:
    """Whether an operand of the last layer is the counterpart of another layer's."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        return not isinstance(a, Value) and not isinstance(b, Value)
    there = _counterpart(a, pairs, parameters)
    if there is not None:
        return there is b
    if a.is_free:
        return b.is_free and same_type(a, b)
    return a.is_weights and a.position < 0 and same_made(a, b, equality)


def same_made(a: Operand, b: Operand, equality: Equality) -> bool:
    """Whether two values are the same function of the same inputs."""
    todo = [(a, b)]
    while todo:
        a, b = todo.pop()
        if a is b:
            continue
        if not isinstance(a, Value) or not isinstance(b, Value):
            if isinstance(a, Value) or isinstance(b, Value) or not same_value(a.value, b.value):
                return False
            continue
        if a.source is not None and b.source is not None:
            arrays = [v.source.array for v in (a, b) if v.source is not None]
            if any(array is None for array in arrays) or not same_array(*arrays):
                return False
            continue
        if a.node is None or b.node is None or a.index != b.index:
            return False
        if not same_node(a.node, b.node, equality):
            return False
        todo.extend(zip(a.node.operands, b.node.operands, strict=True))
    return True


def _values(one: Node, other: Node) -> list[tuple[Operand, Operand]]:
    pairs = zip(one.operands, other.operands, strict=True)
    return [(a, b) for a, b in pairs if isinstance(a, Value)]


def _num_equal_literals(one: Node, other: Node) -> int:
    pairs = zip(one.operands, other.operands, strict=True)
    return sum(
        not isinstance(a, Value) and not isinstance(b, Value) and bool(a.value == b.value)
        for a, b in pairs
    )


def _terms_like(
    of_like: list[Term], terms: Terms, pairs: dict[Value, Value], last: int
) -> list[Term] | None:
    """Finds the last layer's terms among its own and the head's; None if one is missing."""
    own = [*terms.of_layers[last], *terms.of_head]
    found: list[Term] = []
    for term in of_like:
        there = pairs.get(term.value) if isinstance(term.value, Value) else None
        hits = [t for t in own if t.value is there and t.factor == term.factor and t not in found]
        if there is None or not hits:
            return None
        found.append(hits[0])
    return found if all(term in found for term in terms.of_layers[last]) else None


def _add_read_by_head(terms: Terms, slots: Slots, last: int) -> None:
    """Keeps the values before the last layer that the head reads beside x_L."""
    after = slots.before[last + 1]
    read: set[Value] = set()
    targets = [term.value for term in terms.of_head]
    before = set(slots.before[last])
    read.update(v for node in needed(targets, known={*after, *before}) for v in node.reads)
    read.update(v for v in targets if isinstance(v, Value))
    extra = [v for v in slots.before[last] if v in read and v not in after]
    if extra:
        slots.place(last + 1, [*after, *extra], {**slots.before[last], **after})


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
