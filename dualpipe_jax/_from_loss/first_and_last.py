"""Finds x_0, which the first layer is given, and x_L, which the last one makes.

Between two layers a minimum cut decides, and where it decides otherwise than for the layer before,
although the layers are alike, that one's choice is taken. Before the first layer and behind the
last one a neighbour shows the way: x_0 is found by walking back from x_1 as another layer walks
back from its output, and x_L by walking on from x_(L-1) as another layer walks on from its input.
Without a like layer x_0 is a minimum cut among the equations of the ends, and the head begins where
parameters of the ends that no layer reads come in.
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
)
from dualpipe_jax._from_loss.layers import Layer, Pairs, pair
from dualpipe_jax._from_loss.terms import Term, Terms
from dualpipe_jax._from_loss.values import Node, Value, needed
from dualpipe_jax._from_loss.walk import Readers, walk_back, walk_on

LayerAt = Callable[[int], Layer]
Parameters = Sequence[dict[str, Value]]


def readers_of(nodes: Sequence[Node]) -> Readers:
    """Lists the nodes that read each value."""
    readers: Readers = defaultdict(list)
    for node in nodes:
        for value in dict.fromkeys(node.reads):
            readers[value].append(node)
    return readers


def make_alike(layer_at: LayerAt, slots: Slots, readers: Readers, parameters: Parameters) -> None:
    """Cuts before and behind a layer as the layer before it, if both are the same program so.

    The last layers may need fewer values than those before: a minimum cut then adds two values up,
    say, that travel apart elsewhere.

    Args:
      layer_at: Gives a layer, from the slots as they are.
      slots: The slots; x_0 and x_L may be missing.
      readers: The nodes that read each value.
      parameters: The parameters of each layer, by name.
    """
    for target in range(2, len(parameters) - 1):
        like, wanted = layer_at(target - 1), slots.before[target + 1]
        if isinstance(pair(like, layer_at(target)), Pairs):
            continue
        pairs = walk_on(like, target, slots, readers, parameters[target])
        if pairs is None:
            continue
        after = _after(like, slots, pairs)
        if after is None:
            continue
        between = needed(list(wanted), known=after)
        reads = [v for node in between for v in node.reads if v not in after]
        made = {v for node in between for v in node.results}
        is_enough = all(map(can_move, between)) and all(v.is_at_hand or v in made for v in reads)
        if is_enough and all(v in after or v.node is not None for v in wanted):
            slots.before[target + 1] = after


def _after(like: Layer, slots: Slots, pairs: dict[Value, Value]) -> dict[Value, int] | None:
    """Gives a layer's outputs the slots that those of the layer `like` have."""
    after: dict[Value, int] = {}
    for value, slot in slots.before[like.index + 1].items():
        found = pairs.get(value)
        if found is None or found in after:
            return None
        after[found] = slot
    return after


def place_first(terms: Terms, slots: Slots, *, prefer_late: bool) -> None:
    """Gives x_0 its slots."""
    num_layers = len(terms.of_layers)
    for like in range(1, num_layers - 1):
        found = walk_back(like, terms, slots)
        if found is not None:
            slots.before[0] = found
            return
    after = list(slots.before[1]) if num_layers > 1 else [t.value for t in terms.of_head]
    wanted = read_before([*after, *(term.value for term in terms.of_layers[0])], 0)
    values = cut(wanted, region_of(wanted), prefer_late=prefer_late)
    slots.place(0, values, slots.before[1] if num_layers > 1 else {})


def place_last(
    nodes: Sequence[Node],
    terms: Terms,
    slots: Slots,
    layer_at: LayerAt,
    readers: Readers,
    parameters: Parameters,
) -> None:
    """Gives x_L its slots; terms of the head that belong to the last layer go there.

    Args:
      nodes: All nodes.
      terms: The terms.
      slots: The slots, complete but for x_L.
      layer_at: Gives a layer, from the slots as they are.
      readers: The nodes that read each value.
      parameters: The parameters of each layer, by name.
    """
    last = len(terms.of_layers) - 1
    for like in map(layer_at, reversed(range(last))):
        pairs = walk_on(like, last, slots, readers, parameters[last])
        if pairs is None:
            continue
        after = _after(like, slots, pairs)
        moved = _terms_like(like.terms, terms, pairs, last)
        if moved is None or after is None:
            continue
        of_head = [term for term in terms.of_head if term not in moved]
        kept = _read_by_head(of_head, after, slots.before[last])
        if set(kept.values()) & set(after.values()):
            continue  # the layer puts other values into their slots: it ends further on
        in_head = needed([term.value for term in of_head], known={*kept, *after})
        if any(v.source and v.source.kind == "layer" for node in in_head for v in node.reads):
            continue  # the layer has more parameters: only its beginning is like the other one
        terms.of_head, terms.of_layers[last] = of_head, moved
        slots.before[last + 1] = {**kept, **after}
        return
    values = _cut_by_ends(nodes, terms, last)
    slots.place(last + 1, values, slots.before[last])


def _terms_like(
    of_like: list[Term], terms: Terms, pairs: dict[Value, Value], last: int
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
