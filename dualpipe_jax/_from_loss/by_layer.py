"""Equations on stacks, as equations on the values of each layer.

An array with a row for each layer stays a `Stack` as long as equations act on each row by itself,
or only put rows elsewhere; a sum over rows becomes additions. Any other equation needs the stack as
one array.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jcore

from dualpipe_jax._from_loss.values import Literal, Operand, Stack, Value, constant, is_key
from dualpipe_jax._split_vjp.primitives import ELEMENTWISE, REDUCTIONS

Input = Operand | Stack

# How two rows are combined in a reduction over rows, and the value that changes nothing.
_COMBINE: dict[str, tuple[Callable[..., Any], Callable[[Any], Any]]] = {
    "reduce_sum": (lax.add, lambda dtype: 0),
    "reduce_prod": (lax.mul, lambda dtype: 1),
    "reduce_and": (lax.bitwise_and, lambda dtype: ~np.zeros((), dtype)),
    "reduce_or": (lax.bitwise_or, lambda dtype: 0),
    "reduce_max": (lax.max, lambda dtype: _limits(dtype)[0]),
    "reduce_min": (lax.min, lambda dtype: _limits(dtype)[1]),
}


def _limits(dtype: Any) -> tuple[Any, Any]:
    """Gives the least and the largest value of a type."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return -np.inf, np.inf
    if jnp.issubdtype(dtype, jnp.bool_):
        return False, True
    return jnp.iinfo(dtype).min, jnp.iinfo(dtype).max


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

    def known(self, operand: Input) -> np.ndarray | None:
        """Gives the array of an operand that is made of literals and constants alone."""
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
        if self.eqn.primitive.name == "concatenate":
            return self._joined()
        if len({len(stack.items) for stack in self._stacks}) > 1:
            return None
        if self.eqn.primitive.name in ("split", "unstack"):
            return self._taken_apart()
        if len(self.eqn.outvars) > 1:
            return None
        if self._out.size == 0 and not is_key(self._out):
            return [constant(np.zeros(self._out.shape, self._out.dtype))]
        ways = (self._put_elsewhere, self._combined, self._on_each_row)
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
                step, *others = params["strides"] or (1,) * len(shape)
                if has_whole_rows and set(others) <= {1}:
                    return Stack(stack.items[start[0] : limit[0] : step], out)
            case "dynamic_slice" if params["slice_sizes"][1:] == rest:
                start = self.program.known(self.inputs[1])
                if start is not None:  # the others can only be zero
                    layer = min(max(int(start), 0), shape[0] - out.shape[0])
                    return Stack(stack.items[layer : layer + out.shape[0]], out)
            case "gather" if stack is self.inputs[0]:
                return self._gathered(stack)
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

    def _gathered(self, stack: Stack) -> Input | None:
        """Rows of known numbers, or the only one without its dim."""
        params, rest = self.eqn.params, stack.aval.shape[1:]
        dims = params["dimension_numbers"]
        numbers = self.program.known(self.inputs[1])
        if numbers is None or numbers.ndim > 2 or numbers.shape[-1] != 1:
            return None
        are_rows = (
            params["slice_sizes"] == (1, *rest)
            and (dims.start_index_map, dims.collapsed_slice_dims) == ((0,), (0,))
            and dims.offset_dims == tuple(range(numbers.ndim - 1, self._out.ndim))
            and not dims.operand_batching_dims
        )
        if not are_rows or not all(0 <= i < self._count for i in numbers.ravel()):
            return None
        rows = [stack.items[i] for i in numbers.ravel()]
        return Stack(rows, self._out) if numbers.ndim == 2 else rows[0]

    def _joined(self) -> list[Any] | None:
        """The rows of several stacks."""
        stacks = self._stacks
        if self.eqn.params["dimension"] != 0 or len(stacks) < len(self.inputs):
            return None
        return [Stack([item for stack in stacks for item in stack.items], self._out)]

    def _taken_apart(self) -> list[Any] | None:
        """Parts of a stack: groups of rows, each row, or a part of every row."""
        stack, params = self._stacks[0], self.eqn.params
        outs = [v.aval for v in self.eqn.outvars]
        axis = params["axis"]
        if self.eqn.primitive.name == "unstack":
            return [*stack.items] if axis == 0 else None
        sizes = [int(size) for size in params["sizes"]]
        ends = np.cumsum(sizes)
        if axis == 0:
            parts = [stack.items[end - size : end] for size, end in zip(sizes, ends, strict=True)]
            return [Stack(part, out) for part, out in zip(parts, outs, strict=True)]
        if self._has_groups:
            return None

        def part(item: Value, size: int, end: int) -> Value:
            cut = partial(lax.slice_in_dim, start_index=end - size, limit_index=end, axis=axis - 1)
            return self.program.call(cut, [item], self.eqn)

        return [
            Stack([part(item, size, int(end)) for item in stack.values], out)
            for size, end, out in zip(sizes, ends, outs, strict=True)
        ]

    def _combined(self) -> Value | None:
        """A sum, a maximum, ... or a contraction over rows: of two at a time."""
        name, params = self.eqn.primitive.name, self.eqn.params
        if self._has_groups:
            return None
        if name in _COMBINE and params["axes"] == (0,):
            return combine(self.program, name, self._stacks[0].values, self.eqn)
        is_over_rows = name in _COMBINE and 0 in params["axes"]
        is_dot = (
            name == "dot_general"
            and all(map(self._has_rows, self.inputs))
            and (0, 0) in zip(*params["dimension_numbers"][0], strict=True)
        )
        if not is_over_rows and not is_dot:
            return None
        if is_over_rows and name in ("reduce_max", "reduce_min"):
            return None  # a gradient is shared by all elements that are the maximum
        parts = [self._on_row(i, params) for i in range(self._count)]
        return combine(self.program, name, parts, self.eqn)

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


def combine(program: Program, name: str, parts: Sequence[Value], of: jcore.JaxprEqn) -> Value:
    """Appends the combinations of values, in their order, as the reduction `name` has them.

    The first one is combined too, with the value that changes nothing: all layers are then alike.
    """
    two, first = _COMBINE.get(name, _COMBINE["reduce_sum"])
    aval = parts[0].aval
    total = program.call(lambda: jnp.full(aval.shape, first(aval.dtype), aval.dtype), [], of)
    if name not in ("reduce_max", "reduce_min"):
        for part in parts:
            total = program.call(two, [total, part], of)
        return total
    count = program.call(lambda: jnp.zeros(aval.shape, aval.dtype), [], of)
    find = partial(_running, name == "reduce_max")
    for part in parts:
        total, count = (
            program.call(lambda *args, i=i: find(*args)[i], [total, count, part], of)
            for i in range(2)
        )
    return total


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _running(is_max: bool, best: Any, count: Any, value: Any) -> tuple[Any, Any]:
    """Gives the better one of two values, and how many have it.

    `lax.reduce_max` shares its gradient between all elements that are the maximum; so do the
    counts, where two at a time would halve it again and again.
    """
    is_better = value > best if is_max else value < best
    tied = jnp.where(best == value, count + 1, count)
    choose = jnp.maximum if is_max else jnp.minimum
    return choose(best, value), jnp.where(is_better, 1, tied).astype(count.dtype)


def _running_forward(is_max: bool, best: Any, count: Any, value: Any) -> Any:
    results = _running(is_max, best, count, value)
    is_better = value > best if is_max else value < best
    of_value = jnp.where(is_better, 1, jnp.where(best == value, 1 / (count + 1), 0))
    return results, of_value.astype(value.dtype)


def _running_backward(is_max: bool, of_value: Any, cotangents: Any) -> Any:
    cotangent, of_count = cotangents
    return cotangent * (1 - of_value), jnp.zeros_like(of_count), cotangent * of_value


_running.defvjp(_running_forward, _running_backward)
