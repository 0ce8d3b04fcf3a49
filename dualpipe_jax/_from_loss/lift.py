"""Lifts the literals of a `jax.checkpoint` out of its program, where layers may differ in them.

Flax folds numbers into its keys that differ from layer to layer, and `nn.remat` puts them into the
program of the checkpoint; as operands they can be read from a table.
"""

from typing import Any

from jax.extend import core as jcore
from jax.extend.core import primitives


def program_of(eqn: jcore.JaxprEqn) -> jcore.ClosedJaxpr | None:
    """Gives the program of a call that may be opened: a jit without shardings of its own."""
    params = eqn.params
    if eqn.primitive is primitives.jit_p:
        shardings = (*params["in_shardings"], *params["out_shardings"])
        is_plain = all("Unspecified" in type(s).__name__ for s in shardings)
        return params["jaxpr"] if is_plain else None
    if eqn.primitive in (primitives.closed_call_p, primitives.call_p):
        return params["call_jaxpr"]
    return None


def closed(program: Any) -> jcore.ClosedJaxpr:
    """Gives a checkpoint's program with its constants."""
    if isinstance(program, jcore.ClosedJaxpr):
        return program
    return jcore.ClosedJaxpr(program, ())


def lift_literals(eqn: jcore.JaxprEqn) -> tuple[jcore.JaxprEqn, list[jcore.Literal]]:
    """Makes a checkpoint whose program takes its literals as operands.

    Jits in the program are opened, so that their literals are lifted too.

    Args:
      eqn: A checkpoint whose program has no constants.

    Returns:
      The checkpoint, which takes the literals after its own operands; and the literals.
    """
    program = closed(eqn.params["jaxpr"]).jaxpr
    literals: list[jcore.Literal] = []
    variables: list[jcore.Var] = []
    eqns: list[jcore.JaxprEqn] = []

    def lift(atom: Any) -> Any:
        if not isinstance(atom, jcore.Literal):
            return atom
        literals.append(atom)
        variables.append(jcore.Var(atom.aval))
        return variables[-1]

    def append(jaxpr: jcore.Jaxpr, env: dict[Any, Any]) -> list[Any]:
        def read(atom: Any) -> Any:
            return atom if isinstance(atom, jcore.Literal) else env[atom]

        for inner in jaxpr.eqns:
            operands = [read(atom) for atom in inner.invars]
            called = program_of(inner)
            if called is not None and not called.consts:
                names = dict(zip(called.jaxpr.invars, operands, strict=True))
                outs = append(called.jaxpr, names)
            else:
                outs = [jcore.Var(v.aval) for v in inner.outvars]
                operands = [lift(atom) for atom in operands]
                eqns.append(inner.replace(invars=operands, outvars=outs))
            env.update(zip(inner.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    outs = append(program, {v: v for v in program.invars})
    lifted = program.replace(
        invars=[*program.invars, *variables],
        outvars=outs,
        eqns=eqns,
        debug_info=program.debug_info.with_unknown_names(),
    )
    params = {**eqn.params, "jaxpr": lifted}
    if isinstance(eqn.params["jaxpr"], jcore.ClosedJaxpr):
        params["jaxpr"] = jcore.ClosedJaxpr(lifted, ())
    return eqn.replace(invars=[*eqn.invars, *literals], params=params), literals
