"""What each action costs in a trip of a loop, by the scopes in the instructions' names."""

import re
from dataclasses import dataclass

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.work import Costs, Work, most_trips, trip_count

ACTIONS = tuple(
    getattr(_scopes, name)
    for name in ("FORWARD", "INPUT_GRAD", "WEIGHT_GRAD", "EMBED", "EMBED_GRAD", "HEAD", "SEND")
)
OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Action:
    """Tells what an action costs in one trip of the loop.

    Attributes:
      name: `"forward"`, `"input_grad"`, ..., or `"other"` for what stands under no action's name.
      flops: FLOPs of its matmuls.
      cycles: Cycles, as the compiler estimates; None without estimates.
    """

    name: str
    flops: float
    cycles: float | None


def work_by_action(module: Module, costs: Costs, body: Computation) -> dict[str, Work]:
    """Sums the work of a loop's body by the scope of the action, and `OTHER`.

    A fusion of several actions' instructions counts under the name that the compiler gave it; what
    has no name, such as a copy, in a loop or branch of one action alone is that action's.
    """
    total: dict[str, Work] = {}

    def add(where: Computation, times: float, unnamed: str = OTHER) -> None:
        for instruction in where.instructions:
            callees = module.callees(instruction)
            match instruction.opcode:
                case "while":
                    trips = trip_count(module, instruction, where) or most_trips(instruction)
                    for callee in callees:
                        add(callee, times * trips, _only_action(module, callees) or unnamed)
                case "conditional":
                    most = max(callees, key=lambda c: _size(costs.of_computation(c)))
                    add(most, times, _only_action(module, callees) or unnamed)
                case "call":
                    for callee in callees:
                        add(callee, times, unnamed)
                case _:
                    name = _action(module, instruction)
                    name = unnamed if name == OTHER else name
                    work = costs.of(instruction, where) * times
                    total[name] = total.get(name, Work()) + work

    add(body, 1)
    return total


def num_places(module: Module, body: Computation, action: str) -> int:
    """Counts the conditionals and loops in a body that hold an action: those of the end ranks."""
    return sum(
        any(
            action_of(each.op_name) == action
            for callee in module.callees(instruction)
            for each in module.within(callee)
        )
        for instruction in body.instructions
        if instruction.opcode in ("while", "conditional")
    )


def _only_action(module: Module, computations: list[Computation]) -> str | None:
    """The action of the computations, if there is one and no other."""
    named = {action_of(each.op_name) for c in computations for each in module.within(c)} - {OTHER}
    return named.pop() if len(named) == 1 else None


def _size(work: Work) -> tuple[float, float]:
    return work.cycles, work.flops


def _action(module: Module, instruction: Instruction) -> str:
    name = action_of(instruction.op_name)
    if name == OTHER and instruction.opcode == "fusion":
        for callee in module.callees(instruction):
            name = action_of(callee.root.op_name)
    return name


def action_of(op_name: str) -> str:
    """The innermost action in the name of an instruction, or `OTHER`."""
    found = [name for name in re.findall(r"dualpipe\.\w+", op_name) if name in ACTIONS]
    return found[-1] if found else OTHER
