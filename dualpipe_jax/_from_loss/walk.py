"""Walks through a layer beside another one: on from its input, and back from its output.

Where two layers are the same program, the walk from a known boundary of one finds the values at its
other boundary that stand where the other layer has its own.
"""

from dualpipe_jax._from_loss.crossing import Slots, position, same_type
from dualpipe_jax._from_loss.equality import same_array, same_value
from dualpipe_jax._from_loss.layers import Layer
from dualpipe_jax._from_loss.terms import Terms
from dualpipe_jax._from_loss.values import Node, Operand, Value, needed

Readers = dict[Value, list[Node]]


def walk_back(like: int, terms: Terms, slots: Slots) -> dict[Value, int] | None:
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
            if a.index != b.index or a.node.token != b.node.token:
                return None
            todo.extend(_values(a.node, b.node))
    before = {v: slot for slot, v in found.items()}
    return before if len(before) == len(own) else None


def walk_on(
    like: Layer,
    target: int,
    slots: Slots,
    readers: Readers,
    parameters: dict[str, Value],
) -> dict[Value, Value] | None:
    """Pairs the values of the layer `like` with those of another one, from x onwards.

    Args:
      like: A layer.
      target: The index of the other one.
      slots: The slots.
      readers: The nodes that read each value.
      parameters: The parameters of the other layer, by name.

    Returns:
      The other layer's value for each of the one's; None if they are not the same program.
    """
    there = {slot: v for v, slot in slots.before[target].items()}
    if set(there) != set(like.x.values()):
        return None
    pairs = {v: there[slot] for v, slot in like.x.items()}
    used: set[int] = set()

    def fits(node: Node, found: Node) -> bool:
        return (
            id(found) not in used
            and position(found) <= target
            and node.token == found.token
            and all(
                _is_known(a, b, pairs, parameters)
                for a, b in zip(node.operands, found.operands, strict=True)
            )
        )

    for node in needed(like.targets, known=like.x):
        if position(node) < 0 and not node.results[0].crosses:
            continue  # free, or made of parameters that all layers use
        candidates: list[Node] = []
        for value in node.reads:
            found = _counterpart(value, pairs, parameters)
            if found is not None:
                candidates = readers.get(found, [])
                break
        matches = [match for match in candidates if fits(node, match)]
        if not matches:
            return None
        match = max(matches, key=lambda match: _num_equal_literals(node, match))
        used.add(id(match))
        pairs.update(zip(node.results, match.results, strict=True))
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
) -> bool:
    """Whether an operand of the last layer is the counterpart of another layer's."""
    if not isinstance(a, Value) or not isinstance(b, Value):
        return not isinstance(a, Value) and not isinstance(b, Value)
    there = _counterpart(a, pairs, parameters)
    if there is not None:
        return there is b
    if a.is_free:
        return b.is_free and same_type(a, b)
    is_at_hand = a.is_weights and a.position < 0
    # Layers may read other rows of one parameter: those are literals.
    return is_at_hand and same_made(a, b, with_literals=False)


def same_made(a: Operand, b: Operand, *, with_literals: bool = True) -> bool:
    """Whether two values are the same function of the same inputs."""
    todo = [(a, b)]
    while todo:
        a, b = todo.pop()
        if a is b:
            continue
        if not isinstance(a, Value) or not isinstance(b, Value):
            if isinstance(a, Value) or isinstance(b, Value):
                return False
            if with_literals and not same_value(a.value, b.value):
                return False
            continue
        if a.source is not None and b.source is not None:
            arrays = [v.source.array for v in (a, b) if v.source is not None]
            if any(array is None for array in arrays) or not same_array(*arrays):
                return False
            continue
        if a.node is None or b.node is None or a.index != b.index:
            return False
        if a.node.token != b.node.token:
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
