"""Splits a `shard_map` of the backward in two: the part that dx needs, and the rest.

Its body is divided as a block is. Values that pass from the first to the second get a leading dim
over the mesh axes over which they vary, one entry a device, as JAX gives its residuals. What the
body makes of parameters alone (a gathered weight, one marked as varying) is made again by a
`shard_map` of its own, `hoist_free`, and so never kept.

A `shard_map` with effects (a debug print) is left whole.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from dualpipe_jax._model.varying import varies_over
from dualpipe_jax._split_vjp.bodies import SplitInner, halve, made_early
from dualpipe_jax._split_vjp.graph import (
    Constant,
    Graph,
    Mapped,
    Node,
    When,
    evaluate,
    needed,
    read,
)


def split_mapped(
    graph: Graph, node: Node, mapped: Mapped, wanted: set[int], split_inner: SplitInner
) -> list[Node]:
    """Splits `node` into a `shard_map` for the outputs in `wanted` and one for the rest.

    Returns:
      The two nodes, or `[node]` if the first would need every output, or has an effect.
    """
    first = [i for i, v in enumerate(node.outputs) if v in wanted]
    if len(first) == len(node.outputs) or node.has_effect:
        return [node]
    parts = _Parts(graph, node, mapped)
    first += sorted(made_early(parts.body, parts.outputs, set(first), split_inner))
    second = [i for i in range(len(node.outputs)) if i not in first]
    if not second:
        return [node]
    halves = halve(parts.body, parts.inputs, parts.outputs, set(first), split_inner)
    passed = [graph.new_value(parts.stacked(parts.body.avals[v]), node.when) for v in halves.passed]
    return [
        parts.node(halves.first, first, writes=halves.passed, extra_outputs=passed),
        parts.node(halves.second, second, reads=halves.passed, extra_inputs=passed),
    ]


def hoist_free(graph: Graph) -> None:
    """Gives outputs of a `shard_map` that depend on parameters alone a node of their own."""
    nodes = []
    for node in graph.nodes:
        mapped = node.inner
        if not isinstance(mapped, Mapped) or node.when is When.ALWAYS or node.has_effect:
            nodes.append(node)
            continue
        parts = _Parts(graph, node, mapped)
        is_free = [
            isinstance(v, Constant) or parts.body.when[v] is When.ALWAYS for v in parts.outputs
        ]
        free = [i for i, yes in enumerate(is_free) if yes]
        rest = [i for i, yes in enumerate(is_free) if not yes]
        if not free or not rest:
            nodes.append(node)
            continue
        for i in free:
            graph.when[node.outputs[i]] = When.ALWAYS
        nodes.append(replace(parts.whole(free), when=When.ALWAYS))
        nodes.append(parts.whole(rest))
    graph.nodes[:] = nodes


class _Parts:
    """Builds `shard_map`s that run a part of the body of one."""

    def __init__(self, graph: Graph, node: Node, mapped: Mapped):
        self.graph, self.original, self.mapped = graph, node, mapped
        self.body = Graph()
        # A constant is an input like any other: a device sees only its own part of it.
        self.inputs = [
            self.body.new_value(
                aval, min(graph.when[v], When.FORWARD) if isinstance(v, int) else When.ALWAYS
            )
            for v, aval in zip(mapped.inputs, mapped.avals, strict=True)
        ]
        self.outputs = mapped.body(self.body, self.inputs)

    def axes(self, aval: Any) -> tuple[str, ...]:
        """Names the mesh axes over which a value of the body varies, or may."""
        mine = self.mapped.axis_names
        if self.mapped.check_vma:
            mine = mine & varies_over(aval)
        return tuple(name for name in self.mapped.mesh.axis_names if name in mine)

    def stacked(self, aval: Any) -> Any:
        """Makes the aval, outside, of a value of the body: `[devices, ...]`."""
        sizes = dict(self.mapped.mesh.shape)
        shape = (math.prod(sizes[name] for name in self.axes(aval)), *aval.shape)
        return jax.core.ShapedArray(shape, aval.dtype)

    def whole(self, outputs: Sequence[int]) -> Node:
        """Makes the node that returns `outputs`, and can be opened."""
        nodes = needed(self.body.nodes, [self.outputs[i] for i in outputs])

        def some(body: Graph, values: Sequence[Any]) -> list[Any]:
            made = self.mapped.body(body, values)
            return [made[i] for i in outputs]

        specs = tuple(self.mapped.out_specs[i] for i in outputs)
        inner = replace(self.mapped, body=some, out_specs=specs)
        return replace(self.node(nodes, outputs), inner=inner)

    def node(
        self,
        nodes: Sequence[Node],
        outputs: Sequence[int],
        *,
        writes: Sequence[int] = (),
        reads: Sequence[int] = (),
        extra_outputs: Sequence[int] = (),
        extra_inputs: Sequence[int] = (),
    ) -> Node:
        """Makes the node that runs `nodes` and returns `outputs`, then `writes`."""
        mapped, inputs, avals = self.mapped, self.inputs, self.body.avals
        used = {v for n in nodes for v in n.reads}.union(writes).difference(reads)
        used.update(v for i in outputs if isinstance(v := self.outputs[i], int))
        taken = [i for i, v in enumerate(inputs) if v in used]

        def body(values: Sequence[Any], passed: Sequence[Any]) -> Any:
            env: dict[int, Any] = dict(zip([inputs[i] for i in taken], values, strict=True))
            env.update(zip(reads, (lax.squeeze(v, [0]) for v in passed), strict=True))
            evaluate(nodes, env)
            made = [read(env, self.outputs[i]) for i in outputs]
            return made, [lax.expand_dims(env[v], [0]) for v in writes]

        def spec(value: int) -> PartitionSpec:
            return PartitionSpec(self.axes(avals[value]) or None)

        def run(*values: Any) -> list[Any]:
            made, written = jax.shard_map(
                body,
                mesh=mapped.mesh,
                in_specs=([mapped.in_specs[i] for i in taken], [spec(v) for v in reads]),
                out_specs=([mapped.out_specs[i] for i in outputs], [spec(v) for v in writes]),
                axis_names=mapped.axis_names,
                check_vma=mapped.check_vma,
            )(list(values[: len(taken)]), list(values[len(taken) :]))
            return [*made, *written]

        return Node(
            name=self.original.name,
            run=run,
            inputs=(*(mapped.inputs[i] for i in taken), *extra_inputs),
            outputs=(*(self.original.outputs[i] for i in outputs), *extra_outputs),
            when=self.original.when,
            has_effect=self.original.has_effect,
        )
