"""Makes the graph of a traced loss: jits opened, stacks of layers taken apart.

In: the jaxpr of the loss. Out: `Graph`, its nodes in order. A checkpoint over several layers is
opened, with a note. A scan over the layers' stack becomes a row of bodies, each on the values of
one layer; the bodies are the same equations, and the program of a block has them once. Values that
the loss stacks by layer (a scan's ys, a list of losses) stay apart as long as equations allow it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jcore
from jax.extend.core import primitives

from dualpipe_jax._from_loss.lift import closed, lift_literals, program_of
from dualpipe_jax._from_loss.run import where
from dualpipe_jax._from_loss.values import Literal, Node, Operand, Source, Stack, Value, is_key
from dualpipe_jax._model.kinds import as_constants
from dualpipe_jax._split_vjp.primitives import ELEMENTWISE, REDUCTIONS

Input = Operand | Stack

# They act on the rows of a stack unless they name its leading dim.
_ACT_ON_ROWS = {"reduce_prod", "argmax", "argmin", "slice", "dynamic_slice"}


class Graph:
    """Holds the nodes of a traced loss.

    Attributes:
      nodes: The nodes, in an order in which they can run.
      notes: Remarks for the user.
      num_taken_apart: How many arrays that the loss stacks by layer are kept as their rows.
    """

    def __init__(self, *, takes_apart: bool = True):
        self.nodes: list[Node] = []
        self.notes: list[str] = []
        self.num_taken_apart = 0
        self._takes_apart = takes_apart
        # Programs over several layers, which cannot be opened, and the messages for them.
        self._closed_programs: dict[int, str] = {}
        # The calls around the equations that are appended: the last one is the innermost.
        self._calls: list[jcore.JaxprEqn] = []

    def append(self, program: jcore.ClosedJaxpr, inputs: Sequence[Input]) -> list[Input]:
        """Appends the equations of a program, and returns its outputs."""
        jaxpr = program.jaxpr
        env: dict[Any, Input] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update(zip(jaxpr.constvars, map(constant, program.consts), strict=True))

        def read(atom: Any) -> Input:
            return Literal(atom.val, atom.aval) if isinstance(atom, jcore.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            outs = self._equation(eqn, [read(atom) for atom in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def require_open(self, nodes: Sequence[Node]) -> None:
        """Refuses programs over several layers among `nodes`.

        Raises:
          ValueError: If there is one.
        """
        for node in nodes:
            if id(node) in self._closed_programs:
                raise ValueError(self._closed_programs[id(node)])

    def as_value(self, operand: Input, of: jcore.JaxprEqn | None = None) -> Value:
        """Gives a literal, or a stack, as one value; its equations stand where `of` stands."""
        if isinstance(operand, Stack):
            if operand.value is None:
                takes_apart, self._takes_apart = self._takes_apart, False
                items = [self.as_value(item, of) for item in operand.items]
                operand.value = self._call(lambda *items: jnp.stack(items), items, of)
                self._takes_apart = takes_apart
            return operand.value
        if isinstance(operand, Literal):
            return constant(np.asarray(operand.value, operand.aval.dtype))
        return operand

    def _call(
        self, f: Callable[..., Any], values: Sequence[Value], of: jcore.JaxprEqn | None = None
    ) -> Value:
        """Traces f and appends its equations, as if they stood where `of` stands."""
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in values]
        program = jax.make_jaxpr(f)(*avals)
        if of is not None:
            eqns = [eqn.replace(source_info=of.source_info) for eqn in program.jaxpr.eqns]
            program = jcore.ClosedJaxpr(program.jaxpr.replace(eqns=eqns), program.consts)
        return self.as_value(self.append(program, list(values))[0])

    def _equation(self, eqn: jcore.JaxprEqn, inputs: list[Input]) -> list[Any]:
        _refuse_effects(eqn)
        called = program_of(eqn)
        if called is not None:
            self._calls.append(eqn)
            outs = self.append(called, inputs)
            self._calls.pop()
            return outs
        stacks = [a for a in inputs if isinstance(a, Stack)]
        has_layers = any(stack.is_weights for stack in stacks)
        if has_layers and eqn.primitive is primitives.scan_p:
            return self._scan(eqn, inputs)
        of_layers = 0
        for a in inputs:
            if isinstance(a, Value) and a.is_weights:
                of_layers |= a.of_layers
        is_of_several = has_layers or bool(of_layers & (of_layers - 1))
        if is_of_several and eqn.primitive is primitives.remat_p:
            self.notes.append(
                f"{where(eqn)}: jax.checkpoint over several layers is opened; give remat= to "
                "value_and_grad instead"
            )
            return self.append(closed(eqn.params["jaxpr"]), inputs)
        if stacks:
            outs = self._by_layer(eqn, inputs, stacks)
            if outs is not None:
                return outs
        elif self._takes_apart and (rows := _rows(eqn, inputs)) is not None:
            self.num_taken_apart += 1
            return [Stack([self.as_value(row) for row in rows], eqn.outvars[0].aval)]
        elif self._takes_apart and (parts := _addends(eqn, inputs)) is not None:
            self.num_taken_apart += 1
            total = partial(jnp.sum, dtype=parts[0].aval.dtype)
            return [self._add_up(eqn, [self._call(total, [part], eqn) for part in parts])]
        operands = [self.as_value(a, eqn) if isinstance(a, Stack) else a for a in inputs]
        node = self._node(eqn, operands, of_layers)
        if is_of_several and any(_programs(eqn)):
            self._closed_programs[id(node)] = _cannot_open(eqn)
        return node.results

    def _node(self, eqn: jcore.JaxprEqn, operands: list[Operand], of_layers: int) -> Node:
        node = Node(eqn, operands, number=len(self.nodes), calls=tuple(self._calls))
        values = node.reads
        if eqn.primitive is primitives.remat_p and not closed(eqn.params["jaxpr"]).consts:
            node.lifted, literals = lift_literals(eqn)
            node.operands = [*operands, *(Literal(a.val, a.aval) for a in literals)]
            node.num_lifted = len(literals)
        elif eqn.primitive.name == "slice" and all(v.is_at_hand for v in values):
            starts, strides = eqn.params["start_indices"], eqn.params["strides"]
            if strides is None or set(strides) <= {1}:
                aval = jax.core.ShapedArray((), jnp.dtype("int32"))
                node.operands = [*operands, *(Literal(start, aval) for start in starts)]
                node.num_lifted = len(starts)
        is_contracted = any(v.is_contracted for v in values) or _contracts(eqn)
        node.results = [
            Value(
                v.aval,
                node,
                index,
                position=max((v.position for v in values), default=-1),
                of_ends=any(v.of_ends for v in values),
                of_batch=any(v.of_batch for v in values),
                of_layers=of_layers,
                is_contracted=is_contracted,
            )
            for index, v in enumerate(eqn.outvars)
        ]
        self.nodes.append(node)
        return node

    def _scan(self, eqn: jcore.JaxprEqn, inputs: list[Input]) -> list[Input]:
        """Takes a scan over the layers' stack apart: its body, on the values of each layer."""
        params, body = eqn.params, eqn.params["jaxpr"]
        num_xs = _num_stacked(eqn.invars, body.jaxpr.invars)
        num_carry = len(eqn.outvars) - _num_stacked(eqn.outvars, body.jaxpr.outvars)
        num_consts = len(inputs) - num_xs - num_carry
        num_before = num_consts + num_carry
        before = [
            self.as_value(a, eqn) if isinstance(a, Stack) and not a.is_weights else a
            for a in inputs[:num_before]
        ]
        consts, carry, xs = before[:num_consts], before[num_consts:], inputs[num_before:]
        if any(isinstance(a, Stack) for a in before):
            raise ValueError(
                f"loss_fn: a loop at {where(eqn)} indexes the layers' stack in its body (as "
                "fori_loop does), so that its layers cannot be told apart; use lax.scan with the "
                "stack as xs"
            )
        if params["reverse"]:
            raise ValueError(
                f"loss_fn: the scan at {where(eqn)} runs over the layers' stack from the last to "
                "the first; store the layers in the order in which they run"
            )
        if any(isinstance(a, Stack) and len(a.items) != params["length"] for a in xs):
            raise ValueError(
                f"loss_fn: the scan at {where(eqn)} must take one layer of the stack in each step"
            )
        rows = []
        for i in range(params["length"]):
            at = [a.items[i] if isinstance(a, Stack) else self._entry(a, i, eqn) for a in xs]
            outs = self.append(body, [*consts, *carry, *at])
            carry, ys = outs[:num_carry], outs[num_carry:]
            rows.append([self.as_value(y) for y in ys])
        columns = zip(*rows, strict=True)
        avals = [v.aval for v in eqn.outvars[num_carry:]]
        ys = [Stack(list(column), aval) for column, aval in zip(columns, avals, strict=True)]
        return [*carry, *ys]

    def _entry(self, operand: Operand, index: int, eqn: jcore.JaxprEqn) -> Value:
        def entry(value: Any) -> Any:
            return lax.squeeze(lax.slice_in_dim(value, index, index + 1), (0,))

        return self._call(entry, [self.as_value(operand)], eqn)

    def _by_layer(
        self, eqn: jcore.JaxprEqn, inputs: list[Input], stacks: list[Stack]
    ) -> list[Any] | None:
        """Replaces an equation on stacks by one on each layer's values; None if it cannot be."""
        name, params, first = eqn.primitive.name, dict(eqn.params), stacks[0]
        out: Any = eqn.outvars[0].aval
        count = len(first.items)
        if any(len(s.items) != count for s in stacks):
            return None
        if out.size == 0 and len(eqn.outvars) == 1 and not is_key(out):
            return [constant(np.zeros(out.shape, out.dtype))]
        if name == "reshape" and params["new_sizes"][:1] < (count,):
            return self._groups(first, out)
        if name in ("slice", "dynamic_slice", "squeeze"):
            taken = self._take(eqn, inputs, first)
            if taken is not None:
                return taken
        if name == "rev" and params["dimensions"] == (0,):
            return [Stack(first.items[::-1], out)]
        if any(isinstance(item, Stack) for stack in stacks for item in stack.items):
            return None
        if name == "reduce_sum" and 0 in params["axes"]:
            parts = first.values
            if len(params["axes"]) > 1:
                parts = [self._on_rows(eqn, params, [item], keeps_dim=True) for item in parts]
            return [self._add_up(eqn, parts)]
        is_dot_of_rows = False
        if name == "dot_general" and all(
            isinstance(a, Stack) or (isinstance(a, Value) and a.is_at_hand) for a in inputs
        ):
            contracted, batched = params["dimension_numbers"]
            is_dot_of_rows = [tuple(dims[:1]) for dims in batched] == [(0,), (0,)]
            if (0, 0) in zip(*contracted, strict=True):
                rows = [[self._row(a, i, eqn) for a in inputs] for i in range(count)]
                parts = [self._on_rows(eqn, params, row, keeps_dim=True) for row in rows]
                return [self._add_up(eqn, parts)]
        keeps_layers = (
            (
                (name in ELEMENTWISE or name == "integer_pow")
                and all(isinstance(a, Stack) or _has_rows(a, out.shape) for a in inputs)
            )
            or (name == "transpose" and params["permutation"][0] == 0)
            or (name == "rev" and 0 not in params["dimensions"])
            or (name == "reshape" and params["new_sizes"][:1] == (count,))
            or name in REDUCTIONS | _ACT_ON_ROWS
            or is_dot_of_rows
            or (name == "broadcast_in_dim" and params["broadcast_dimensions"][:1] == (0,))
        )
        if not keeps_layers or len(eqn.outvars) != 1 or out.shape[:1] != (count,):
            return None
        if params.get("axes") is not None and 0 in params["axes"]:
            return None
        for key in ("new_sizes", "shape", "limit_indices", "slice_sizes"):
            if key in params:
                params[key] = (1, *params[key][1:])
        items = [
            self._on_rows(eqn, params, [self._row(a, i, eqn) for a in inputs]) for i in range(count)
        ]
        return [Stack(items, out)]

    def _row(self, operand: Input, index: int, eqn: jcore.JaxprEqn) -> Operand:
        """Gives one layer's row of an operand; scalars are the same for all layers."""
        if isinstance(operand, Stack):
            return operand.values[index]
        shape = operand.aval.shape
        return operand if shape == () else self._entry(operand, min(index, shape[0] - 1), eqn)

    def _on_rows(
        self,
        eqn: jcore.JaxprEqn,
        params: dict[str, Any],
        rows: Sequence[Operand],
        *,
        keeps_dim: bool = False,
    ) -> Value:
        """Appends an equation on one row of each operand, in a leading dim of one."""
        avals: list[Any] = [a.aval for a in eqn.invars]
        is_scalar = [aval.shape == () for aval in avals]

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
            result = eqn.primitive.bind(*full, **params)
            result = result[0] if eqn.primitive.multiple_results else result
            return result if keeps_dim else result[0]

        return self._call(run, [row for row in rows if not isinstance(row, Literal)], eqn)

    def _add_up(self, eqn: jcore.JaxprEqn, parts: Sequence[Value]) -> Value:
        total = parts[0]
        for part in parts[1:]:
            total = self._call(lax.add, [total, part], eqn)
        return total

    def _groups(self, stack: Stack, aval: Any) -> list[Stack] | None:
        """Gives a stack in groups of as many layers each."""
        number = aval.shape[0] if aval.shape else 1
        size = len(stack.items) // number
        if aval.shape != (number, size, *stack.aval.shape[1:]):
            return None
        inner = aval.update(shape=aval.shape[1:])
        groups = (stack.items[i * size : (i + 1) * size] for i in range(number))
        return [Stack([Stack(group, inner) for group in groups], aval)]

    def _take(self, eqn: jcore.JaxprEqn, inputs: list[Input], stack: Stack) -> list[Any] | None:
        """Takes layers out of a stack: a slice of it, one layer, or the only one."""
        params, shape = eqn.params, stack.aval.shape
        out: Any = eqn.outvars[0].aval
        if eqn.primitive.name == "slice":
            start, limit = params["start_indices"], params["limit_indices"]
            is_of_layers = (start[1:], limit[1:]) == ((0,) * (len(shape) - 1), shape[1:])
            if is_of_layers and set(params["strides"] or (1,)) == {1}:
                return [Stack(stack.items[start[0] : limit[0]], out)]
            return None
        if eqn.primitive.name == "dynamic_slice":
            index, sizes = inputs[1], params["slice_sizes"]
            if isinstance(index, Literal) and sizes == (1, *shape[1:]):
                layer = min(max(int(index.value), 0), len(stack.items) - 1)
                return [Stack([stack.items[layer]], out)]
            return None
        if 0 in params["dimensions"] and len(stack.items) == 1:
            rest = tuple(dim - 1 for dim in params["dimensions"] if dim)
            item = stack.items[0]
            squeeze = partial(lax.squeeze, dimensions=rest)
            return [self._call(squeeze, [self.as_value(item)], eqn) if rest else item]
        if 0 not in params["dimensions"]:
            squeeze = partial(
                lax.squeeze, dimensions=tuple(dim - 1 for dim in params["dimensions"])
            )
            items = [self._call(squeeze, [self.as_value(item)], eqn) for item in stack.items]
            return [Stack(items, out)]
        return None


def constant(array: Any) -> Value:
    """Makes a value of a constant."""
    array = as_constants(array)
    return Value(jax.typeof(array), source=Source("const", array=array))


def _has_rows(operand: Operand, shape: tuple[int, ...]) -> bool:
    """Whether each layer can have its row of an operand beside a stack of a shape."""
    own = operand.aval.shape
    is_at_hand = isinstance(operand, Value) and operand.is_at_hand
    return own == () or (is_at_hand and len(own) == len(shape) and own[0] in (1, shape[0]))


def _rows(eqn: jcore.JaxprEqn, inputs: Sequence[Input]) -> list[Operand] | None:
    """Lists the values that an equation stacks in a leading dim, if they are of several layers."""
    operands = [a for a in inputs if not isinstance(a, Stack)]
    if len(operands) < len(inputs):
        return None
    rows: list[Operand] = []
    if eqn.primitive.name == "stack" and eqn.params["axis"] == 0:
        rows = operands
    elif eqn.primitive.name == "concatenate" and eqn.params["dimension"] == 0:
        rows = [row for a in operands if (row := _single_row(a)) is not None]
    of_layers = {v.position for v in rows if isinstance(v, Value) and v.position >= 0}
    return rows if len(rows) == len(operands) and len(of_layers) > 1 else None


def _addends(eqn: jcore.JaxprEqn, inputs: Sequence[Input]) -> list[Value] | None:
    """Lists the values of whose elements an equation is the sum, if they are of several layers."""
    out: Any = eqn.outvars[0].aval
    is_sum = eqn.primitive.name == "reduce_sum" and out.shape == ()
    joined = _joined(inputs[0]) if is_sum and isinstance(inputs[0], Value) else None
    parts = [a for a in joined or () if isinstance(a, Value)]
    of_layers = {v.position for v in parts if v.position >= 0}
    return parts if joined and len(parts) == len(joined) and len(of_layers) > 1 else None


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


def _num_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    """Counts the operands, or results, of a scan that have a dim more than in its body."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(a.aval.shape) > len(b.aval.shape) for a, b in pairs)


def _programs(eqn: jcore.JaxprEqn) -> list[Any]:
    """Lists the programs within an equation."""
    found: list[Any] = []
    for value in eqn.params.values():
        entries = value if isinstance(value, tuple | list) else (value,)
        found += [v for v in entries if isinstance(v, jcore.Jaxpr | jcore.ClosedJaxpr)]
    return found


def _contracts(eqn: jcore.JaxprEqn) -> bool:
    """Whether a contraction is in an equation, so that it is too much work to be done again."""
    if eqn.primitive.name == "dot_general":
        (dims, _), _ = eqn.params["dimension_numbers"]
        return bool(dims)
    if eqn.primitive.name.startswith(("conv_", "ragged_dot", "pallas_call")):
        return True
    programs = [getattr(program, "jaxpr", program) for program in _programs(eqn)]
    return any(_contracts(inner) for program in programs for inner in program.eqns)


def _cannot_open(eqn: jcore.JaxprEqn) -> str:
    name = eqn.primitive.name
    cure = "apply it to each layer by itself"
    if name == "shard_map":
        cure = "take it off (value_and_grad shards the batch by batch_axes=), or write the model "
        cure += "as embed, block and head and name its axes in manual_axes="
    elif name == "while":
        cure = "use lax.scan, with the layers' stack as xs"
    return (
        f"loss_fn: one {name} at {where(eqn)} has several layers in it, and cannot be opened "
        f"without changing its meaning; {cure}"
    )


def _refuse_effects(eqn: jcore.JaxprEqn) -> None:
    """Refuses effects: parts of the program run at other times, or on several devices."""
    names = {type(effect).__name__ for effect in eqn.effects}
    # JAX counts it as an effect that an equation names a mesh axis.
    if names - {"NamedAxisEffect"}:
        raise ValueError(
            f"loss_fn: {eqn.primitive.name} at {where(eqn)} has an effect "
            f"({', '.join(sorted(names))}), which would run at other times and on several devices; "
            "take it out, or return the value as a metric (has_aux=True)"
        )
