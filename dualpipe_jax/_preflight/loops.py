"""Which loop of the program is its steady loop.

The executor names its parts (`dualpipe_jax._scopes`). Taken is the loop whose body holds the
straight-line beats; without such, the scan over ticks; in a program that is not ours, the outermost
loop with collectives, or, without collectives in loops, the outermost loop; the one of most work if
there are several.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.collectives import holds_collective, is_collective
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.work import WorkCounter, trip_count


@dataclass(frozen=True, eq=False, kw_only=True)
class FoundLoop:
    """Tells of a loop.

    Attributes:
      kind: `"steady"`, `"ramp"`; in a program that is not ours, `"other"` with collectives and
        `"plain"` without.
      instruction: The `while`.
      body: Its body.
      num_trips: How often it runs; None if the text does not say.
    """

    kind: str
    instruction: Instruction
    body: Computation
    num_trips: int | None


_Loop = tuple[Instruction, Computation, Computation]  # a while, its body, and where it stands


def find_loop(module: Module, costs: WorkCounter) -> FoundLoop | None:
    """Finds the steady loop; None if the program has no loop of matmuls, collectives or names."""
    rules: tuple[tuple[str, Callable[[Computation], bool]], ...] = (
        # In the body itself: the loop stands in the scan over ticks, which holds all that it holds.
        ("steady", lambda body: _sends(module, body, _scopes.STEADY, loops=False)),
        ("ramp", lambda body: _sends(module, body, _scopes.RAMP, loops=True)),
        ("other", lambda body: holds_collective(module, body)),
        ("plain", lambda body: costs.of_computation(body).flops > 0),
    )
    loops = list(_loops(module))
    for kind, rule in rules:
        found = _outermost(module, [loop for loop in loops if rule(loop[1])])
        if found:
            instruction, body, where = max(found, key=lambda loop: _work(costs, loop))
            trips = trip_count(module, instruction, where)
            return FoundLoop(kind=kind, instruction=instruction, body=body, num_trips=trips)
    return None


def _loops(module: Module) -> Iterator[_Loop]:
    for where in module.computations.values():
        for each in where.instructions:
            if each.opcode == "while":
                yield each, module.computations[each.called["body"][0]], where


def _sends(module: Module, body: Computation, scope: str, *, loops: bool) -> bool:
    """Whether a collective of that scope stands in a body, or in the loops inside it."""
    return any(
        is_collective(each) and scope in each.op_name for each in module.within(body, loops=loops)
    )


def _outermost(module: Module, loops: list[_Loop]) -> list[_Loop]:
    """Leaves out the loops that stand in the body of another one."""
    inner = {
        each.name for _, body, _ in loops for each in module.within(body) if each.opcode == "while"
    }
    return [loop for loop in loops if loop[0].name not in inner]


def _work(costs: WorkCounter, loop: _Loop) -> tuple[float, float]:
    total = costs.of(loop[0], loop[2])
    return total.cycles, total.flops
