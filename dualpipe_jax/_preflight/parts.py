"""The loops and branches of a computation that some ranks run and others pass over.

Such a loop is one whose number of trips is not in the text: a rank decides it as it runs. A branch
counts with its cost beyond the cheapest one, which all ranks run at least. In a step of this
library the forwards, input grads and weight grads are the parts, of which a rank that acts runs
one; the ends, which few ranks have, and the permutes are none. In other programs all count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.actions import action_of
from dualpipe_jax._preflight.hlo import Computation, Module
from dualpipe_jax._preflight.work import Costs, Work, trip_count

_OF_ALL_RANKS = {_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD}


@dataclass(frozen=True)
class Part:
    """Tells of a loop or a branch: its instruction, and its cost for a rank that runs it."""

    instruction: str
    work: Work


def find_parts(
    module: Module, where: Computation, *, at_least: Costs, at_most: Costs
) -> list[Part]:
    """Lists the parts of a computation, those in its loops and branches left out."""
    found = [
        (part, {action_of(each.op_name) for each in module.within(inside)})
        for part, inside in _candidates(module, where, at_most)
        if part.work != at_least.of(where.by_name[part.instruction], where)
    ]
    names = {each.op_name for each in module.within(where)}
    if not any(scope in name for scope in (_scopes.RAMP, _scopes.STEADY) for name in names):
        return [part for part, _ in found]
    return [part for part, actions in found if actions & _OF_ALL_RANKS]


def _candidates(
    module: Module, where: Computation, at_most: Costs
) -> Iterator[tuple[Part, Computation]]:
    """Yields the loops of unknown length and the branches, each with its contents."""
    for each in where.instructions:
        match each.opcode:
            case "while" if trip_count(module, each, where) is None:
                body = module.computations[each.called["body"][0]]
                yield Part(each.name, at_most.of(each, where)), body
            case "conditional":
                for branch in module.branches(each):
                    yield Part(each.name, at_most.of_computation(branch)), branch
