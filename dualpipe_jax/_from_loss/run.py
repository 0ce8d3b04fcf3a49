"""Runs single equations of a jaxpr, and says where in the user's sources they stand."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.extend import core as jcore
from jax.extend import source_info_util

_EMPTY = jax.make_jaxpr(lambda: ())().jaxpr
_LIBRARY = str(Path(__file__).resolve().parents[1])
# Frames of these are not the user's model, but how it is written down.
_NOT_THE_MODEL = re.compile(r"[/\\](jax|jaxlib|flax|equinox)[/\\]")


def run_equation(eqn: jcore.JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Runs one equation.

    Args:
      eqn: The equation.
      args: A value for each operand, literals included.

    Returns:
      A value for each result.
    """
    variables: list[Any] = [jcore.Var(atom.aval) for atom in eqn.invars]
    alone = _EMPTY.replace(
        invars=variables,
        outvars=list(eqn.outvars),
        eqns=[eqn.replace(invars=variables)],
        effects=eqn.effects,
        debug_info=_EMPTY.debug_info.with_unknown_names(),
    )
    return jax.core.eval_jaxpr(alone, (), *args)


def where(*eqns: jcore.JaxprEqn) -> str:
    """Names the file and the line of the user's model at which an equation was traced.

    Args:
      *eqns: The equation, and the calls around it, the innermost first.
    """
    return next(filter(None, map(_line, eqns)), "an unknown line")


def _line(eqn: jcore.JaxprEqn) -> str:
    frames = source_info_util.summarize(eqn.source_info, num_frames=40).splitlines()
    places = [frame.strip() for frame in frames if _LIBRARY not in frame]
    own = [place for place in places if not _NOT_THE_MODEL.search(place)]
    place = next(iter(own or places), "")
    name = re.search(r"([^/\\]+:[0-9]+)", place)
    return name[1] if name else ""
