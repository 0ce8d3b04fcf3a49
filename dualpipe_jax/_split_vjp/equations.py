"""A jaxpr -> nodes of a graph, calls opened.

`jit`, `jax.checkpoint`, `custom_jvp` and `custom_vjp` disappear: their equations stand in the graph
as if the block had written them out. Scans, conditionals and `shard_map`s become one node each,
which `bodies.split_bodies` splits later; every other equation becomes a node that is never opened.
Copies to the host's memory and back, which policies of `jax.checkpoint` add, disappear too: the
graph notes which values they copy (`Graph.offloaded`), and the slots of these are there.

>>> import jax, jax.numpy as jnp
>>> from dualpipe_jax._split_vjp.graph import show
>>> block = jax.make_jaxpr(lambda w, x: jax.checkpoint(jnp.sin)(x) * w)(1.0, 2.0)
>>> graph = Graph()
>>> w, x = (
...     graph.new_value(v.aval, when)
...     for v, when in zip(block.jaxpr.invars, [When.ALWAYS, When.FORWARD], strict=True)
... )
>>> outputs = append(graph, block.jaxpr, block.consts, [w, x])
>>> show(graph.nodes, {w: "w", x: "x"})
v2 = sin x
v3 = mul v2 w
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
from jax.extend import core as jcore
from jax.extend.core import primitives

from dualpipe_jax._model.types import is_on_host
from dualpipe_jax._split_vjp.bodies import Body
from dualpipe_jax._split_vjp.cond import Cond
from dualpipe_jax._split_vjp.graph import (
    Atom,
    Constant,
    Graph,
    Inner,
    Node,
    When,
    numbers,
)
from dualpipe_jax._split_vjp.primitives import CONTRACTIONS, KEEP_ZERO
from dualpipe_jax._split_vjp.scan import Scan
from dualpipe_jax._split_vjp.shard_map import ShardMap

# Reads and writes of arrays that change in place, which no value orders.
_REF_EFFECTS = frozenset({"ReadEffect", "WriteEffect", "AccumEffect"})
# Parameters of equations that name dims.
_PARAMS = ("axes", "dimension_numbers", "permutation")


def append(
    graph: Graph,
    jaxpr: jcore.Jaxpr,
    consts: Sequence[Any],
    inputs: Sequence[Atom],
    *,
    in_backward: bool = False,
    scope: str = "",
) -> list[Atom]:
    """Appends the equations of `jaxpr` to `graph`, opening calls, and returns its outputs.

    Args:
      graph: A graph.
      jaxpr: A jaxpr.
      consts: Values of its constvars.
      inputs: An atom for each of its invars.
      in_backward: Whether everything that depends on x belongs to the backward: so inside of the
        backward's calls, where the recomputation of a `jax.checkpoint` must not be moved into the
        forward.
      scope: The names of the opened calls around it, for profiles and for reading programs.

    Raises:
      TypeError: If an equation reads or writes a mutable array.
      ValueError: If an equation computes with a value in the host's memory.
    """
    env: dict[Any, Atom] = dict(zip(jaxpr.constvars, map(Constant, consts), strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        ins = _read(env, eqn.invars)
        when = max((graph.when[i] for i in ins if isinstance(i, int)), default=When.ALWAYS)
        called = _called(eqn)
        if called is not None:
            names = (scope, str(eqn.source_info.name_stack), str(eqn.params.get("name", "")))
            outs = append(
                graph,
                called.jaxpr,
                called.consts,
                ins,
                in_backward=in_backward or when is When.BACKWARD,
                scope="/".join(filter(None, names)),
            )
        elif eqn.primitive is primitives.device_put_p and _is_any_on_host(eqn):
            outs = list(ins)
            to_host = (i for i, v in zip(ins, eqn.outvars, strict=True) if is_on_host(v.aval))
            graph.offloaded.update(numbers(to_host))
        else:
            if in_backward and when is When.FORWARD:
                when = When.BACKWARD
            values = [graph.new_value(var.aval, when) for var in eqn.outvars]
            graph.nodes.append(_node(jaxpr, eqn, env, values, when, scope))
            if eqn.primitive.name in KEEP_ZERO and graph.is_zero(ins[0]):
                graph.zeros.update(values)
            outs = values
        env.update(zip(eqn.outvars, outs, strict=True))
    return list(_read(env, jaxpr.outvars))


def graph_of(
    closed: jcore.ClosedJaxpr, times: Sequence[When]
) -> tuple[Graph, list[int], list[Atom]]:
    """Makes a graph of a closed jaxpr, its inputs known as `times` has it.

    Returns:
      The graph, its inputs and its outputs.
    """
    graph = Graph()
    invars = closed.jaxpr.invars
    inputs = [graph.new_value(v.aval, when) for v, when in zip(invars, times, strict=True)]
    return graph, inputs, append(graph, closed.jaxpr, closed.consts, inputs)


def _read(env: Mapping[Any, Atom], atoms: Sequence[Any]) -> tuple[Atom, ...]:
    return tuple(Constant(a.val) if isinstance(a, jcore.Literal) else env[a] for a in atoms)


def _node(
    jaxpr: jcore.Jaxpr,
    eqn: jcore.JaxprEqn,
    env: Mapping[Any, Atom],
    outs: list[int],
    when: When,
    scope: str,
) -> Node:
    effects = {type(effect).__name__ for effect in eqn.effects}
    _require_values(eqn, effects)
    variables = list(dict.fromkeys(v for v in eqn.invars if not isinstance(v, jcore.Literal)))
    # A jaxpr of this one equation: JAX itself knows how to run it in its context and name scope.
    alone = jaxpr.replace(
        constvars=[],
        invars=variables,
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )

    def run(*values: Any) -> list[Any]:
        with jax.named_scope(scope) if scope else nullcontext():
            return jax.core.eval_jaxpr(alone, (), *values)

    return Node(
        name=eqn.primitive.name,
        run=run,
        inputs=tuple(env[v] for v in variables),
        outputs=tuple(outs),
        when=when,
        # JAX counts it as an effect that an equation names a mesh axis; here it is none.
        has_effect=bool(effects - {"NamedAxisEffect"}),
        inner=_inner(eqn, _read(env, eqn.invars)),
        reduces=_reduced_axes(eqn),
        is_rough=_is_rough(eqn),
        params={name: eqn.params[name] for name in _PARAMS if name in eqn.params},
    )


def _require_values(eqn: jcore.JaxprEqn, effects: set[str]) -> None:
    """Refuses mutable arrays, and computations with values in the host's memory."""
    if effects & _REF_EFFECTS or eqn.primitive.name == "new_ref":
        raise TypeError(
            "model: embed, block and head must not read or write mutable arrays (jax.new_ref; here "
            f"by {eqn.primitive.name!r}), as their parts run at different times; pass on values"
        )
    if _is_any_on_host(eqn):
        raise ValueError(
            f"model: {eqn.primitive.name!r} has a value in the host's memory; a policy of "
            "jax.checkpoint must offload no value of the block's loops (jax.lax.scan) or branches, "
            "and nothing may compute with a value on the host: name others, or take a policy that "
            "saves or recomputes"
        )


def _is_any_on_host(eqn: jcore.JaxprEqn) -> bool:
    return any(is_on_host(v.aval) for v in (*eqn.invars, *eqn.outvars))


def _inner(eqn: jcore.JaxprEqn, inputs: tuple[Atom, ...]) -> Inner | None:
    if eqn.primitive is primitives.scan_p:
        return Scan.of(eqn, inputs, _body(eqn.params["jaxpr"]))
    if eqn.primitive is primitives.cond_p:
        index, *operands = inputs
        # All that a branch holds runs when the equation does: nothing is moved out of it.
        return Cond(tuple(map(_body, eqn.params["branches"])), index, tuple(operands))
    if eqn.primitive.name == "shard_map":
        return ShardMap.of(eqn, inputs, _body(jcore.ClosedJaxpr(eqn.params["jaxpr"], ())))
    return None


def _body(closed: jcore.ClosedJaxpr) -> Body:
    return lambda graph, values: append(graph, closed.jaxpr, closed.consts, values)


def _reduced_axes(eqn: jcore.JaxprEqn) -> tuple[str, ...]:
    if eqn.primitive is not primitives.psum_p or len(eqn.outvars) != 1:
        return ()
    axes = eqn.params["axes"]
    is_named = all(isinstance(axis, str) for axis in axes)
    return tuple(axes) if is_named and eqn.params["axis_index_groups"] is None else ()


def _is_rough(eqn: jcore.JaxprEqn) -> bool:
    if eqn.primitive.name not in CONTRACTIONS:
        return False
    precision = eqn.params["precision"]
    precisions = precision if isinstance(precision, tuple) else (precision,)
    return all(entry in (None, jax.lax.Precision.DEFAULT) for entry in precisions)


def _called(eqn: jcore.JaxprEqn) -> jcore.ClosedJaxpr | None:
    """Returns the program that `eqn` calls, or None if opening it would change its meaning."""
    primitive, params = eqn.primitive, eqn.params
    if primitive is primitives.jit_p:
        shardings = (*params["in_shardings"], *params["out_shardings"])
        is_plain = all("Unspecified" in type(s).__name__ for s in shardings)
        return params["jaxpr"] if is_plain else None
    if primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p):
        return params["call_jaxpr"]
    if primitive in (primitives.closed_call_p, primitives.call_p):
        return params["call_jaxpr"]
    if primitive is primitives.remat_p:
        jaxpr = params["jaxpr"]
        return jaxpr if isinstance(jaxpr, jcore.ClosedJaxpr) else jcore.ClosedJaxpr(jaxpr, ())
    return None
