"""An HloProto -> its instructions, and which computation runs within which.

Computations are those that a device runs one instruction after the other: the entry, bodies of
loops, branches. A fused computation is a part of its instruction.

Source: xla/service/hlo.proto of https://github.com/openxla/xla.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dualpipe_jax._profile.wire import as_bytes, as_int, as_ints, as_text, fields, message

# The opcodes whose computations have events of their own, and whose time is theirs.
CONTAINERS = frozenset({"while", "conditional", "call"})


class Instruction(NamedTuple):
    """Holds one instruction.

    Attributes:
      name: Its name, once in a program.
      opcode: As in the text of HLO.
      op_name: The JAX functions and scopes that it stands for; "" if the program has none.
      computation: The number of the computation in which it stands.
      called: The computations that it calls.
    """

    name: str
    opcode: str
    op_name: str
    computation: int
    called: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """Holds a compiled program: its instructions by name, and the number of its entry."""

    name: str
    instructions: dict[str, Instruction]
    entry: int

    @cached_property
    def inside(self) -> dict[int, frozenset[int]]:
        """For each computation that a device runs, itself and all that run within it."""
        callees: dict[int, set[int]] = {self.entry: set()}
        for instruction in self.instructions.values():
            callees.setdefault(instruction.computation, set())
            if instruction.opcode in CONTAINERS:
                callees[instruction.computation].update(instruction.called)
        found: dict[int, frozenset[int]] = {}

        def visit(computation: int) -> frozenset[int]:
            if computation not in found:
                inner = map(visit, callees.get(computation, ()))
                found[computation] = frozenset({computation}).union(*inner)
            return found[computation]

        visit(self.entry)
        return found

    @cached_property
    def standing_in(self) -> dict[int, list[Instruction]]:
        """The instructions of each computation."""
        found: dict[int, list[Instruction]] = {}
        for instruction in self.instructions.values():
            found.setdefault(instruction.computation, []).append(instruction)
        return found

    @property
    def op_names(self) -> Iterable[str]:
        """The names of all instructions."""
        return (instruction.op_name for instruction in self.instructions.values())


def parse(name: str, proto: memoryview) -> Program:
    """Reads a program.

    Raises:
      ValueError: If the bytes are no HloProto.
    """
    instructions: dict[str, Instruction] = {}
    entry = 0
    for number, value in fields(as_bytes(message(proto).get(1, memoryview(b"")))):
        if number == 6:
            entry = as_int(value)
        elif number == 3:
            computation = message(value)
            number_of_computation = as_int(computation.get(5, 0))
            for field, content in fields(as_bytes(value)):
                if field == 2:
                    made = _instruction(as_bytes(content), number_of_computation)
                    instructions[made.name] = made
    return Program(name, instructions, entry)


def _instruction(data: memoryview, computation: int) -> Instruction:
    name = opcode = op_name = ""
    called: list[int] = []
    for number, value in fields(data):
        if number == 1:
            name = as_text(value)
        elif number == 2:
            opcode = as_text(value)
        elif number == 7:
            op_name = as_text(message(value).get(2, memoryview(b"")))
        elif number == 38:
            called += as_ints(value)
    return Instruction(name, opcode, op_name, computation, tuple(called))
