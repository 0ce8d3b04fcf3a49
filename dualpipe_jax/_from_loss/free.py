"""How a block makes the free values of its layer again: of the microbatch, the key and constants.

The values of all layers are compared from the top. What is the same equation in all layers runs in
the block, with literals and constants that differ as tables. Where layers have different programs,
the values are a *family*: random keys that are derived one from another are made in embed and
travel in x (8 bytes a layer); other families are made in the block, and one value is chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from dualpipe_jax._from_loss.equality import same_array
from dualpipe_jax._from_loss.kinds import Tables, tables_of
from dualpipe_jax._from_loss.values import Node, Operand, Value, is_key, same_function, same_made

Column = tuple[Value, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """Values of which each layer has one.

    Attributes:
      values: The different values.
      index: Which one a layer has, `[num_layers]`.
      travels: Whether they are made in embed, and travel in x.
    """

    values: Column
    index: np.ndarray
    travels: bool


@dataclass
class Recipe:
    """Says how a block makes one free value.

    Values that differ by layer are put in place of the first layer's, in an environment of their
    own: `same` values are made before, as they may be made of these.

    Attributes:
      value: The first layer's value.
      same: The values that are the same in all layers, from which it is made.
      tables: The literals in which the layers differ.
      constants: The constants in which they differ, `[num_layers, ...]`.
      families: Families, by the first layer's value.
    """

    value: Value
    same: list[Value] = field(default_factory=list)
    tables: Tables = field(default_factory=dict)
    constants: dict[Value, np.ndarray] = field(default_factory=dict)
    families: dict[Value, Family] = field(default_factory=dict)

    @property
    def is_same(self) -> bool:
        """Whether the value is the same in all layers."""
        return not (self.tables or self.constants or self.families)


def recipe(column: Column, indices: Sequence[int], num_layers: int) -> Recipe:
    """Finds how a block makes a free value.

    Args:
      column: The value of each layer of a kind.
      indices: The indices of these layers.
      num_layers: The number of all layers.
    """
    found = Recipe(column[0])
    columns: dict[Value, Column] = {}
    nodes_of: dict[Node, list[Node]] = {}

    def whole() -> Recipe:
        family = _family(column, indices, num_layers)
        return Recipe(column[0], families={column[0]: family})

    literals: list[dict[tuple[Node, int], Operand]] = [{} for _ in column]
    todo: list[Column] = [column]
    while todo:
        values = todo.pop()
        first = values[0]
        if first in columns:
            if columns[first] != values:  # it would stand for the values of two columns
                return whole()
            continue
        columns[first] = values
        if all(v is first for v in values):
            found.same.append(first)
            continue
        sources = {v.source.kind if v.source is not None else "" for v in values}
        if sources == {"const"}:
            arrays = [v.source.array for v in values if v.source is not None]
            types = {(a.shape, a.dtype) for a in arrays}
            if all(same_array(a, arrays[0]) for a in arrays):
                found.same.append(first)
                continue
            if len(types) == 1 and not is_key(first.aval):
                found.constants[first] = _table(arrays, indices, num_layers)
                continue
        nodes = [v.node for v in values if v.node is not None]
        if (
            len(nodes) == len(values)
            and all(v.index == first.index for v in values)
            and all(same_function(nodes[0], node) for node in nodes)
        ):
            if nodes_of.setdefault(nodes[0], nodes) != nodes:
                return whole()
            rows = zip(*(node.operands for node in nodes), strict=True)
            for number, row in enumerate(rows):
                operands = tuple(a for a in row if isinstance(a, Value))
                if operands:
                    todo.append(operands)
                else:
                    for of_layer, operand in zip(literals, row, strict=True):
                        of_layer[nodes[0], number] = operand
            continue
        found.families[first] = _family(values, indices, num_layers)
    found.tables.update(tables_of(indices, literals, num_layers))
    return found


def _family(values: Column, indices: Sequence[int], num_layers: int) -> Family:
    """Collects the different values of a column."""
    travels = all(map(_is_random_key, values))
    different: list[Value] = []
    index = np.zeros(num_layers, np.int32)
    for layer, value in zip(indices, values, strict=True):
        number = next(
            (
                i
                for i, known in enumerate(different)
                # Keys of a chain are all different, and long to compare.
                if known is value or (not travels and same_made(known, value))
            ),
            None,
        )
        if number is None:
            number = len(different)
            different.append(value)
        index[layer] = number
    return Family(tuple(different), index, travels=travels)


def _is_random_key(value: Value) -> bool:
    """Whether a value is a random key: a typed one, or the words of one."""
    if is_key(value.aval):
        return True
    return value.aval.dtype == jnp.uint32 and value.aval.shape in ((2,), (4,)) and value.of_batch


def _table(arrays: Sequence[Any], indices: Sequence[int], num_layers: int) -> np.ndarray:
    table = np.zeros((num_layers, *arrays[0].shape), arrays[0].dtype)
    for index, array in zip(indices, arrays, strict=True):
        table[index] = array
    return table
