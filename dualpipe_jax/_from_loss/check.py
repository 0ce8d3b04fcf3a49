"""Compares each kind's block with the layers for which it runs, on another way than the finder's.

The values of a layer and of its block are numbered: two have one number if equations of one name
make them of values with the same numbers, and inputs if they are the same slot, parameter or array.
The name of an equation is JAX's own text of its parameters, with the id of every object of which
the text does not tell all. It does not share the finder's tokens, and is never looser than them.
"""

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core as jcore

from dualpipe_jax._from_loss.equality import CUSTOM_RULES
from dualpipe_jax._from_loss.free import Recipe
from dualpipe_jax._from_loss.kinds import Kind
from dualpipe_jax._from_loss.layers import Layer
from dualpipe_jax._from_loss.values import Literal, Node, Operand, Value, is_key, needed

# They say how a program is compiled, or what is kept for its derivative, which is compared itself.
_NO_VALUES = frozenset(
    """
    bwd donated_invars fwd_jaxpr_thunk inline jvp_jaxpr_fun keep_unused name out_trees policy
    sharding
    """.split()  # noqa: SIM905
)
# A text with an address, or a node of a user's class in a pytree, does not tell all.
_UNTOLD = re.compile(r" at 0x|CustomNode|<function|<bound")


class Check:
    """Numbers the values of layers and of their blocks.

    Attributes:
      derivative: Traces the custom derivative of an equation; None for one that cannot be traced.
    """

    def __init__(self, derivative: Callable[[jcore.JaxprEqn], jcore.ClosedJaxpr | None]):
        self._derivative = derivative
        self._numbers: dict[Any, int] = {}
        self._names: dict[tuple[int, bool], tuple[Any, Hashable]] = {}

    def doubt(self, kind: Kind, recipes: list[Recipe], number: int) -> str:
        """Says where a kind's block may be another program than one of its layers; "" if nowhere.

        Args:
          kind: The kind.
          recipes: How its block makes free values.
          number: The number of the layer in the kind.
        """
        layer, pairs = kind.layers[number], kind.pairs[number]
        slots = [int(table[layer.index]) for table in kind.writes]
        are_same = slots == [slot for slot, _ in layer.outputs]
        if are_same and self._of_layer(layer) == self._of_block(kind, recipes, layer):
            return ""
        unlike = (b for a, b in pairs.nodes.items() if self._of_node(a) != self._of_node(b))
        node = next(unlike, None)
        return layer.where if node is None else f"{node.name} at {node.where}"

    def _of_layer(self, layer: Layer) -> list[int]:
        """Numbers the outputs of a layer's own program."""
        known = {v: self._number(_input(layer, v)) for v in _leaves(layer)}
        return self._run(
            layer.targets, known, lambda node, number, literal: literal.value, layer.nodes
        )

    def _of_block(self, kind: Kind, recipes: list[Recipe], layer: Layer) -> list[int]:
        """Numbers the outputs of a kind's block for a layer."""
        first, index = kind.first, layer.index
        known = {v: self._number(_input(first, v)) for v in _leaves(first) if not v.is_free}
        for value, slots in kind.reads.items():
            known[value] = self._number(("x", id(layer.x[slots[index]])))
        for recipe in recipes:
            known[recipe.value] = self._of_recipe(recipe, index)

        def literal(node: Node, number: int, operand: Literal) -> Any:
            table = kind.tables.get((node, number))
            return operand.value if table is None else table[index]

        return self._run(first.targets, known, literal, first.nodes)

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
        nodes: Sequence[Node] | None = None,
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

        for node in needed(targets, known) if nodes is None else nodes:
            if node.results[0] in known:
                continue
            operands = tuple(number_of(node, i, a) for i, a in enumerate(node.operands))
            made = (self._of_node(node), operands)
            for value in node.results:
                numbers[value] = self._number((made, value.index))
        return [number_of(None, 0, target) for target in targets]

    def _of_node(self, node: Node) -> Hashable:
        return self._name(node.lifted or node.eqn, is_slice=node.is_slice)

    def _number(self, token: Any) -> int:
        return self._numbers.setdefault(token, len(self._numbers))

    def _name(self, of: Any, *, is_slice: bool = False, with_rules: bool = True) -> Hashable:
        """Names an equation, or a program, once; a derivative without the rules in it."""
        key = id(of), with_rules
        if key not in self._names:
            is_program = isinstance(of, jcore.ClosedJaxpr | jcore.Jaxpr)
            name = (
                self._of_program(of, with_rules)
                if is_program
                else self._of_equation(of, is_slice, with_rules)
            )
            self._names[key] = of, self._number(name)  # kept, so that no id is used twice
        return self._names[key][1]

    def _of_equation(self, eqn: jcore.JaxprEqn, is_slice: bool, with_rules: bool) -> Hashable:
        # Where a slice begins are operands of its node, and its sizes those of its result.
        left_out = {"start_indices", "limit_indices"} if is_slice else _NO_VALUES
        told = tuple(
            (name, self._tell(value, with_rules))
            for name, value in sorted(eqn.params.items())
            if name not in left_out
        )
        avals = tuple(_type_of(v.aval) for v in (*eqn.invars, *eqn.outvars))
        rule: Hashable = None
        if with_rules and eqn.primitive.name in CUSTOM_RULES:
            traced = self._derivative(eqn)
            rule = ("id", id(eqn)) if traced is None else self._name(traced, with_rules=False)
        return eqn.primitive.name, avals, told, rule

    def _of_program(self, program: Any, with_rules: bool) -> Hashable:
        jaxpr = getattr(program, "jaxpr", program)
        numbers: dict[Any, Hashable] = {}

        def tell(atom: Any) -> Hashable:
            if not isinstance(atom, jcore.Literal):
                return numbers[atom]
            return ("literal", _type_of(atom.aval), *_identify(np.asarray(atom.val)))

        for v in (*jaxpr.constvars, *jaxpr.invars):
            numbers[v] = len(numbers)
        lines = []
        for number, eqn in enumerate(jaxpr.eqns):
            operands = tuple(map(tell, eqn.invars))
            lines.append((self._name(eqn, with_rules=with_rules), operands))
            numbers.update((v, (number, i)) for i, v in enumerate(eqn.outvars))
        outs = tuple(map(tell, jaxpr.outvars))
        return self._tell(tuple(getattr(program, "consts", ())), with_rules), tuple(lines), outs

    def _tell(self, value: Any, with_rules: bool) -> Hashable:
        """Tells a parameter by JAX's text of it, and by its id where that does not tell all."""
        if isinstance(value, jcore.ClosedJaxpr | jcore.Jaxpr):
            return self._name(value, with_rules=with_rules)
        if value is None or type(value) in (bool, int, str):
            return type(value).__name__, value
        if type(value) is dict:
            value = tuple(value.items())
        if type(value) in (tuple, list):
            return tuple(self._tell(entry, with_rules) for entry in value)
        if hasattr(value, "__array__") and value.dtype.kind != "O":
            return _identify(value)
        owner = type(value).__module__.partition(".")[0]
        if owner == "jax" and dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
            return type(value).__name__, self._tell(tuple(fields), with_rules)
        text = repr(value) if owner in ("builtins", "numpy", "jax", "jaxlib") else ""
        if text and not callable(value) and not _UNTOLD.search(text):
            return type(value).__name__, text
        self._names.setdefault((id(value), True), (value, None))  # kept, as above
        return "id", id(value)


def _type_of(aval: Any) -> Hashable:
    is_array = isinstance(aval, jax.core.ShapedArray)
    return (aval.shape, aval.dtype, aval.weak_type) if is_array else str(aval)


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
