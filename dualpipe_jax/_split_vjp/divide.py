"""Divides a traced block and vjp into the nodes of F, I and W, and chooses the values that pass.

Two minimum cuts choose them: the stash that the input grad keeps for its weight grad, then the
residuals that the forward keeps for both. `split.py` has an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe_jax._split_vjp.bodies import split_bodies
from dualpipe_jax._split_vjp.cond import inline_free
from dualpipe_jax._split_vjp.cut import minimum_cut
from dualpipe_jax._split_vjp.for_compilers import finish_chains
from dualpipe_jax._split_vjp.graph import Atom, Graph, Node, When, needed, numbers, with_effects
from dualpipe_jax._split_vjp.primitives import CHEAP, CHEAP_IN_BACKWARD, REDUCTIONS
from dualpipe_jax._split_vjp.shard_map import hoist_free
from dualpipe_jax._split_vjp.trace import BlockTrace
from dualpipe_jax._split_vjp.with_input_grad import divide_gradient


@dataclass(frozen=True, kw_only=True)
class Programs:
    """The nodes that each function runs, and the values that pass between the functions.

    Attributes:
      forward, input_grad, weight_grad, deferred_weight_grad: Nodes, in order.
      residual, weight_residual, stash, deferred: Values, as in `SplitVjp`.
      made_with_input_grad: For every leaf of params the value of its gradient, or of the part of
        it, that the input grad makes; or None.
      made_with_weight_grad: The same for the weight grad.
    """

    forward: list[Node]
    input_grad: list[Node]
    weight_grad: list[Node]
    deferred_weight_grad: list[Node]
    residual: tuple[int, ...]
    weight_residual: tuple[int, ...]
    stash: tuple[int, ...]
    deferred: tuple[int, ...]
    made_with_input_grad: tuple[int | None, ...]
    made_with_weight_grad: tuple[int | None, ...]


def divide_block(trace: BlockTrace, *, recomputes: bool = False) -> Programs:
    """Divides a block and its vjp into the nodes of F, I and W, and chooses the values that pass.

    Args:
      trace: The block and its vjp; its graph gets new values and nodes.
      recomputes: Whether deferred weight gradients are to recompute.
    """
    graph = trace.graph
    inline_free(graph, [*trace.results, *trace.dx, *trace.dparams])
    hoist_free(graph)
    nodes = split_bodies(graph, trace.dx, only=When.BACKWARD)
    known = [n for n in nodes if n.when is not When.BACKWARD]
    backward = [n for n in nodes if n.when is When.BACKWARD]
    gradients = _divide_gradients(trace, backward)
    with_input_grad = [v for v, _ in gradients if v is not None]
    with_weight_grad = [v for _, v in gradients if v is not None]
    stash = _choose_stash(graph, backward, [*trace.dx, *with_input_grad], with_weight_grad)
    by_input_grad = [*trace.dx, *with_input_grad, *stash]
    input_grad = needed(backward, by_input_grad)
    weight_grad = needed(backward, with_weight_grad, known=stash)

    reads = {v for n in (*input_grad, *weight_grad) for v in n.reads}
    reads.update(numbers([*trace.dx, *with_input_grad, *with_weight_grad]))
    residuals = _choose_residuals(graph, known, reads)
    # Cheap steps of the forward run again in the backward, from the residuals.
    input_grad = needed([*known, *input_grad], by_input_grad, known=residuals)
    weight_grad = needed([*known, *weight_grad], with_weight_grad, known={*residuals, *stash})
    weight_residual = residuals & {*with_weight_grad, *(v for n in weight_grad for v in n.reads)}

    deferred, deferred_weight_grad = stash, weight_grad
    if recomputes:
        again = needed([*known, *backward], with_weight_grad, known=residuals)
        deferred = _choose_deferred(graph, again, input_grad, with_weight_grad, weight_residual)
        deferred_weight_grad = needed(again, with_weight_grad, known=weight_residual | deferred)
    forward = with_effects(nodes, needed(known, [*trace.results, *residuals]))
    return Programs(
        forward=finish_chains(graph, forward, residuals),
        input_grad=input_grad,
        weight_grad=weight_grad,
        deferred_weight_grad=deferred_weight_grad,
        residual=tuple(sorted(residuals - weight_residual)),
        weight_residual=tuple(sorted(weight_residual)),
        stash=tuple(sorted(stash)),
        deferred=tuple(sorted(deferred)),
        made_with_input_grad=tuple(v for v, _ in gradients),
        made_with_weight_grad=tuple(v for _, v in gradients),
    )


def _divide_gradients(
    trace: BlockTrace, backward: list[Node]
) -> list[tuple[int | None, int | None]]:
    """Divides each gradient into the parts made with the input grad and with the weight grad.

    Nodes that add parts up anew are appended to `backward`.
    """
    for_dx = needed(backward, trace.dx)
    zeros = trace.graph.zeros
    return [
        divide_gradient(trace.graph, backward, for_dx, v)
        if isinstance(v, int) and v not in zeros
        else (None, None)
        for v in trace.dparams
    ]


def _choose_stash(
    graph: Graph, backward: list[Node], by_input_grad: Sequence[Atom], by_weight_grad: Sequence[int]
) -> set[int]:
    """Chooses the values that the input grad keeps for its weight grad."""
    ids = {id(n) for n in needed(backward, by_input_grad)}
    return minimum_cut(
        backward,
        wanted=by_weight_grad,
        can_keep=lambda n: id(n) in ids or n.name in CHEAP | REDUCTIONS,
        can_redo=lambda n: id(n) not in ids,
        size=graph.num_bytes,
        is_free=lambda v: graph.when[v] is not When.BACKWARD,
        prefer_late=False,
    )


def _choose_residuals(graph: Graph, known: list[Node], reads: set[int]) -> set[int]:
    """Chooses the values that the forward keeps, so that the backward has those that it reads."""
    return minimum_cut(
        [n for n in known if n.when is When.FORWARD],
        wanted=[v for v in reads if graph.when[v] is When.FORWARD],
        can_keep=lambda _: True,
        can_redo=lambda n: n.name in CHEAP_IN_BACKWARD and not n.has_effect,
        size=graph.num_bytes,
        is_free=lambda v: graph.when[v] is not When.FORWARD,
        prefer_late=True,
    )


def _choose_deferred(
    graph: Graph,
    again: list[Node],
    input_grad: list[Node],
    by_weight_grad: Sequence[int],
    weight_residual: set[int],
) -> set[int]:
    """Chooses the values that the input grad keeps for a weight grad that recomputes.

    It may run everything `again`, from `weight_residual`, which is kept for it anyway, and the
    fewest bytes besides: the cotangents of the block's outputs, or less.
    """
    ids = {id(n) for n in input_grad}
    return minimum_cut(
        again,
        wanted=by_weight_grad,
        can_keep=lambda n: id(n) in ids,
        can_redo=lambda n: not n.has_effect,
        size=graph.num_bytes,
        is_free=lambda v: graph.when[v] is When.ALWAYS or v in weight_residual,
        prefer_late=True,
    )
