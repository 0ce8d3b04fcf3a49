"""Splits a `cond` or `switch` of the backward into the part that dx needs and the rest.

Each branch is divided as a block is. The first conditional makes the outputs that dx needs and
passes the values that the second needs of the branch taken; the second makes the weight gradients.
All branches must return arrays of the same shapes, so they share entries: each value has one of its
shape and dtype, and a branch with fewer values fills the others with zeros.

The forward's conditional gives weights to the backward's among its residuals, and fillers where a
branch has none to give. `inline_free` has the backward's branch make them itself, from the
parameters, so that they get no slot.

A conditional with effects (a debug print) is left whole. So is a `while` loop: all that it makes
depends on its carry. It has no reverse mode, so in a backward it stands only where a `custom_vjp`
has one. Weights that a conditional inside of a scan, a `shard_map`, or another conditional gives to
its backward are kept, where JAX does not see by itself that they are parameters. A weight gradient
that comes with dx in some branches only waits in the stash.

>>> import jax, jax.numpy as jnp
>>> from dualpipe_jax._split_vjp.equations import graph_of
>>> from dualpipe_jax._split_vjp.graph import When, show
>>> def backward(dy, w, x):  # of sin(w * x) where x is positive, else of w * x
...     sine = lambda dy, w, x: ((d := dy * jnp.cos(w * x)) * w, d * x)
...     return jax.lax.cond(x > 0, sine, lambda dy, w, x: (dy * w, dy * x), dy, w, x)
>>> jaxpr = jax.make_jaxpr(backward)(1.0, 1.0, 1.0)
>>> graph, inputs, (dx, dw) = graph_of(jaxpr, [When.BACKWARD, When.ALWAYS, When.FORWARD])
>>> names = dict(zip([*inputs, dx, dw], ["dy", "w", "x", "dx", "dw"]))
>>> cond = graph.nodes[-1]
>>> show(cond.inner.split(graph, cond, {dx}), names)  # v7 is d, or a zero in the other branch
dx v7 = cond v4 dy w x
dw = cond v4 dy x v7
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._model.varying import varies_over
from dualpipe_jax._split_vjp.bodies import Body, Opened, divide_body, open_body, outputs_made_with
from dualpipe_jax._split_vjp.graph import (
    Atom,
    Constant,
    Environment,
    Graph,
    Node,
    evaluate,
    needed,
    numbers,
)

# One of the arrays that all branches pass on: its shape, dtype and varying axes, and a count.
_Entry = tuple[Hashable, int]


@dataclass(frozen=True)
class Cond:
    """A `lax.cond` or `lax.switch` equation.

    Attributes:
      bodies: The branches.
      index: The index of the branch that is taken, an int32 scalar.
      inputs: The operands, the same for every branch.
    """

    bodies: tuple[Body, ...]
    index: Atom
    inputs: tuple[Atom, ...]

    def open(self, graph: Graph) -> list[Opened]:
        """Makes a graph of each branch."""
        return [open_body(graph, body, self.inputs) for body in self.bodies]

    def split(self, graph: Graph, node: Node, wanted: set[int]) -> list[Node]:
        """Splits `node` into conditionals for its outputs in `wanted` and for the rest."""
        first = [i for i, v in enumerate(node.outputs) if v in wanted]
        if len(first) == len(node.outputs) or node.has_effect:
            return [node]
        bodies = self.open(graph)
        first += _made_with(bodies, set(first))
        second = [i for i in range(len(node.outputs)) if i not in first]
        if not second:
            return [node]
        divisions = [divide_body(body, set(first)) for body in bodies]

        # One entry for each kind of array, as often as the branch with most of that kind needs it.
        passed = [_entries(b.graph, d.passed) for b, d in zip(bodies, divisions, strict=True)]
        avals: dict[_Entry, Any] = {}
        for body, values in zip(bodies, passed, strict=True):
            avals |= {entry: body.graph.avals[v] for entry, v in values.items()}
        entries = [graph.new_value(aval, node.when) for aval in avals.values()]
        writes = [[values.get(entry, aval) for entry, aval in avals.items()] for values in passed]
        reads = [[values.get(entry) for entry in avals] for values in passed]

        parts = _CondParts(graph, node, self, bodies)
        return [
            parts.node([d.first for d in divisions], first, writes=writes, extra_outputs=entries),
            parts.node([d.second for d in divisions], second, reads=reads, extra_inputs=entries),
        ]


def inline_free(graph: Graph, results: Sequence[Atom]) -> None:
    """Has conditionals make for themselves the values of parameters that an earlier one gives them.

    In each branch of the earlier one the value must depend on parameters, constants or the
    context alone, as a filler does; both must branch on the same index. Outputs that are then read
    no more, neither by a node nor as one of `results`, the earlier one no longer makes.
    """
    producer: dict[int, Node] = {}
    for position, node in enumerate(graph.nodes):
        producer.update(dict.fromkeys(node.outputs, node))
        inner = node.inner
        if isinstance(inner, Cond) and not node.has_effect:
            sources = [producer.get(v) for v in numbers(inner.inputs)]
            for source in {id(n): n for n in sources if n is not None}.values():
                inner = _inline(graph, inner, source)
            if inner is not node.inner:
                graph.nodes[position] = _whole(graph, node, inner, range(len(node.outputs)))
    wanted = {v for node in graph.nodes for v in node.reads}.union(numbers(results))
    for position, node in enumerate(graph.nodes):
        read = [i for i, v in enumerate(node.outputs) if v in wanted]
        is_less = 0 < len(read) < len(node.outputs) and not node.has_effect
        if isinstance(node.inner, Cond) and is_less:
            graph.nodes[position] = _whole(graph, node, node.inner, read)


def _made_with(bodies: Sequence[Opened], wanted: set[int]) -> list[int]:
    """Lists the outputs made with `wanted` in one branch, and for nothing in the others."""
    made_with = [outputs_made_with(body, wanted) for body in bodies]
    return [
        i
        for i in sorted(set().union(*made_with))
        if all(
            i in made or body.graph.is_free(body.outputs[i])
            for made, body in zip(made_with, bodies, strict=True)
        )
    ]


def _inline(graph: Graph, cond: Cond, source: Node) -> Cond:
    """Has `cond` make the free values among its inputs that the conditional `source` makes."""
    given = source.inner
    if not isinstance(given, Cond) or not isinstance(given.index, int):
        return cond
    if given.index != cond.index:
        return cond
    bodies = given.open(graph)
    free: dict[Atom, int] = {
        v: i
        for i, v in enumerate(source.outputs)
        if all(body.graph.is_free(body.outputs[i]) for body in bodies)
    }
    is_input = [not (isinstance(v, int) and v in free) for v in cond.inputs]
    if all(is_input):
        return cond
    inputs = [v for v, stays in zip(cond.inputs, is_input, strict=True) if stays]

    def inlined(branch: int) -> Body:
        def body(graph: Graph, values: Sequence[Atom]) -> list[Atom]:
            rest, made = iter(values), given.bodies[branch](graph, values[len(inputs) :])
            return cond.bodies[branch](
                graph,
                [
                    next(rest) if stays else made[free[v]]
                    for v, stays in zip(cond.inputs, is_input, strict=True)
                ],
            )

        return body

    return Cond(
        bodies=tuple(map(inlined, range(len(cond.bodies)))),
        index=cond.index,
        inputs=(*inputs, *given.inputs),
    )


def _whole(graph: Graph, node: Node, cond: Cond, outputs: Sequence[int]) -> Node:
    """Makes a node of `cond` that returns `outputs`, and can be split."""
    bodies = cond.open(graph)
    nodes = [needed(body.graph.nodes, [body.outputs[i] for i in outputs]) for body in bodies]
    whole = _CondParts(graph, node, cond, bodies).node(nodes, outputs)

    def some_of(body: Body) -> Body:
        def some(graph: Graph, values: Sequence[Atom]) -> list[Atom]:
            made = body(graph, values)
            return [made[i] for i in outputs]

        return some

    return replace(whole, inner=replace(cond, bodies=tuple(map(some_of, cond.bodies))))


class _CondParts:
    """Builds conditionals that run a part of each branch of one conditional."""

    def __init__(self, graph: Graph, original: Node, cond: Cond, bodies: Sequence[Opened]):
        self.graph, self.original, self.cond, self.bodies = graph, original, cond, bodies

    def node(
        self,
        nodes: Sequence[list[Node]],
        outputs: Sequence[int],
        *,
        writes: Sequence[Sequence[Any]] | None = None,
        reads: Sequence[Sequence[int | None]] | None = None,
        extra_outputs: Sequence[int] = (),
        extra_inputs: Sequence[int] = (),
    ) -> Node:
        """Makes the node that runs `nodes` of each branch.

        Args:
          nodes: For each branch, nodes of its body.
          outputs: Indices of the original's outputs that it returns.
          writes: For each branch and entry the value that it returns besides, or the aval of a
            filler.
          reads: For each branch and entry the value that it is given, or None.
          extra_outputs: The entries of `writes`, values of the original's graph.
          extra_inputs: The entries of `reads`, values of the original's graph.
        """
        cond = self.cond
        writes = writes or [()] * len(self.bodies)
        reads = reads or [()] * len(self.bodies)
        taken = self._taken(nodes, outputs, writes)

        def run(*values: Any) -> list[Any]:
            cases = [
                self._case(body, nodes[i], outputs, taken, writes[i], reads[i])
                for i, body in enumerate(self.bodies)
            ]
            index, operands = (
                (cond.index.value, values)
                if isinstance(cond.index, Constant)
                else (values[0], values[1:])
            )
            return lax.switch(jnp.asarray(index, jnp.int32), cases, *operands)

        inputs = (*numbers([cond.index]), *(cond.inputs[i] for i in taken), *extra_inputs)
        return Node(
            name="cond",
            run=run,
            inputs=inputs,
            outputs=(*(self.original.outputs[i] for i in outputs), *extra_outputs),
            when=self.original.when,
            has_effect=self.original.has_effect,
        )

    def _taken(
        self,
        nodes: Sequence[list[Node]],
        outputs: Sequence[int],
        writes: Sequence[Sequence[Any]],
    ) -> list[int]:
        """Lists the indices of the operands that some branch reads."""
        used = [
            {v for n in of_branch for v in n.reads}.union(
                numbers(written), numbers(body.outputs[i] for i in outputs)
            )
            for of_branch, written, body in zip(nodes, writes, self.bodies, strict=True)
        ]
        return [
            i
            for i, value in enumerate(self.cond.inputs)
            if isinstance(value, int)
            and any(
                body.inputs[i] in values for values, body in zip(used, self.bodies, strict=True)
            )
        ]

    def _case(
        self,
        body: Opened,
        nodes: list[Node],
        outputs: Sequence[int],
        taken: Sequence[int],
        writes: Sequence[Any],
        reads: Sequence[int | None],
    ) -> Any:
        """Makes one branch's function of the operands `taken` and the entries `reads`."""
        avals = [self.graph.avals[self.original.outputs[i]] for i in outputs]

        def run(*values: Any) -> list[Any]:
            operands, entries = values[: len(taken)], values[len(taken) :]
            env: Environment = dict(
                zip(numbers(body.inputs[i] for i in taken), operands, strict=True)
            )
            env.update((v, e) for v, e in zip(reads, entries, strict=True) if v is not None)
            evaluate(nodes, env)
            made = [
                _full(aval, v.value) if isinstance(v := body.outputs[i], Constant) else env[v]
                for i, aval in zip(outputs, avals, strict=True)
            ]
            return made + [env[v] if isinstance(v, int) else _full(v, 0) for v in writes]

        return run


def _entries(graph: Graph, values: Sequence[int]) -> dict[_Entry, int]:
    """Gives each value an entry of its kind."""
    count = Counter[Hashable]()
    entries: dict[_Entry, int] = {}
    for v in values:
        aval = graph.avals[v]
        kind: Hashable = (aval.shape, aval.dtype, varies_over(aval))
        entries[kind, count[kind]] = v
        count[kind] += 1
    return entries


def _full(aval: Any, value: Any) -> jax.Array:
    filled = lax.full(aval.shape, value, aval.dtype)
    axes = tuple(sorted(varies_over(aval)))
    return lax.pcast(filled, axes, to="varying") if axes else filled
