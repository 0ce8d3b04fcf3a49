"""Splits a `scan` of the backward into the loop that dx needs and a loop for the rest.

A transposed scan makes dx and dW together. Its body is divided as a block is: the nodes that the
input gradient needs run in the first loop, which also stacks, per iteration, the values that the
second loop needs; the second loop makes the weight gradients from them.

>>> import jax, jax.numpy as jnp
>>> from dualpipe_jax._split_vjp.equations import graph_of
>>> from dualpipe_jax._split_vjp.graph import show
>>> def backward(dy, w, x):  # of x = sin(w * x), layer by layer
...     def layer(dy, wx):
...         d = dy * jnp.cos(wx[0] * wx[1])
...         return d * wx[0], d * wx[1]
...
...     return jax.lax.scan(layer, dy, (w, x))
>>> jaxpr = jax.make_jaxpr(backward)(1.0, jnp.ones(5), jnp.ones(5))
>>> graph, inputs, (dx, dw) = graph_of(jaxpr, [When.BACKWARD, When.ALWAYS, When.FORWARD])
>>> names = dict(zip([*inputs, dx, dw], ["dy", "w", "x", "dx", "dw"]))
>>> show(graph.nodes, names)
dx dw = scan dy w x
>>> show(
...     graph.nodes[0].inner.split(graph, graph.nodes[0], {dx}), names
... )  # v5 are the five values of d
dx v5 = scan dy w x
dw = scan x v5
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax import lax
from jax.extend import core as jcore

from dualpipe_jax._split_vjp.bodies import Body, Opened, cut_between, split_bodies
from dualpipe_jax._split_vjp.graph import (
    Atom,
    Graph,
    Node,
    When,
    evaluate,
    needed,
    numbers,
    read,
)
from dualpipe_jax._split_vjp.with_input_grad import is_made_with


@dataclass(frozen=True)
class Scan:
    """A `lax.scan` equation.

    Attributes:
      body: Takes consts, carries, xs; returns carries and ys.
      avals: For each input of the body its aval.
      inputs: The operands: consts, carries and stacked xs.
      num_consts: How many of them are consts.
      num_carry: How many of them, and of the outputs, are carries.
      length, reverse, unroll: As in `lax.scan`.
    """

    body: Body
    avals: tuple[Any, ...]
    inputs: tuple[Atom, ...]
    num_consts: int
    num_carry: int
    length: int
    reverse: bool
    unroll: int

    @classmethod
    def of(cls, eqn: jcore.JaxprEqn, inputs: tuple[Atom, ...], body: Body) -> "Scan":
        """Reads the equation."""
        params, jaxpr = eqn.params, eqn.params["jaxpr"].jaxpr
        # How an equation says which inputs are which differs between releases of JAX; that xs and
        # ys have one dim more outside than inside does not.
        num_xs = _count_stacked(eqn.invars, jaxpr.invars)
        num_carry = len(eqn.outvars) - _count_stacked(eqn.outvars, jaxpr.outvars)
        return cls(
            body=body,
            avals=tuple(v.aval for v in jaxpr.invars),
            inputs=inputs,
            num_consts=len(eqn.invars) - num_xs - num_carry,
            num_carry=num_carry,
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )

    def split(self, graph: Graph, node: Node, wanted: set[int]) -> list[Node]:
        """Splits `node` into a loop for its outputs in `wanted` and one for the rest."""
        body = self._open(graph)
        first_outputs = {i for i, value in enumerate(node.outputs) if value in wanted}
        first_outputs, nodes, first = self._grow(body, first_outputs)
        second_outputs = set(range(len(node.outputs))) - first_outputs
        if not second_outputs:
            return [node]

        # Both loops are given consts and xs, and the second loop has its own carries.
        carry_in = body.inputs[self.num_consts : self.num_consts + self.num_carry]
        own = {carry_in[i] for i in first_outputs if i < self.num_carry}
        shared = {v for v in body.inputs if v not in own}
        wanted_second = numbers(body.outputs[i] for i in sorted(second_outputs))
        passed = sorted(
            cut_between(
                body.graph,
                nodes,
                first,
                wanted_second,
                is_free=lambda v: v in shared or body.graph.is_free(v),
            )
        )
        second = needed(nodes, wanted_second, known=passed)
        stacks = [graph.new_value(self._stacked(body.graph.avals[v]), node.when) for v in passed]
        loop = _Loop(node, self, body)
        return [
            loop.node(first, sorted(first_outputs), writes=passed, extra_outputs=stacks),
            loop.node(second, sorted(second_outputs), reads=passed, extra_inputs=stacks),
        ]

    def _open(self, graph: Graph) -> Opened:
        # Both loops are given consts and xs; only values that depend on a carry belong to one.
        inner = Graph()
        inputs: list[Atom] = [
            inner.new_value(aval, self._when(graph, i)) for i, aval in enumerate(self.avals)
        ]
        return Opened(inner, inputs, self.body(inner, inputs))

    def _when(self, graph: Graph, index: int) -> When:
        if self.num_consts <= index < self.num_consts + self.num_carry:
            return When.BACKWARD
        operand = self.inputs[index]
        return min(graph.when[operand], When.FORWARD) if isinstance(operand, int) else When.ALWAYS

    def _grow(self, body: Opened, outputs: set[int]) -> tuple[set[int], list[Node], list[Node]]:
        """Adds the outputs that the first loop makes anyway, and every carry that they depend on.

        Returns:
          Indices of the first loop's outputs, all nodes of the body, and those of the first loop.
        """
        carry_in = body.inputs[self.num_consts : self.num_consts + self.num_carry]
        # Each round but the last adds an output at least.
        for _ in range(len(body.outputs) + 1):
            wanted = [body.outputs[i] for i in outputs]
            nodes = split_bodies(body.graph, wanted)
            first = needed(nodes, wanted)
            reads = {v for n in first for v in n.reads}.union(wanted)
            grown = outputs | {i for i, v in enumerate(carry_in) if v in reads}
            grown |= {
                i for i, v in enumerate(body.outputs) if is_made_with(body.graph, nodes, first, v)
            }
            if grown == outputs:
                return outputs, nodes, first
            outputs = grown
        raise AssertionError(f"outputs of a scan grew without end: {outputs}")

    def _stacked(self, aval: Any) -> Any:
        return aval.update(shape=(self.length, *aval.shape))


def _count_stacked(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(o.aval.shape) > len(i.aval.shape) for o, i in zip(outside, inside, strict=True))


class _Loop:
    """Builds scans that run a part of the body of one scan."""

    def __init__(self, original: Node, scan: Scan, body: Opened):
        self.original, self.scan, self.body = original, scan, body

    def node(
        self,
        nodes: list[Node],
        outputs: list[int],
        *,
        writes: Sequence[int] = (),
        reads: Sequence[int] = (),
        extra_outputs: Sequence[int] = (),
        extra_inputs: Sequence[int] = (),
    ) -> Node:
        """Makes the node that runs `nodes` in each iteration.

        Args:
          nodes: Nodes of the body.
          outputs: Indices of the scan's outputs that it returns.
          writes: Values of the body that it stacks besides.
          reads: Values of the body that it is given stacked.
          extra_outputs: The stacks of `writes`, values of the scan's graph.
          extra_inputs: The stacks of `reads`, values of the scan's graph.
        """
        scan, results = self.scan, self.body.outputs
        num_consts, num_carry = scan.num_consts, scan.num_carry
        carries = [i for i in outputs if i < num_carry]
        stacked = [i for i in outputs if i >= num_carry]
        used = {v for n in nodes for v in n.reads}.union(writes).difference(reads)
        used.update(numbers(results[i] for i in outputs))
        inputs = numbers(self.body.inputs)
        consts = [i for i in range(num_consts) if inputs[i] in used]
        xs = [i for i in range(num_consts + num_carry, len(inputs)) if inputs[i] in used]
        taken = [*consts, *(num_consts + i for i in carries), *xs]

        def run(*values: Any) -> Sequence[Any]:
            const_values = values[: len(consts)]
            carry_values = values[len(consts) : len(consts) + len(carries)]
            xs_values = values[len(consts) + len(carries) :]

            def body(carry: Any, x: Any) -> tuple[Any, Any]:
                env = dict(zip([inputs[i] for i in consts], const_values, strict=True))
                env.update(zip([inputs[num_consts + i] for i in carries], carry, strict=True))
                env.update(zip([*(inputs[i] for i in xs), *reads], x, strict=True))
                evaluate(nodes, env)
                new_carry = [read(env, results[i]) for i in carries]
                written = [read(env, results[i]) for i in stacked]
                return tuple(new_carry), (*written, *(env[v] for v in writes))

            carry, ys = lax.scan(
                body,
                tuple(carry_values),
                tuple(xs_values),
                length=scan.length,
                reverse=scan.reverse,
                unroll=scan.unroll,
            )
            return [*carry, *ys]

        original = self.original
        return Node(
            name="scan",
            run=run,
            inputs=(*(scan.inputs[i] for i in taken), *extra_inputs),
            outputs=(*(original.outputs[i] for i in [*carries, *stacked]), *extra_outputs),
            when=original.when,
            has_effect=original.has_effect,
        )
