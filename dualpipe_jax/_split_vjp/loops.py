"""Splits a `scan` of the backward in two: the part that dx needs, and the rest.

A transposed scan makes dx and dW together. Its body is divided as a block is: what the input
gradient needs runs in the first loop, which also writes down, per iteration, the values that the
second loop needs; the second loop makes the weight gradients from them.
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from dualpipe_jax._split_vjp.graph import Graph, Node, Scan, When, evaluate, needed, read


def split_scan(graph: Graph, node: Node, wanted: set[int]) -> list[Node]:
    """Splits `node` into the loop that makes the outputs in `wanted` and the loop for the rest.

    Returns:
      The two nodes, or `[node]` if the first loop would need every output.
    """
    assert node.loop is not None
    num_consts, num_carry = node.loop.num_consts, node.loop.num_carry
    body = Graph()
    jaxpr = node.loop.jaxpr
    body_inputs: list[int] = [body.new_value(v.aval, When.ALWAYS) for v in jaxpr.jaxpr.invars]
    body_outputs = body.add(jaxpr.jaxpr, jaxpr.consts, body_inputs)
    carry_in = body_inputs[num_consts : num_consts + num_carry]  # numbers of values

    # Which outputs the first loop makes: those wanted, and every carry that they depend on.
    first = {i for i, value in enumerate(node.outputs) if value in wanted}
    while True:
        first_nodes = needed(body.nodes, [body_outputs[i] for i in first])
        read_values = {v for n in first_nodes for v in n.reads}
        read_values |= {body_outputs[i] for i in first if isinstance(body_outputs[i], int)}
        grown = first | {i for i, v in enumerate(carry_in) if v in read_values}
        if grown == first:
            break
        first = grown
    second = set(range(len(node.outputs))) - first
    if not second:
        return [node]

    in_first = {id(n) for n in first_nodes}
    second_nodes = needed(
        [n for n in body.nodes if id(n) not in in_first], [body_outputs[i] for i in second]
    )
    made: set[int] = {v for n in first_nodes for v in n.outputs}
    made |= {carry_in[i] for i in range(num_carry) if i in first}
    reads = {v for n in second_nodes for v in n.reads}
    reads |= {body_outputs[i] for i in second if isinstance(body_outputs[i], int)}
    passed = sorted(made.intersection(reads))

    length = node.loop.length
    passed_values = [
        graph.new_value(body.avals[v].update(shape=(length, *body.avals[v].shape)), node.when)
        for v in passed
    ]
    loop = _Loop(node, node.loop, body_inputs, body_outputs)
    return [
        loop.node(first_nodes, sorted(first), writes=passed, extra_outputs=passed_values),
        loop.node(second_nodes, sorted(second), reads=passed, extra_inputs=passed_values),
    ]


class _Loop:
    """Builds scans that run a part of the body of one scan."""

    def __init__(self, node: Node, loop: Scan, inputs: list[int], outputs: list[Any]):
        self.original, self.loop = node, loop
        self.body_inputs, self.body_outputs = inputs, outputs

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
        """Makes the node that runs `nodes` and returns `outputs`, numbers of the scan's outputs."""
        num_consts, num_carry = self.loop.num_consts, self.loop.num_carry
        carries = [i for i in outputs if i < num_carry]
        stacked = [i for i in outputs if i >= num_carry]
        used = {v for n in nodes for v in n.reads} | set(writes)
        used |= {v for i in outputs if isinstance(v := self.body_outputs[i], int)}
        inputs = self.body_inputs
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
                new_carry = [read(env, self.body_outputs[i]) for i in carries]
                written = [read(env, self.body_outputs[i]) for i in stacked]
                return tuple(new_carry), (*written, *(env[v] for v in writes))

            carry, ys = lax.scan(
                body,
                tuple(carry_values),
                tuple(xs_values),
                length=self.loop.length,
                reverse=self.loop.reverse,
                unroll=self.loop.unroll,
            )
            return [*carry, *ys]

        original = self.original
        return Node(
            name="scan",
            run=run,
            inputs=(*(self.loop.inputs[i] for i in taken), *extra_inputs),
            outputs=(*(original.outputs[i] for i in [*carries, *stacked]), *extra_outputs),
            when=original.when,
            has_effect=original.has_effect,
        )
