"""Splits a `shard_map` of the backward into the part that dx needs and the rest.

Its body is divided as a block is. Values that pass from the first to the second get a leading dim
over the mesh axes over which they vary, one entry a device, as JAX gives its residuals. Values that
the body makes of parameters alone (a gathered weight, one marked as varying) are made again by a
`shard_map` of their own, `hoist_free`, and so never kept.

A `shard_map` with effects (a debug print) is left whole.

>>> import jax, jax.numpy as jnp
>>> from dualpipe_jax._split_vjp.equations import graph_of
>>> from dualpipe_jax._split_vjp.graph import show
>>> mesh = jax.make_mesh((1,), ("model",), (jax.sharding.AxisType.Auto,))
>>> spec = jax.sharding.PartitionSpec("model")
>>> backward = jax.shard_map(  # of sin(w * x)
...     lambda dy, w, x: ((d := dy * jnp.cos(w * x)) * w, d * x),
...     mesh=mesh,
...     in_specs=spec,
...     out_specs=spec,
... )
>>> jaxpr = jax.make_jaxpr(backward)(jnp.ones(4), jnp.ones(4), jnp.ones(4))
>>> graph, inputs, (dx, dw) = graph_of(jaxpr, [When.BACKWARD, When.ALWAYS, When.FORWARD])
>>> names = dict(zip([*inputs, dx, dw], ["dy", "w", "x", "dx", "dw"]))
>>> show(graph.nodes[0].inner.split(graph, graph.nodes[0], {dx}), names)  # v5 is d
dx v5 = shard_map dy w x
dw = shard_map x v5
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax
from jax.extend import core as jcore
from jax.sharding import PartitionSpec

from dualpipe_jax._model.types import Mesh
from dualpipe_jax._model.varying import varies_over
from dualpipe_jax._split_vjp.bodies import Body, Opened, divide_body, outputs_made_with
from dualpipe_jax._split_vjp.graph import (
    Atom,
    Environment,
    Graph,
    Node,
    When,
    evaluate,
    needed,
    numbers,
    read,
)


@dataclass(frozen=True)
class ShardMap:
    """A `jax.shard_map` equation.

    Attributes:
      body: Takes and returns a device's parts of the operands and results.
      inputs: The operands, whole.
      avals: For each operand the aval of a device's part.
      mesh, in_specs, out_specs, axis_names, check_vma: As in `jax.shard_map`.
    """

    body: Body
    inputs: tuple[Atom, ...]
    avals: tuple[Any, ...]
    mesh: Mesh
    in_specs: tuple[Any, ...]
    out_specs: tuple[Any, ...]
    axis_names: frozenset[str]
    check_vma: bool

    @classmethod
    def of(cls, eqn: jcore.JaxprEqn, inputs: tuple[Atom, ...], body: Body) -> "ShardMap":
        """Reads the equation."""
        params = eqn.params
        return cls(
            body=body,
            inputs=inputs,
            avals=tuple(v.aval for v in params["jaxpr"].invars),
            mesh=params["mesh"],
            in_specs=params["in_specs"],
            out_specs=params["out_specs"],
            axis_names=frozenset(params["newly_manual_axes"]),
            check_vma=params["check_vma"],
        )

    def split(self, graph: Graph, node: Node, wanted: set[int]) -> list[Node]:
        """Splits `node` into a `shard_map` for its outputs in `wanted` and one for the rest."""
        first = [i for i, v in enumerate(node.outputs) if v in wanted]
        if len(first) == len(node.outputs) or node.has_effect:
            return [node]
        parts = _ShardMapParts(graph, node, self)
        first += sorted(outputs_made_with(parts.body, set(first)))
        second = [i for i in range(len(node.outputs)) if i not in first]
        if not second:
            return [node]
        division = divide_body(parts.body, set(first))
        avals = [parts.body.graph.avals[v] for v in division.passed]
        passed = [graph.new_value(parts.stacked(aval), node.when) for aval in avals]
        return [
            parts.node(division.first, first, writes=division.passed, extra_outputs=passed),
            parts.node(division.second, second, reads=division.passed, extra_inputs=passed),
        ]


def hoist_free(graph: Graph) -> None:
    """Gives outputs of a `shard_map` that depend on parameters alone a node of their own."""
    nodes = []
    for node in graph.nodes:
        shard_map = node.inner
        if not isinstance(shard_map, ShardMap) or node.when is When.ALWAYS or node.has_effect:
            nodes.append(node)
            continue
        parts = _ShardMapParts(graph, node, shard_map)
        is_free = [parts.body.graph.is_free(v) for v in parts.body.outputs]
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


class _ShardMapParts:
    """Builds `shard_map`s that run a part of the body of one."""

    def __init__(self, graph: Graph, original: Node, shard_map: ShardMap):
        self.original, self.shard_map = original, shard_map
        inner = Graph()
        # A constant is an input like any other: a device sees only its own part of it.
        inputs: list[Atom] = [
            inner.new_value(
                aval, min(graph.when[v], When.FORWARD) if isinstance(v, int) else When.ALWAYS
            )
            for v, aval in zip(shard_map.inputs, shard_map.avals, strict=True)
        ]
        self.body = Opened(inner, inputs, shard_map.body(inner, inputs))

    def axes(self, aval: Any) -> tuple[str, ...]:
        """Names the mesh axes over which a value of the body varies, or may."""
        names = self.shard_map.axis_names
        if self.shard_map.check_vma:
            names = names & varies_over(aval)
        return tuple(name for name in self.shard_map.mesh.axis_names if name in names)

    def stacked(self, aval: Any) -> Any:
        """Makes the aval, outside, of a value of the body: `[devices, ...]`."""
        sizes = dict(self.shard_map.mesh.shape)
        shape = (math.prod(sizes[name] for name in self.axes(aval)), *aval.shape)
        return jax.core.ShapedArray(shape, aval.dtype)

    def whole(self, outputs: Sequence[int]) -> Node:
        """Makes the node that returns `outputs`, and can be split."""
        nodes = needed(self.body.graph.nodes, [self.body.outputs[i] for i in outputs])

        def some(graph: Graph, values: Sequence[Atom]) -> list[Atom]:
            made = self.shard_map.body(graph, values)
            return [made[i] for i in outputs]

        specs = tuple(self.shard_map.out_specs[i] for i in outputs)
        inner = replace(self.shard_map, body=some, out_specs=specs)
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
        """Makes the node that runs `nodes` on each device.

        Args:
          nodes: Nodes of the body.
          outputs: Indices of the original's outputs that it returns.
          writes: Values of the body that it returns besides, one entry a device.
          reads: Values of the body that it is given, one entry a device.
          extra_outputs: `writes` as values of the original's graph.
          extra_inputs: `reads` as values of the original's graph.
        """
        shard_map, inputs, results = self.shard_map, numbers(self.body.inputs), self.body.outputs
        avals = self.body.graph.avals
        used = {v for n in nodes for v in n.reads}.union(writes).difference(reads)
        used.update(numbers(results[i] for i in outputs))
        taken = [i for i, v in enumerate(inputs) if v in used]

        def body(values: Sequence[Any], passed: Sequence[Any]) -> Any:
            env: Environment = dict(zip([inputs[i] for i in taken], values, strict=True))
            env.update(zip(reads, (lax.squeeze(v, [0]) for v in passed), strict=True))
            evaluate(nodes, env)
            made = [read(env, results[i]) for i in outputs]
            return made, [lax.expand_dims(env[v], [0]) for v in writes]

        def spec(value: int) -> PartitionSpec:
            return PartitionSpec(self.axes(avals[value]) or None)

        def run(*values: Any) -> list[Any]:
            made, written = jax.shard_map(
                body,
                mesh=shard_map.mesh,
                in_specs=([shard_map.in_specs[i] for i in taken], [spec(v) for v in reads]),
                out_specs=([shard_map.out_specs[i] for i in outputs], [spec(v) for v in writes]),
                axis_names=shard_map.axis_names,
                check_vma=shard_map.check_vma,
            )(list(values[: len(taken)]), list(values[len(taken) :]))
            return [*made, *written]

        return Node(
            name=self.original.name,
            run=run,
            inputs=(*(shard_map.inputs[i] for i in taken), *extra_inputs),
            outputs=(*(self.original.outputs[i] for i in outputs), *extra_outputs),
            when=self.original.when,
            has_effect=self.original.has_effect,
        )
