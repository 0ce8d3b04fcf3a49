"""Groups layers into kinds: layers of one kind are the same program up to tables.

In: the layers. Out: `Kind`s, each with a first layer that stands for all, and the literals of each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._errors import raise_all
from dualpipe_jax._from_loss.equality import same_value
from dualpipe_jax._from_loss.layers import Difference, Layer, Pairs, pair
from dualpipe_jax._from_loss.values import Literal, Node, Operand, Value

# The literals in which layers differ, by equation and number of the operand: `[num_layers]`, by the
# index of the layer; zero for layers of other kinds.
Tables = dict[tuple[Node, int], np.ndarray]


@dataclass(frozen=True)
class Kind:
    """Layers of one kind.

    Attributes:
      layers: The layers; the equations of the first one, which has the most, are the block.
      pairs: For each of them, its values by those of the first one.
      tables: The literals in which they differ.
      reads: For each value of x that the block reads, its slot in each layer, `[num_layers]`.
      writes: For each output of the block, its slot in each layer, `[num_layers]`.
      free: The free values that the block reads: for each, those of all layers.
    """

    layers: list[Layer]
    pairs: list[Pairs]
    tables: Tables
    reads: dict[Value, np.ndarray]
    writes: list[np.ndarray]
    free: list[tuple[Value, ...]]

    @property
    def first(self) -> Layer:
        """The layer that stands for all."""
        return self.layers[0]

    @property
    def indices(self) -> list[int]:
        """The indices of the layers, in the order of `layers`."""
        return [layer.index for layer in self.layers]


def group(layers: Sequence[Layer], *, max_kinds: int | None) -> list[Kind]:
    """Groups layers into kinds.

    Args:
      layers: All layers.
      max_kinds: The most kinds; None for half of the layers, but two to four.

    Raises:
      ValueError: If there are more kinds.
    """
    found: list[tuple[list[Layer], list[Pairs]]] = []
    differences: list[tuple[int, int, str]] = []
    # The layer with the most equations and values stands for those in which some are one.
    for layer in sorted(layers, key=lambda layer: (-len(layer.nodes), -len(layer.known))):
        for members, pairs in found:
            result = pair(members[0], layer)
            if isinstance(result, Pairs):
                members.append(layer)
                pairs.append(result)
                break
            first, second = sorted((members[0].index, layer.index))
            text = result if first == members[0].index else result.swapped
            differences.append((first, second, f"layers {first} and {second}: {text}"))
        else:
            own = pair(layer, layer)
            if isinstance(own, Difference):
                raise ValueError(f"loss_fn: layer {layer.index} cannot be told apart: {own}")
            found.append(([layer], [own]))
    found.sort(key=lambda kind: min(layer.index for layer in kind[0]))
    most = max(2, min(4, len(layers) // 2)) if max_kinds is None else max_kinds
    raise_all(
        f"loss_fn: its {len(layers)} layers are of {len(found)} kinds, each a program of its own, "
        f"but may be of {most}; make them alike, or allow more with max_kinds={len(found)}",
        [text for *_, text in sorted(differences)] if len(found) > most else (),
    )
    return [_kind(members, pairs, len(layers)) for members, pairs in found]


def _kind(members: list[Layer], pairs: list[Pairs], num_layers: int) -> Kind:
    """Makes the tables of a kind."""
    first = members[0]
    indices = [layer.index for layer in members]

    def table(slots: Iterable[int]) -> np.ndarray:
        of_members = list(slots)
        by_layer = np.full(num_layers, of_members[0], np.int32)
        by_layer[indices] = of_members
        return by_layer

    reads = {
        value: table(
            layer.slot_of(p.values[value], slot) for layer, p in zip(members, pairs, strict=True)
        )
        for slot, value in first.x.items()
        if value in pairs[0].values
    }
    writes = [
        table(layer.outputs[number][0] for layer in members) for number in range(len(first.outputs))
    ]
    free = [
        tuple(p.values[value] for p in pairs)
        for value in pairs[0].values
        if first.token(value) == ("free",)
    ]
    tables = tables_of(indices, [p.literals for p in pairs], num_layers)
    return Kind(members, pairs, tables, reads, writes, free)


def tables_of(
    indices: Sequence[int],
    literals: Sequence[dict[tuple[Node, int], Operand]],
    num_layers: int,
) -> Tables:
    """Makes tables of the literals in which some layers, of the given indices, differ."""
    tables: Tables = {}
    for key, own in literals[0].items():
        column = [of_layer[key] for of_layer in literals]
        assert all(isinstance(a, Literal) for a in (own, *column))
        values = [a.value for a in column if isinstance(a, Literal)]
        if all(same_value(value, values[0]) for value in values):
            continue
        table = np.zeros(num_layers, own.aval.dtype)
        table[list(indices)] = values
        tables[key] = table
    return tables
