"""Finds which loop of a program is its steady loop.

The executor names its parts (`dualpipe_jax._scopes`). The steady loop is the one whose body holds
the straight-line beats; without such, the scan over ticks. In a program of another origin it is the
outermost loop with collectives, or, without collectives in loops, the outermost loop. Where there
are several, the one of most work is taken.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.collectives import holds_collective, is_collective
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.work import WorkCounter, trip_count


@dataclass(frozen=True, eq=False, kw_only=True)
class FoundLoop:
    """Tells which instruction a loop is, and how often it runs.

    Attributes:
      kind: `"steady"`, `"ramp"`; in a program of another origin, `"other"` with collectives and
        `"plain"` without.
      instruction: The `while`.
      body: Its body.
      num_trips: How often it runs; None if the text does not say.
    """

    kind: str
    instruction: Instruction
    body: Computation
    num_trips: int | None


_Loop = tuple[Instruction, Computation, Computation]  # a while, its body, and the one around it


def find_loop(module: Module, counter: WorkCounter) -> FoundLoop | None:
    """Finds the steady loop; None if the program has no loop of matmuls, collectives or names."""
    rules: tuple[tuple[str, Callable[[Computation], bool]], ...] = (
        # In the body itself: the scan over ticks, which holds the loop, holds its scopes too.
        ("steady", lambda body: _sends(module, body, _scopes.STEADY, loops=False)),
        ("ramp", lambda body: _sends(module, body, _scopes.RAMP, loops=True)),
        ("other", lambda body: holds_collective(module, body)),
        ("plain", lambda body: counter.of_computation(body).flops > 0),
    )
    loops = list(_loops(module))
    for kind, rule in rules:
        found = _outermost(module, [loop for loop in loops if rule(loop[1])])
        if found:
            instruction, body, where = max(found, key=lambda loop: _work(counter, loop))
            trips = trip_count(module, instruction, where)
            return FoundLoop(kind=kind, instruction=instruction, body=body, num_trips=trips)
    return None


def beats_per_trip(module: Module, loop: FoundLoop) -> int:
    """Counts the beats of a trip of the steady loop, as many as the forwards of a rank in it."""
    beats = (_scopes.read_beat(inner.op_name) for inner in module.within(loop.body))
    return 1 + max((beat for beat in beats if beat is not None), default=1)


def _loops(module: Module) -> Iterator[_Loop]:
    """Yields all loops of a program."""
    for where in module.computations.values():
        for instruction in where.instructions:
            if instruction.opcode == "while":
                yield instruction, module.computations[instruction.called["body"][0]], where


def _sends(module: Module, body: Computation, scope: str, *, loops: bool) -> bool:
    """Whether a body, with the loops inside it or without, holds a collective of that scope."""
    return any(
        is_collective(inner) and scope in inner.op_name
        for inner in module.within(body, loops=loops)
    )


def _outermost(module: Module, loops: list[_Loop]) -> list[_Loop]:
    """Leaves out the loops inside the body of another one."""
    inner = {
        inside.name
        for _, body, _ in loops
        for inside in module.within(body)
        if inside.opcode == "while"
    }
    return [loop for loop in loops if loop[0].name not in inner]


def _work(counter: WorkCounter, loop: _Loop) -> tuple[float, float]:
    """Orders loops by their work."""
    total = counter.of(loop[0], loop[2])
    return total.cycles, total.flops
