"""A compiled step -> which part of the timetable each instruction is, and where the loops are.

Instructions have the names of `dualpipe_jax._scopes`. A fused instruction is one part, that of the
name that XLA gave it. Where an instruction runs is read off the program's computations, not off its
name: XLA moves instructions out of loops, and these have the names of actions, but run elsewhere.

- ticks: the body of the loop over ticks is the innermost that holds a forward and a backward of the
  ramp. An instruction is an action's if it is in a loop or a branch inside, which only the ranks
  run that have the action. All else (slots, look-ups in tables) is no action's.
- beats: the body of the loop over beats is the innermost that holds forwards of two beats.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dualpipe_jax import _scopes
from dualpipe_jax._profile.program import CONTAINERS, Instruction, Program

# The action of a timetable to which each scope belongs: `Costs` counts likewise.
KINDS = {
    _scopes.FORWARD: "F",
    _scopes.EMBED: "F",
    _scopes.HEAD: "F",
    _scopes.INPUT_GRAD: "I",
    _scopes.EMBED_GRAD: "I",
    _scopes.WEIGHT_GRAD: "W",
}
_SCOPES = re.compile("|".join(map(re.escape, sorted(_scopes.ACTIONS, key=len, reverse=True))))


class Part(NamedTuple):
    """Tells which part of a step an instruction is.

    Attributes:
      scope: One of `_scopes.ACTIONS`; "" for an instruction without one that runs among those of an
        action, such as a write to a slot.
      beat: The number of the beat in its trip; None in ticks.
    """

    scope: str
    beat: int | None


@dataclass(frozen=True, eq=False)
class Parts:
    """Divides a program's instructions into the parts of a step.

    Attributes:
      program: The program.
      ticks: The body of the loop over ticks.
      beats: The body of the loop over beats; None if there is none.
    """

    program: Program
    ticks: int
    beats: int | None

    @cached_property
    def kinds(self) -> tuple[frozenset[str], frozenset[str]]:
        """The actions of the program, F, I and W, in ticks and in beats."""
        in_ticks, in_beats = set(), set()
        for part in self._parts.values():
            (in_ticks if part.beat is None else in_beats).add(KINDS.get(part.scope, ""))
        return frozenset(in_ticks) - {""}, frozenset(in_beats) - {""}

    def of(self, instruction: str) -> Part | None:
        """Finds the part of an instruction; None if it is none."""
        return self._parts.get(instruction)

    def is_in_beats(self, instruction: str) -> bool:
        """Whether an instruction runs within the loop over beats."""
        return self._is_inside(instruction, self.beats)

    def is_in_ticks(self, instruction: str) -> bool:
        """Whether an instruction runs within the loop over ticks, and not in that over beats."""
        return self._is_inside(instruction, self.ticks) and not self.is_in_beats(instruction)

    def stands_in(self, computation: int) -> frozenset[str]:
        """Names the instructions that each trip of a loop runs once, by the body of the loop."""
        return frozenset(each.name for each in self.program.standing_in.get(computation, ()))

    def _is_inside(self, instruction: str, body: int | None) -> bool:
        found = self.program.instructions.get(instruction)
        return (
            body is not None
            and found is not None
            and found.computation in self.program.inside[body]
        )

    @cached_property
    def _parts(self) -> dict[str, Part]:
        of_actions = {
            computation
            for computation, inside in self.program.inside.items()
            if any(
                KINDS.get(_scope(instruction, _scopes.RAMP))
                for number in inside
                for instruction in self.program.standing_in.get(number, ())
            )
        }
        parts = {}
        for instruction in self.program.instructions.values():
            name = instruction.name
            if instruction.opcode in CONTAINERS:
                continue
            if self.is_in_beats(name):
                # An instruction of several beats has the name of one.
                beat = _scopes.read_beat(instruction.op_name) or 0
                parts[name] = Part(_scope(instruction, _scopes.STEADY), beat)
            elif self.is_in_ticks(name):
                # Not one of the beats, out of whose loop XLA has moved it.
                scope = _scope(instruction, _scopes.RAMP)
                is_direct = instruction.computation == self.ticks
                is_among_actions = not is_direct and instruction.computation in of_actions
                if scope == _scopes.SEND or is_among_actions:
                    parts[name] = Part(scope, None)
        return parts


def find_parts(program: Program) -> Parts | None:
    """Finds the loops of a step; None if a program has no loop over ticks."""

    def innermost(*rules: Callable[[Instruction], bool]) -> int | None:
        """Finds the body of the innermost loop in which each rule holds for an instruction."""
        wanted = [
            {each.computation for each in program.instructions.values() if rule(each)}
            for rule in rules
        ]
        bodies = [
            body
            for each in program.instructions.values()
            if each.opcode == "while"
            for body in each.called
            if body in program.inside and all(program.inside[body] & found for found in wanted)
        ]
        return min(bodies, key=lambda body: len(program.inside[body]), default=None)

    def runs(kinds: str, segment: str, beat: int | None) -> Callable[[Instruction], bool]:
        return lambda each: (
            KINDS.get(_scope(each, segment), "-") in kinds
            and _scopes.read_beat(each.op_name) == beat
        )

    ticks = innermost(runs("F", _scopes.RAMP, None), runs("IW", _scopes.RAMP, None))
    beats = innermost(runs("F", _scopes.STEADY, 0), runs("F", _scopes.STEADY, 1))
    return None if ticks is None else Parts(program, ticks, beats)


def _scope(instruction: Instruction, segment: str) -> str:
    """Finds the innermost scope of an action in an instruction's name, "" outside of a segment."""
    if segment not in instruction.op_name:
        return ""
    return next(reversed(_SCOPES.findall(instruction.op_name)), "")
