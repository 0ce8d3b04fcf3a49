"""The values and the equations of a traced loss, each value with its dependences.

A value's *position* is the last layer on whose parameters it depends, -1 for none. Free values
depend on the microbatch, its key and constants alone; *weights* on parameters alone.
"""

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jcore

from dualpipe_jax._from_loss.equality import same_array, same_value
from dualpipe_jax._from_loss.run import run_equation, where
from dualpipe_jax._model.kinds import as_constants


class Source(NamedTuple):
    """Says where a value without an equation comes from.

    Attributes:
      kind: "batch", "key", "const", "ends" or "layer".
      name: The number of the batch's leaf, or the path of the parameter (within its layer).
      layer: The layer whose parameter it is.
      array: The constant.
    """

    kind: str
    name: str = ""
    layer: int = -1
    array: Any = None


# The values of a program refer to each other: a repr of one would hold all of them.
@dataclass(eq=False, repr=False)
class Value:
    """One value.

    Attributes:
      aval: Its shape and dtype.
      node: The equation that makes it; None for an input.
      index: Its number among the results of that equation.
      source: Where it comes from, if no equation makes it.
      position: The last layer on whose parameters it depends.
      of_ends: Whether it depends on parameters outside of the layers.
      of_batch: Whether it depends on the microbatch or its key.
      of_layers: For weights, the layers on whose parameters they depend, a bit each.
      is_contracted: Whether a contraction is in it, so that it is not made again.
    """

    aval: Any
    node: "Node | None" = None
    index: int = 0
    source: Source | None = None
    position: int = -1
    of_ends: bool = False
    of_batch: bool = False
    of_layers: int = 0
    is_contracted: bool = False

    @property
    def is_free(self) -> bool:
        """Whether every block can make it: of the microbatch, the key and constants alone."""
        return self.position < 0 and not self.of_ends and not self.is_contracted

    @property
    def is_weights(self) -> bool:
        """Whether it depends on parameters alone."""
        return not self.of_batch and (self.position >= 0 or self.of_ends)

    @property
    def is_at_hand(self) -> bool:
        """Whether every block can have it without x: free values, and weights of the ends."""
        return self.is_free or (self.is_weights and self.position < 0)

    @property
    def crosses(self) -> bool:
        """Whether a later layer can have it through x only; of parameters, numbers travel alone."""
        is_number = self.position >= 0 and self.aval.shape == ()
        return not self.is_free and (is_number or not self.is_weights)

    @property
    def num_bytes(self) -> int:
        """The bytes of the value."""
        return math.prod(self.aval.shape) * getattr(self.aval.dtype, "itemsize", 4)

    def __str__(self) -> str:
        if self.node is not None:
            return f"{self.aval.str_short()} ({self.node.name} at {self.node.where})"
        assert self.source is not None
        names = {"batch": "of the microbatch", "key": "the key", "const": "a constant"}
        name = names.get(self.source.kind, self.source.name or "the parameter")
        return f"{self.aval.str_short()} ({name})"


@dataclass(frozen=True, eq=False)
class Literal:
    """A literal operand: layers may differ in its value."""

    value: Any
    aval: Any


Operand = Value | Literal


@dataclass(eq=False, repr=False)
class Stack:
    """Parameters, or other values, stacked by layer: a value for each layer.

    Attributes:
      items: The values, `[...]`; or stacks, of groups of layers.
      aval: The shape and dtype of the stack, `[len(items), ...]`.
      value: The stack as one value, once an equation needs it so.
    """

    items: "list[Value] | list[Stack] | list[Value | Stack]"
    aval: Any
    value: Value | None = None

    @property
    def is_weights(self) -> bool:
        """Whether it holds parameters, or values of parameters alone."""
        return all(item.is_weights for item in self.items)

    @property
    def values(self) -> list[Value]:
        """The values of all layers."""
        parts = [a.values if isinstance(a, Stack) else [a] for a in self.items]
        return [v for part in parts for v in part]


@dataclass(eq=False, repr=False)
class Node:
    """An equation.

    Attributes:
      eqn: The equation as the user's program has it.
      operands: Its operands, then the literals that are lifted out of it.
      results: Its results.
      number: Its number in the program.
      calls: The opened calls around it, the innermost last.
      lifted: A program of the equation with the literals of its programs as operands.
      num_lifted: How many literals are lifted: of the programs, or the starts of a slice.
      token: Nodes of one token are the same function of their operands, literals included.
    """

    eqn: jcore.JaxprEqn
    operands: list[Operand]
    results: list[Value] = field(default_factory=list)
    number: int = 0
    calls: tuple[jcore.JaxprEqn, ...] = ()
    lifted: jcore.ClosedJaxpr | None = None
    num_lifted: int = 0
    token: Hashable = None

    @property
    def name(self) -> str:
        """The name of the primitive."""
        return self.eqn.primitive.name

    @property
    def where(self) -> str:
        """The file and the line of the user's model."""
        # JAX traces its own jitted functions once: for these the call tells where.
        return where(self.eqn, *reversed(self.calls))

    @property
    def calls_host(self) -> bool:
        """Whether it calls a function on the host."""
        return self.name.endswith("callback")

    @property
    def is_slice(self) -> bool:
        """Whether it is a slice whose starts are operands."""
        return self.num_lifted > 0 and self.lifted is None

    @functools.cached_property
    def reads(self) -> list[Value]:
        """The operands that are no literals."""
        return [operand for operand in self.operands if isinstance(operand, Value)]

    def as_value(self, number: int) -> Operand:
        """Makes a value of a literal operand, so that a layer can be given it."""
        literal = self.operands[number]
        if isinstance(literal, Literal) and number < len(self.operands) - self.num_lifted:
            self.operands[number] = constant(np.asarray(literal.value, literal.aval.dtype))
            vars(self).pop("reads", None)
        return self.operands[number]

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Runs the equation on a value for each operand, literals included."""
        count = len(self.operands) - self.num_lifted
        given, literals = args[:count], args[count:]
        own = [a.value for a in self.operands[count:] if isinstance(a, Literal)]
        if all(map(_is, literals, own)):
            return run_equation(self.eqn, given)
        if self.lifted is not None:
            return jax.core.eval_jaxpr(self.lifted.jaxpr, (), *args)
        starts = [jnp.asarray(start, jnp.int32) for start in literals]
        return [lax.dynamic_slice(given[0], starts, self.results[0].aval.shape)]


def same_function(one: Node, other: Node) -> bool:
    """Whether two nodes are the same function, and have literals as the same operands."""
    return one.token == other.token and all(
        isinstance(a, Value) == isinstance(b, Value)
        for a, b in zip(one.operands, other.operands, strict=True)
    )


def _is(one: Any, other: Any) -> bool:
    return one is other


def constant(array: Any) -> Value:
    """Makes a value of a constant."""
    array = as_constants(array)
    return Value(jax.typeof(array), source=Source("const", array=array))


def needed(targets: Iterable[Operand], known: Iterable[Value] = ()) -> list[Node]:
    """Lists the nodes that make `targets` from the values of `known`, in their order."""
    known = set(known)
    found: dict[int, Node] = {}
    todo = [v for v in targets if isinstance(v, Value) and v not in known]
    while todo:
        node = todo.pop().node
        if node is not None and id(node) not in found:
            found[id(node)] = node
            todo.extend(v for v in node.reads if v not in known)
    return sorted(found.values(), key=lambda node: node.number)


def is_key(aval: Any) -> bool:
    """Whether values of this type are typed random keys."""
    return bool(jnp.issubdtype(aval.dtype, jax.dtypes.prng_key))


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
        if not same_function(a.node, b.node):
            return False
        todo.extend(zip(a.node.operands, b.node.operands, strict=True))
    return True
