"""Splits a `cond` or `switch` of the backward in two: the part that dx needs, and the rest.

Each branch is divided as a block is. The first conditional makes what dx needs and hands on, from
the branch taken, the values that its second half needs; the second makes the weight gradients.
All branches must hand on arrays of the same shapes, so they share places: each value has one of
its shape and dtype, and a branch with fewer values fills the rest with zeros.

The forward's conditional hands weights to the backward's among its residuals, and fillers from
the branches that have none to give. `inline_free` has the backward's branch make them itself, from
the parameters, so that they get no slot.

A conditional with effects (a debug print) is left whole. So is a `while` loop: all that it makes
hangs on what it carries round. It has no reverse mode, so in a backward it stands only where a
`custom_vjp` has one. Weights that a conditional inside of a scan, a `shard_map`, or another
conditional hands on to its backward are kept, where JAX does not see by itself that they are
parameters. A weight gradient that comes with dx in some branches only waits in the stash.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._model.varying import varies_over
from dualpipe_jax._split_vjp.bodies import SplitInner, halve, made_early, open_body
from dualpipe_jax._split_vjp.graph import (
    Branches,
    Constant,
    Graph,
    Node,
    When,
    evaluate,
    needed,
)

_Body = tuple[Graph, list[int | Constant], list[int | Constant]]  # and its inputs, its outputs


def split_branches(
    graph: Graph, node: Node, branches: Branches, wanted: set[int], split_inner: SplitInner
) -> list[Node]:
    """Splits `node` into conditionals for the outputs in `wanted` and for the rest.

    Returns:
      The two nodes, or `[node]` if the first would need every output, or has an effect.
    """
    first = [i for i, v in enumerate(node.outputs) if v in wanted]
    if len(first) == len(node.outputs) or node.has_effect:
        return [node]
    bodies = [open_body(graph, add, branches.inputs) for add in branches.bodies]
    # Made with what is wanted in one branch at least, and for nothing in the others.
    early = [made_early(body, outs, set(first), split_inner) for body, _, outs in bodies]
    first += [
        i
        for i in sorted(set().union(*early))
        if all(
            i in mine or _is_free(body, outs[i])
            for mine, (body, _, outs) in zip(early, bodies, strict=True)
        )
    ]
    second = [i for i in range(len(node.outputs)) if i not in first]
    if not second:
        return [node]
    halves = [halve(*body, set(first), split_inner) for body in bodies]

    # places: one for each kind of array, as often as the branch with most of that kind needs it.
    in_place = [_place(body, h.passed) for (body, _, _), h in zip(bodies, halves, strict=True)]
    avals: dict[Any, Any] = {}
    for (body, _, _), mine in zip(bodies, in_place, strict=True):
        avals |= {place: body.avals[v] for place, v in mine.items()}
    places = list(avals)
    passed = [graph.new_value(avals[place], node.when) for place in places]

    parts = _Parts(graph, node, branches, bodies)
    return [
        parts.node(
            [h.first for h in halves],
            first,
            writes=[[mine.get(place, avals[place]) for place in places] for mine in in_place],
            extra_outputs=passed,
        ),
        parts.node(
            [h.second for h in halves],
            second,
            reads=[[mine.get(place) for place in places] for mine in in_place],
            extra_inputs=passed,
        ),
    ]


def inline_free(graph: Graph, results: Sequence[Any]) -> None:
    """Has conditionals make for themselves what an earlier one would hand them of parameters.

    In each branch of the earlier one the value must depend on parameters, constants or the
    context alone, which a filler does; both must branch on the same index. What nobody reads any
    more, neither a node nor `results`, the earlier one no longer makes.
    """
    producer: dict[int, Node] = {}
    for place, node in enumerate(graph.nodes):
        producer.update(dict.fromkeys(node.outputs, node))
        inner = node.inner
        if isinstance(inner, Branches) and not node.has_effect:
            sources = [producer.get(v) for v in inner.inputs if isinstance(v, int)]
            for source in {id(n): n for n in sources if n is not None}.values():
                inner = _inline(graph, inner, source)
            if inner is not node.inner:
                graph.nodes[place] = _whole(graph, node, inner, range(len(node.outputs)))
    wanted = {v for node in graph.nodes for v in node.reads}.union(
        v for v in results if isinstance(v, int)
    )
    for place, node in enumerate(graph.nodes):
        kept = [i for i, v in enumerate(node.outputs) if v in wanted]
        is_less = 0 < len(kept) < len(node.outputs) and not node.has_effect
        if isinstance(node.inner, Branches) and is_less:
            graph.nodes[place] = _whole(graph, node, node.inner, kept)


def _inline(graph: Graph, branches: Branches, source: Node) -> Branches:
    """Replaces inputs that `source` makes, and that are free, by what makes them."""
    inner = source.inner
    if not isinstance(inner, Branches) or not isinstance(inner.index, int):
        return branches
    if inner.index != branches.index:
        return branches
    bodies = [open_body(graph, add, inner.inputs) for add in inner.bodies]
    free: dict[int | Constant, int] = {
        v: i
        for i, v in enumerate(source.outputs)
        if all(_is_free(body, outputs[i]) for body, _, outputs in bodies)
    }
    is_kept = [not (isinstance(v, int) and v in free) for v in branches.inputs]
    if all(is_kept):
        return branches
    kept = [v for v, keep in zip(branches.inputs, is_kept, strict=True) if keep]

    def inlined(branch: int) -> Any:
        def add(body: Graph, values: Sequence[Any]) -> list[Any]:
            mine, made = iter(values), inner.bodies[branch](body, values[len(kept) :])
            return branches.bodies[branch](
                body,
                [
                    next(mine) if keep else made[free[v]]
                    for v, keep in zip(branches.inputs, is_kept, strict=True)
                ],
            )

        return add

    return Branches(
        bodies=tuple(map(inlined, range(len(branches.bodies)))),
        index=branches.index,
        inputs=(*kept, *inner.inputs),
    )


def _is_free(body: Graph, value: int | Constant) -> bool:
    return isinstance(value, Constant) or body.when[value] is When.ALWAYS


def _whole(graph: Graph, node: Node, branches: Branches, outputs: Sequence[int]) -> Node:
    """Makes a node of `branches` that returns `outputs`, and can be opened."""
    bodies = [open_body(graph, add, branches.inputs) for add in branches.bodies]
    nodes = [needed(body.nodes, [outs[i] for i in outputs]) for body, _, outs in bodies]
    whole = _Parts(graph, node, branches, bodies).node(nodes, list(outputs))

    def only(add: Any) -> Any:
        def add_some(body: Graph, values: Sequence[Any]) -> list[Any]:
            made = add(body, values)
            return [made[i] for i in outputs]

        return add_some

    return replace(whole, inner=replace(branches, bodies=tuple(map(only, branches.bodies))))


class _Parts:
    """Builds conditionals that run a part of each branch of one conditional."""

    def __init__(self, graph: Graph, node: Node, branches: Branches, bodies: Sequence[_Body]):
        self.graph, self.original, self.branches, self.bodies = graph, node, branches, bodies

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
        """Makes the node that runs `nodes` of each branch and returns `outputs`, then `writes`.

        Of `writes`, a value's number or the aval of a filler; of `reads`, the number of the value
        that a branch finds in the place, or None.
        """
        num_branches = len(self.bodies)
        writes = [()] * num_branches if writes is None else writes
        reads = [()] * num_branches if reads is None else reads
        used = [
            {v for n in mine for v in n.reads}
            | {v for v in written if isinstance(v, int)}
            | {v for i in outputs if isinstance(v := outs[i], int)}
            for mine, written, (_, _, outs) in zip(nodes, writes, self.bodies, strict=True)
        ]
        taken = [
            i
            for i, value in enumerate(self.branches.inputs)
            if isinstance(value, int)
            and any(ins[i] in mine for mine, (_, ins, _) in zip(used, self.bodies, strict=True))
        ]
        avals = [self.graph.avals[self.original.outputs[i]] for i in outputs]

        def branch(number: int) -> Any:
            _, ins, outs = self.bodies[number]

            def run(*values: Any) -> list[Any]:
                env: dict[Any, Any] = dict(
                    zip([ins[i] for i in taken], values[: len(taken)], strict=True)
                )
                env.update(zip(reads[number], values[len(taken) :], strict=True))
                evaluate(nodes[number], env)
                made = [
                    _full(aval, v.value) if isinstance(v := outs[i], Constant) else env[v]
                    for i, aval in zip(outputs, avals, strict=True)
                ]
                written = writes[number]
                return made + [env[v] if isinstance(v, int) else _full(v, 0) for v in written]

            return run

        index = self.branches.index

        def run(*values: Any) -> list[Any]:
            first, operands = (
                (index.value, values) if isinstance(index, Constant) else (values[0], values[1:])
            )
            cases = [branch(number) for number in range(num_branches)]
            return lax.switch(jnp.asarray(first, jnp.int32), cases, *operands)

        taken_inputs = [self.branches.inputs[i] for i in taken]
        return Node(
            name="cond",
            run=run,
            inputs=(*([index] if isinstance(index, int) else []), *taken_inputs, *extra_inputs),
            outputs=(*(self.original.outputs[i] for i in outputs), *extra_outputs),
            when=self.original.when,
            has_effect=self.original.has_effect,
        )


def _kind(aval: Any) -> Any:
    return aval.shape, aval.dtype, varies_over(aval)


def _place(body: Graph, values: Sequence[int]) -> dict[Any, int]:
    """Gives each value a place of its kind."""
    count = Counter[Any]()
    places = {}
    for v in values:
        kind = _kind(body.avals[v])
        places[kind, count[kind]] = v
        count[kind] += 1
    return places


def _full(aval: Any, value: Any) -> jax.Array:
    filled = lax.full(aval.shape, value, aval.dtype)
    axes = tuple(sorted(varies_over(aval)))
    return lax.pcast(filled, axes, to="varying") if axes else filled
