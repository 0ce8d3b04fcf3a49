"""Requires each kind's block, with the tables of a layer put back, to be that layer's own program.

The values of both are numbered: two values get one number if the same equation makes them of values
with the same numbers, and inputs if they are the same slot, parameter or array. This way is another
one than that on which the kinds were found, so that a mistake there does not pass here.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dualpipe_jax._from_loss.free import Recipe
from dualpipe_jax._from_loss.kinds import Kind
from dualpipe_jax._from_loss.layers import Layer
from dualpipe_jax._from_loss.values import Literal, Node, Operand, Value, is_key, needed


def check_kind(kind: Kind, recipes: list[Recipe]) -> None:
    """Requires a kind's block to be the program of each of its layers.

    Raises:
      ValueError: If it is not.
    """
    numbering = _Numbering()
    for layer in kind.layers:
        own = numbering.of_targets(layer, {v: _input(layer, v) for v in _leaves(layer)})
        block = numbering.of_block(kind, recipes, layer)
        if own != block or [slot for slot, _ in layer.outputs] != [
            table[layer.index] for table in kind.writes
        ]:
            raise ValueError(
                f"loss_fn: layer {layer.index} was taken for one like layer {kind.first.index}, "
                "but is none; write the model as embed, block and head, and please report this"
            )


def _leaves(layer: Layer) -> list[Value]:
    """Lists the inputs of a layer."""
    read = {v for node in layer.nodes for v in node.reads}
    read.update(v for v in layer.targets if isinstance(v, Value))
    return [v for v in read if v in layer.known or v.source is not None]


def _input(layer: Layer | None, value: Value) -> tuple[Any, ...]:
    """Identifies an input."""
    if layer is not None and value in layer.known:
        return ("x", id(value))
    source = value.source
    assert source is not None
    if source.kind == "const":
        return _identify(source.array)
    if source.kind == "layer":
        assert layer is not None
        if source.layer != layer.index:
            return ("another layer", source.layer, source.name)
    return (source.kind, source.name)


def _identify(array: Any) -> tuple[Any, ...]:
    """Identifies an array by its bytes; a tracer by itself."""
    if isinstance(array, jax.core.Tracer):
        return ("tracer", id(array))
    if is_key(array):
        array = jax.random.key_data(array)
    array = np.asarray(array)
    return (array.shape, str(array.dtype), array.tobytes())


class _Numbering:
    """Numbers values."""

    def __init__(self):
        self._numbers: dict[Any, int] = {}

    def of_targets(self, layer: Layer, inputs: Mapping[Value, tuple[Any, ...]]) -> list[int]:
        """Numbers the outputs of a layer's own program."""
        known = {value: self._number(token) for value, token in inputs.items()}
        return self._run(layer.targets, known, lambda node, number, literal: literal.value)

    def of_block(self, kind: Kind, recipes: list[Recipe], layer: Layer) -> list[int]:
        """Numbers the outputs of a kind's block for a layer."""
        first, index = kind.first, layer.index
        known = {v: self._number(_input(first, v)) for v in _leaves(first) if not v.is_free}
        known.update(
            (v, self._number(("x", id(layer.x[slots[index]])))) for v, slots in kind.reads.items()
        )
        for recipe in recipes:
            known[recipe.value] = self._of_recipe(recipe, index)

        def literal(node: Node, number: int, operand: Literal) -> Any:
            table = kind.tables.get((node, number))
            return operand.value if table is None else table[index]

        return self._run(first.targets, known, literal)

    def _of_recipe(self, recipe: Recipe, index: int) -> int:
        def own(node: Node, number: int, literal: Literal) -> Any:
            return literal.value

        def from_table(node: Node, number: int, literal: Literal) -> Any:
            table = recipe.tables.get((node, number))
            return literal.value if table is None else table[index]

        known = dict(zip(recipe.same, self._run(recipe.same, {}, own), strict=True))
        for value, family in recipe.families.items():
            chosen = family.values[family.index[index]]
            known[value] = self._run([chosen], {}, own)[0]
        for value, table in recipe.constants.items():
            known[value] = self._number(_identify(table[index]))
        return self._run([recipe.value], known, from_table)[0]

    def _run(
        self,
        targets: list[Any],
        known: Mapping[Value, int],
        literal: Callable[[Node, int, Literal], Any],
    ) -> list[int]:
        numbers = dict(known)

        def number_of(node: Node | None, number: int, operand: Operand) -> int:
            if isinstance(operand, Literal):
                value = operand.value if node is None else literal(node, number, operand)
                array = np.asarray(value, operand.aval.dtype)
                return self._number(("literal", *_identify(array)))
            if operand not in numbers:
                numbers[operand] = self._number(_input(None, operand))
            return numbers[operand]

        for node in needed(targets, known):
            operands = tuple(number_of(node, i, a) for i, a in enumerate(node.operands))
            made = (node.token, operands)
            for value in node.results:
                numbers[value] = self._number((made, value.index))
        return [number_of(None, 0, target) for target in targets]

    def _number(self, token: Any) -> int:
        return self._numbers.setdefault(token, len(self._numbers))
