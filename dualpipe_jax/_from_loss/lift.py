"""Lifts the literals of an equation's programs out of them, where layers may differ in them.

Flax folds numbers into its keys that differ from layer to layer, and `nn.remat` puts them into the
program of the checkpoint; a decay by layer ends up in the body of a scan over time. As operands
they can be read from a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.extend import core as jcore
from jax.extend.core import primitives

_EMPTY = jax.make_jaxpr(lambda: ())().jaxpr
LIFTABLE = (primitives.remat_p, primitives.scan_p, primitives.cond_p, primitives.while_p)


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


@dataclass
class _Lifted:
    """The literals that were lifted, and the variables in their places."""

    literals: list[jcore.Literal] = field(default_factory=list)
    variables: list[jcore.Var] = field(default_factory=list)

    def lift(self, atom: Any) -> Any:
        """Gives a literal a variable; a variable stays."""
        if not isinstance(atom, jcore.Literal):
            return atom
        self.literals.append(atom)
        self.variables.append(jcore.Var(atom.aval))
        return self.variables[-1]

    def take(self, literals: Sequence[jcore.Literal]) -> list[jcore.Var]:
        """Gives literals of an inner program variables here."""
        return [self.lift(literal) for literal in literals]


def lift_literals(eqn: jcore.JaxprEqn) -> tuple[jcore.ClosedJaxpr, list[jcore.Literal]] | None:
    """Makes a program that takes the literals of an equation's programs as operands.

    Jits in the programs are opened, so that their literals are lifted too.

    Args:
      eqn: A checkpoint, scan, cond or while.

    Returns:
      The program, which takes the literals after the equation's own operands, and the literals;
      None for an equation without literals in it, or one whose programs have constants.
    """
    outer = _Lifted()
    own: list[Any] = [jcore.Var(atom.aval) for atom in eqn.invars]
    lifted = _lift(eqn.replace(invars=own), outer)
    if lifted is None or not outer.literals:
        return None
    jaxpr = _EMPTY.replace(
        invars=[*own, *outer.variables],
        outvars=list(eqn.outvars),
        eqns=[lifted],
        effects=eqn.effects,
        debug_info=_EMPTY.debug_info.with_unknown_names(),
    )
    return jcore.ClosedJaxpr(jaxpr, ()), outer.literals


def _lift(eqn: jcore.JaxprEqn, outer: _Lifted) -> jcore.JaxprEqn | None:
    """Lifts the literals of an equation's programs to `outer`; None if it has constants."""
    params, invars = dict(eqn.params), list(eqn.invars)

    def lift(name: str) -> tuple[Any, list[jcore.Var], list[jcore.Literal]]:
        return _lift_program(params[name])

    if eqn.primitive is primitives.remat_p:
        if closed(params["jaxpr"]).consts:
            return None
        body, inner, literals = lift("jaxpr")
        params["jaxpr"] = _with_inputs(params["jaxpr"], body, [*body.invars, *inner])
        invars += outer.take(literals)
    elif eqn.primitive is primitives.scan_p:
        if params["jaxpr"].consts:
            return None
        body, inner, literals = lift("jaxpr")
        params["jaxpr"] = _with_inputs(params["jaxpr"], body, [*inner, *body.invars])
        params["num_consts"] += len(inner)
        invars = [*outer.take(literals), *invars]
    elif eqn.primitive is primitives.cond_p:
        if any(branch.consts for branch in params["branches"]):
            return None
        branches = [(branch, *_lift_program(branch)) for branch in params["branches"]]
        new = []
        for number, (branch, body, *_) in enumerate(branches):
            extra: list[Any] = []
            for other, (_, _, inner, literals) in enumerate(branches):
                extra += inner if other == number else [jcore.Var(a.aval) for a in literals]
            new.append(_with_inputs(branch, body, [*body.invars, *extra]))
        params["branches"] = tuple(new)
        invars += [v for _, _, _, literals in branches for v in outer.take(literals)]
    elif eqn.primitive is primitives.while_p:
        if params["cond_jaxpr"].consts or params["body_jaxpr"].consts:
            return None
        count, operands = params["cond_nconsts"], invars
        invars = []
        for name, own in (("cond", operands[:count]), ("body", operands[count:])):
            body, inner, literals = lift(f"{name}_jaxpr")
            params[f"{name}_jaxpr"] = _with_inputs(
                params[f"{name}_jaxpr"], body, [*inner, *body.invars]
            )
            params[f"{name}_nconsts"] += len(inner)
            invars += [*outer.take(literals), *own]
    else:
        return None
    return eqn.replace(params=params, invars=invars)


def _lift_program(program: Any) -> tuple[jcore.Jaxpr, list[jcore.Var], list[jcore.Literal]]:
    """Gives a program with variables for its literals, those variables, and the literals."""
    lifted = _Lifted()
    eqns: list[jcore.JaxprEqn] = []

    def append(jaxpr: jcore.Jaxpr, env: dict[Any, Any]) -> list[Any]:
        def read(atom: Any) -> Any:
            return atom if isinstance(atom, jcore.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            called = program_of(eqn)
            if called is not None and not called.consts:
                outs = append(called.jaxpr, dict(zip(called.jaxpr.invars, operands, strict=True)))
            else:
                outs = [jcore.Var(v.aval) for v in eqn.outvars]
                operands = [lifted.lift(atom) for atom in operands]
                inner = eqn.replace(invars=operands, outvars=outs)
                eqns.append(_lift(inner, lifted) or inner)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    jaxpr = closed(program).jaxpr
    outs = append(jaxpr, {v: v for v in jaxpr.invars})
    return jaxpr.replace(eqns=eqns, outvars=outs), lifted.variables, lifted.literals


def _with_inputs(like: Any, jaxpr: jcore.Jaxpr, invars: Sequence[Any]) -> Any:
    """Gives a program other inputs; closed, if `like` is."""
    jaxpr = jaxpr.replace(invars=list(invars), debug_info=jaxpr.debug_info.with_unknown_names())
    return jcore.ClosedJaxpr(jaxpr, ()) if isinstance(like, jcore.ClosedJaxpr) else jaxpr
