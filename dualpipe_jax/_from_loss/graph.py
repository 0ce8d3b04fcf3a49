"""Makes the graph of a traced loss: jits opened, stacks of layers taken apart.

In: the jaxpr of the loss. Out: `Graph`, its nodes in order. A checkpoint over several layers is
opened, with a note. A scan over the layers' stack becomes a row of bodies, each on the values of
one layer; the bodies are the same equations, and the program of a block has them once. Values that
the loss stacks by layer (a scan's ys, a list of losses) stay apart as long as equations allow it.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jcore
from jax.extend.core import primitives

from dualpipe_jax._from_loss.by_layer import (
    Input,
    OnStacks,
    entry,
)
from dualpipe_jax._from_loss.equality import Equality, aval_token, value_token
from dualpipe_jax._from_loss.evaluate import evaluate
from dualpipe_jax._from_loss.lift import LIFTABLE, closed, lift_literals, program_of
from dualpipe_jax._from_loss.run import where
from dualpipe_jax._from_loss.values import (
    Literal,
    Node,
    Operand,
    Stack,
    Value,
    constant,
    is_key,
    needed,
)


class Graph:
    """Holds the nodes of a traced loss.

    Attributes:
      nodes: The nodes, in an order in which they can run.
      equality: Names the equations.
      notes: Remarks for the user.
    """

    def __init__(self, equality: Equality):
        self.nodes: list[Node] = []
        self.equality = equality
        # An equation on operands that had it before is not appended again.
        self._known_nodes: dict[Hashable, Node] = {}
        self.notes: list[str] = []
        # False while the rows of a stack are put into one array again.
        self._takes_apart = True
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
                operand.value = self.call(lambda *items: jnp.stack(items), items, of)
                self._takes_apart = takes_apart
            return operand.value
        if isinstance(operand, Literal):
            return constant(np.asarray(operand.value, operand.aval.dtype))
        return operand

    def known(self, operand: Input) -> np.ndarray | None:
        """Gives the array of an operand that is made of literals and constants alone.

        An index of the layers' stack is: a loop's counter, and what jnp makes of it.
        """
        if isinstance(operand, Literal):
            value = operand.value
            return None if isinstance(value, jax.core.Tracer) else np.asarray(value)
        if isinstance(operand, Stack) or not operand.is_free or operand.of_batch:
            return None
        nodes = needed([operand])
        sources = [v.source for v in (operand, *(v for n in nodes for v in n.reads)) if v.source]
        if is_key(operand.aval) or any(isinstance(s.array, jax.core.Tracer) for s in sources):
            return None
        with jax.ensure_compile_time_eval():
            return np.asarray(evaluate([operand], {})[0])

    def call(
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
        if has_layers and eqn.primitive is primitives.scan_p and eqn.params["length"]:
            return self._scan(eqn, inputs)
        of_layers = 0
        for a in inputs:
            if isinstance(a, Value) and a.is_weights and not a.crosses:
                of_layers |= a.of_layers
        is_of_several = has_layers or bool(of_layers & (of_layers - 1))
        if is_of_several and eqn.primitive is primitives.remat_p:
            self.notes.append(
                f"{where(eqn)}: jax.checkpoint over several layers is opened; give remat= to "
                "value_and_grad instead"
            )
            return self.append(closed(eqn.params["jaxpr"]), inputs)
        outs = OnStacks(self, eqn, inputs).by_layer() if stacks else None
        if outs is not None:
            return outs
        operands = [self.as_value(a, eqn) if isinstance(a, Stack) else a for a in inputs]
        positions = {a.position for a in operands if isinstance(a, Value)} - {-1}
        is_stack = eqn.primitive.name == "stack" and eqn.params["axis"] == 0 and not stacks
        if is_stack and len(positions) > 1 and self._takes_apart:
            return [Stack([self.as_value(row) for row in operands], eqn.outvars[0].aval)]
        node = self._node(eqn, operands, of_layers)
        if is_of_several and any(_programs(eqn)):
            self._closed_programs[id(node)] = _cannot_open(eqn)
        return node.results

    def _node(self, eqn: jcore.JaxprEqn, operands: list[Operand], of_layers: int) -> Node:
        node = Node(eqn, operands, number=len(self.nodes), calls=tuple(self._calls))
        if eqn.primitive in LIFTABLE:
            found = lift_literals(eqn)
            if found is not None:
                node.lifted, literals = found
                node.operands = [*operands, *(Literal(a.val, a.aval) for a in literals)]
                node.num_lifted = len(literals)
        elif eqn.primitive.name == "slice":
            starts, strides = eqn.params["start_indices"], eqn.params["strides"]
            if strides is None or set(strides) <= {1}:
                aval = jax.core.ShapedArray((), jnp.dtype("int32"))
                node.operands = [*operands, *(Literal(start, aval) for start in starts)]
                node.num_lifted = len(starts)
        node.token = self._token(node)
        key = (
            node.token,
            tuple(id(a) if isinstance(a, Value) else value_token(a.value) for a in node.operands),
        )
        if self._known_nodes.setdefault(key, node) is not node:
            return self._known_nodes[key]
        values = node.reads
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

    def _token(self, node: Node) -> Hashable:
        """Names the function of its operands that a node is."""
        if node.lifted is not None:
            function: Hashable = self.equality.program(node.lifted)
        elif node.num_lifted:
            function = ("slice", aval_token(node.eqn.outvars[0].aval))
        else:
            function = self.equality.equation(node.eqn)
        return function, tuple((a.aval.shape, a.aval.dtype) for a in node.operands)

    def _scan(self, eqn: jcore.JaxprEqn, inputs: list[Input]) -> list[Input]:
        """Takes a scan over the layers' stack apart: its body, on the values of each layer.

        The stack is among the xs, or the body reads it by the index of a step.
        """
        params, body = eqn.params, eqn.params["jaxpr"]
        num_before = params["num_consts"] + params["num_carry"]
        before = [
            self.as_value(a, eqn) if isinstance(a, Stack) and not a.is_weights else a
            for a in inputs[:num_before]
        ]
        consts, carry = before[: params["num_consts"]], before[params["num_consts"] :]
        xs, length = inputs[num_before:], params["length"]
        most = max(len(a.items) for a in inputs if isinstance(a, Stack))
        if length > most:
            raise ValueError(
                f"loss_fn: the loop at {where(eqn)} reads the layers' stack of {most} in "
                f"{length} steps; a loop over layers must run each of them once"
            )
        if any(isinstance(a, Stack) and len(a.items) != length for a in xs):
            raise ValueError(
                f"loss_fn: the scan at {where(eqn)} must take one layer of the stack in each step"
            )
        rows: list[list[Value]] = [[]] * length
        for i in reversed(range(length)) if params["reverse"] else range(length):
            at = [
                a.items[i] if isinstance(a, Stack) else self._number(entry(self, a, i, eqn))
                for a in xs
            ]
            outs = self.append(body, [*consts, *map(self._number, carry), *at])
            carry, ys = outs[: len(carry)], outs[len(carry) :]
            rows[i] = [self.as_value(y) for y in ys]
        columns = zip(*rows, strict=True)
        avals = [v.aval for v in eqn.outvars[len(carry) :]]
        ys = [Stack(list(column), aval) for column, aval in zip(columns, avals, strict=True)]
        return [*carry, *ys]

    def _number(self, operand: Input) -> Input:
        """Gives a known scalar as a literal: a step's index, or its entry of a table."""
        if isinstance(operand, Stack | Literal) or operand.aval.shape:
            return operand
        known = self.known(operand)
        return operand if known is None else Literal(known, operand.aval)


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
