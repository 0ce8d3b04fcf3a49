"""Splits a `scan` of the backward in two: the part that dx needs, and the rest.

A transposed scan makes dx and dW together. Its body is divided as a block is: what the input
gradient needs runs in the first loop, which also writes down, per iteration, the values that the
second loop needs; the second loop makes the weight gradients from them.
"""

from collections.abc import Sequence
from typing import Any

from jax import lax

from dualpipe_jax._split_vjp.bodies import SplitInner
from dualpipe_jax._split_vjp.cut import CHEAP, minimum_cut
from dualpipe_jax._split_vjp.graph import Graph, Node, Scan, When, evaluate, needed, read
from dualpipe_jax._split_vjp.with_input_grad import is_early


def split_scan(
    graph: Graph, node: Node, scan: Scan, wanted: set[int], split_inner: SplitInner
) -> list[Node]:
    """Splits `node` into the loop that makes the outputs in `wanted` and the loop for the rest.

    `split_inner` is what splits the nodes of its body.

    Returns:
      The two nodes, or `[node]` if the first loop would need every output.
    """
    num_consts, num_carry = scan.num_consts, scan.num_carry
    body, jaxpr = Graph(), scan.jaxpr
    # Both loops are given consts and xs; only what hangs on a carry belongs to one of them.
    times = [
        When.BACKWARD
        if num_consts <= i < num_consts + num_carry
        else min(graph.when[v], When.FORWARD)
        if isinstance(v, int)
        else When.ALWAYS
        for i, v in enumerate(scan.inputs)
    ]
    inputs = [body.new_value(v.aval, t) for v, t in zip(jaxpr.jaxpr.invars, times, strict=True)]
    outputs = body.add(jaxpr.jaxpr, jaxpr.consts, inputs)
    carry_in = inputs[num_consts : num_consts + num_carry]

    # Which outputs the first loop makes: those wanted, those made with them anyway, and every carry
    # that they depend on.
    first = {i for i, value in enumerate(node.outputs) if value in wanted}
    while True:
        first_outputs = [outputs[i] for i in first]
        nodes = split_inner(body, first_outputs)
        first_nodes = needed(nodes, first_outputs)
        reads = {v for n in first_nodes for v in n.reads}.union(first_outputs)
        grown = first | {i for i, v in enumerate(carry_in) if v in reads}
        grown |= {i for i, v in enumerate(outputs) if is_early(body, nodes, first_nodes, v)}
        if grown == first:
            break
        first = grown
    second = set(range(len(node.outputs))) - first
    if not second:
        return [node]

    in_first = {id(n) for n in first_nodes}
    shared = {v for v in inputs if v not in {carry_in[i] for i in first if i < num_carry}}
    wanted_later = [v for i in sorted(second) if isinstance(v := outputs[i], int)]
    passed = sorted(
        minimum_cut(
            nodes,
            wanted=wanted_later,
            can_keep=lambda n: id(n) in in_first,
            can_redo=lambda n: id(n) not in in_first or n.name in CHEAP,
            size=body.num_bytes,
            is_free=lambda v: v in shared or body.when[v] is When.ALWAYS,
            prefer_late=False,
        )
    )
    second_nodes = needed(nodes, wanted_later, known=passed)
    passed_values = [
        graph.new_value(body.avals[v].update(shape=(scan.length, *body.avals[v].shape)), node.when)
        for v in passed
    ]
    loop = _Loop(node, scan, inputs, outputs)
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
        used -= set(reads)
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
