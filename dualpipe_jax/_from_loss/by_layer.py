"""Equations on stacks, as equations on the values of each layer.

An array with a row for each layer stays a `Stack` as long as equations act on each row by itself,
or only put rows elsewhere; a sum over rows becomes additions. Any other equation needs the stack as
one array.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jcore

from dualpipe_jax._from_loss.values import Literal, Operand, Stack, Value, constant, is_key
from dualpipe_jax._split_vjp.primitives import ELEMENTWISE, REDUCTIONS

Input = Operand | Stack

# They act on the rows of a stack unless they name its leading dim.
_ACT_ON_ROWS = REDUCTIONS | {"reduce_prod", "argmax", "argmin", "slice", "dynamic_slice"}


class Program(Protocol):
    """Takes equations: the graph."""

    def call(
        self, f: Callable[..., Any], values: Sequence[Value], of: jcore.JaxprEqn | None = None
    ) -> Value:
        """Traces f and appends its equations, as if they stood where `of` stands."""
        ...

    def as_value(self, operand: Input, of: jcore.JaxprEqn | None = None) -> Value:
        """Gives a literal, or a stack, as one value."""
        ...


@dataclass(frozen=True)
class OnStacks:
    """An equation of which some inputs are stacks.

    Attributes:
      program: Takes the equations on the layers' values.
      eqn: The equation.
      inputs: Its inputs.
    """

    program: Program
    eqn: jcore.JaxprEqn
    inputs: Sequence[Input]

    def by_layer(self) -> list[Any] | None:
        """Gives the results of the equation on each layer's values; None if it has none."""
        if len({len(stack.items) for stack in self._stacks}) > 1 or len(self.eqn.outvars) > 1:
            return None
        if self._out.size == 0 and not is_key(self._out):
            return [constant(np.zeros(self._out.shape, self._out.dtype))]
        ways = (self._put_elsewhere, self._added_up, self._on_each_row)
        result = next((result for way in ways if (result := way()) is not None), None)
        return None if result is None else [result]

    @cached_property
    def _stacks(self) -> list[Stack]:
        return [a for a in self.inputs if isinstance(a, Stack)]

    @property
    def _count(self) -> int:
        """The number of rows."""
        return len(self._stacks[0].items)

    @property
    def _out(self) -> Any:
        """The shape and dtype of the result."""
        return self.eqn.outvars[0].aval

    @property
    def _has_groups(self) -> bool:
        return any(isinstance(item, Stack) for stack in self._stacks for item in stack.items)

    def _put_elsewhere(self) -> Input | None:
        """Rows in groups or reversed, some rows, one row, or the only one without its dim."""
        stack, params, out = self._stacks[0], self.eqn.params, self._out
        shape, rest = stack.aval.shape, stack.aval.shape[1:]
        match self.eqn.primitive.name:
            case "reshape":
                number = out.shape[0] if out.shape else 1
                size = self._count // number
                if number == self._count or out.shape != (number, size, *rest):
                    return None
                inner = out.update(shape=out.shape[1:])
                groups = (stack.items[i * size : (i + 1) * size] for i in range(number))
                return Stack([Stack(group, inner) for group in groups], out)
            case "rev" if params["dimensions"] == (0,):
                return Stack(stack.items[::-1], out)
            case "slice":
                start, limit = params["start_indices"], params["limit_indices"]
                has_whole_rows = (start[1:], limit[1:]) == ((0,) * len(rest), rest)
                if has_whole_rows and set(params["strides"] or (1,)) == {1}:
                    return Stack(stack.items[start[0] : limit[0]], out)
            case "dynamic_slice" if isinstance(self.inputs[1], Literal):
                if params["slice_sizes"] == (1, *rest):
                    layer = min(max(int(self.inputs[1].value), 0), shape[0] - 1)
                    return Stack([stack.items[layer]], out)
            case "squeeze":
                return self._squeezed(stack)
        return None

    def _squeezed(self, stack: Stack) -> Input | None:
        dimensions = self.eqn.params["dimensions"]
        squeeze = partial(lax.squeeze, dimensions=tuple(dim - 1 for dim in dimensions if dim))

        def without_dims(item: Value | Stack) -> Value:
            return self.program.call(squeeze, [self.program.as_value(item)], self.eqn)

        if 0 not in dimensions:
            return Stack([without_dims(item) for item in stack.items], self._out)
        if len(stack.items) > 1:
            return None
        return without_dims(stack.items[0]) if len(dimensions) > 1 else stack.items[0]

    def _added_up(self) -> Value | None:
        """A sum, or a contraction, over rows."""
        name, params = self.eqn.primitive.name, self.eqn.params
        if self._has_groups:
            return None
        if name == "reduce_sum" and params["axes"] == (0,):
            return add_up(self.program, self._stacks[0].values, self.eqn)
        is_sum = name == "reduce_sum" and 0 in params["axes"]
        is_dot = (
            name == "dot_general"
            and all(map(self._has_rows, self.inputs))
            and (0, 0) in zip(*params["dimension_numbers"][0], strict=True)
        )
        if not is_sum and not is_dot:
            return None
        parts = [self._on_row(i, params) for i in range(self._count)]
        return add_up(self.program, parts, self.eqn)

    def _on_each_row(self) -> Stack | None:
        """The same equation on each row."""
        if self._has_groups or self._out.shape[:1] != (self._count,) or not self._keeps_rows():
            return None
        params = dict(self.eqn.params)
        for key in ("new_sizes", "shape", "limit_indices", "slice_sizes"):
            if key in params:
                params[key] = (1, *params[key][1:])
        rows = [self._on_row(i, params) for i in range(self._count)]
        first = partial(jnp.squeeze, axis=0)
        return Stack([self.program.call(first, [row], self.eqn) for row in rows], self._out)

    def _keeps_rows(self) -> bool:
        """Whether a row of the result is made of the rows at its place alone."""
        name, params = self.eqn.primitive.name, self.eqn.params
        if name in ELEMENTWISE or name == "integer_pow":
            return all(map(self._has_rows, self.inputs))
        match name:
            case "transpose":
                return params["permutation"][0] == 0
            case "rev":
                return 0 not in params["dimensions"]
            case "reshape":
                return params["new_sizes"][0] == self._count
            case "broadcast_in_dim":
                return params["broadcast_dimensions"][:1] == (0,)
            case "dot_general":
                batched = [tuple(dims[:1]) for dims in params["dimension_numbers"][1]]
                return batched == [(0,), (0,)] and all(map(self._has_rows, self.inputs))
        return name in _ACT_ON_ROWS and 0 not in params.get("axes", ())

    def _has_rows(self, operand: Input) -> bool:
        """Whether each layer can have its row of an operand: of a stack, or of a value at hand."""
        if isinstance(operand, Stack) or operand.aval.shape == ():
            return True
        is_at_hand = isinstance(operand, Value) and operand.is_at_hand
        return is_at_hand and operand.aval.shape[0] in (1, self._count)

    def _on_row(self, index: int, params: dict[str, Any]) -> Value:
        """The equation on one row of each operand, in a leading dim of one."""
        is_scalar = [a.aval.shape == () for a in self.inputs]
        rows = [
            a.values[index]
            if isinstance(a, Stack)
            else a
            if scalar
            else entry(self.program, a, min(index, a.aval.shape[0] - 1), self.eqn)
            for a, scalar in zip(self.inputs, is_scalar, strict=True)
        ]

        def run(*args: Any) -> Any:
            given = iter(args)
            full = [
                row.value
                if isinstance(row, Literal)
                else next(given)
                if scalar
                else next(given)[None]
                for row, scalar in zip(rows, is_scalar, strict=True)
            ]
            result = self.eqn.primitive.bind(*full, **params)
            return result[0] if self.eqn.primitive.multiple_results else result

        values = [row for row in rows if not isinstance(row, Literal)]
        return self.program.call(run, values, self.eqn)


def entry(program: Program, operand: Operand, index: int, of: jcore.JaxprEqn) -> Value:
    """Appends the equations that take an entry of the leading dim."""

    def take(value: Any) -> Any:
        return lax.squeeze(lax.slice_in_dim(value, index, index + 1), (0,))

    return program.call(take, [program.as_value(operand)], of)


def add_up(program: Program, parts: Sequence[Value], of: jcore.JaxprEqn) -> Value:
    """Appends the additions of several values, in their order."""
    total = parts[0]
    for part in parts[1:]:
        total = program.call(lax.add, [total, part], of)
    return total


def rows_of_layers(eqn: jcore.JaxprEqn, inputs: Sequence[Operand]) -> list[Operand] | None:
    """Lists the values that an equation stacks in a leading dim, if they are of several layers."""
    rows: list[Operand] = []
    if eqn.primitive.name == "stack" and eqn.params["axis"] == 0:
        rows = [*inputs]
    elif eqn.primitive.name == "concatenate" and eqn.params["dimension"] == 0:
        rows = [row for a in inputs if (row := _single_row(a)) is not None]
    return rows if len(rows) == len(inputs) and _are_of_several(rows) else None


def addends_of_layers(eqn: jcore.JaxprEqn, inputs: Sequence[Operand]) -> list[Value] | None:
    """Lists the values of whose elements an equation is the sum, if they are of several layers."""
    out: Any = eqn.outvars[0].aval
    joined = _joined(inputs[0]) if eqn.primitive.name == "reduce_sum" and out.shape == () else None
    parts = [a for a in joined or () if isinstance(a, Value)]
    return parts if joined and len(parts) == len(joined) and _are_of_several(parts) else None


def _are_of_several(values: Sequence[Operand]) -> bool:
    return len({v.position for v in values if isinstance(v, Value) and v.position >= 0}) > 1


def _joined(value: Operand) -> list[Operand] | None:
    """Lists the values of which a value is a stack or a concatenation, in any shape."""
    if isinstance(value, Literal) or value.node is None:
        return None
    node = value.node
    if node.name in ("concatenate", "stack"):
        return [part for operand in node.operands for part in _joined(operand) or [operand]]
    if node.name in ("reshape", "squeeze", "broadcast_in_dim") and len(node.operands) == 1:
        inner = node.operands[0]
        if math.prod(inner.aval.shape) == math.prod(value.aval.shape):
            return _joined(inner) or [inner]
    return None


def _single_row(operand: Operand) -> Operand | None:
    """Gives the value to which a leading dim of one was added; None for any other value."""
    if isinstance(operand, Literal) or operand.node is None or operand.aval.shape[0] != 1:
        return None
    node, shape = operand.node, operand.aval.shape
    if node.name not in ("broadcast_in_dim", "reshape") or len(node.operands) != 1:
        return None
    (row,) = node.operands
    dims = node.eqn.params.get("broadcast_dimensions", range(1, len(shape)))
    is_row = row.aval.shape == shape[1:] and tuple(dims) == tuple(range(1, len(shape)))
    return row if is_row else None
