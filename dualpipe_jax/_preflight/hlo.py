"""The text of a compiled program -> its computations and their instructions.

In: the text of `jax.stages.Compiled.as_text()`. It is scheduled: the order of the instructions in a
computation is the order in which a device starts them. Only the parts in use here are read.

>>> module = parse('''HloModule jit_f, is_scheduled=true
...
... ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
...   %a = bf16[8,4]{1,0} parameter(0)
...   ROOT %tanh.1 = bf16[8,4]{1,0} tanh(%a), metadata={op_name="jit(f)/tanh"}
... }
... ''')
>>> root = module.entry.root
>>> root.opcode, root.operands, root.op_name, root.shapes[0].num_bytes
('tanh', ('a',), 'jit(f)/tanh', 64)
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn

# Bits of an element; types that are not here (token, opaque) have none.
_BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "f4e2m1fn": 4, "c64": 64, "c128": 128}
_WIDTH = re.compile(r"(?:bf|[suf])(\d+)")

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_MEMORY_SPACE = re.compile(r"S\(\d+\)")
_HOST = "S(5)"
_LANES = 128
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation|branch_computations|"
    r"called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')


@dataclass(frozen=True)
class Shape:
    """Holds the shape of one array.

    Attributes:
      dtype: As in the text: `bf16`.
      dims: Its dims.
      layout: Its memory layout, as in the text but for the memory space. Shapes are equal whatever
        their layouts.
      is_on_host: Whether the array is in the host's memory.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = field(default="", compare=False)
    is_on_host: bool = field(default=False, compare=False)

    @property
    def num_bytes(self) -> int:
        """Counts its bytes, without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            width = _WIDTH.match(self.dtype)
            bits = int(width[1]) if width else 0
        return math.ceil(math.prod(self.dims) * bits / 8)

    @property
    def padded_bytes(self) -> int:
        """Counts its bytes with its last dim padded to a TPU's width, as it travels to the host."""
        *rows, columns = self.dims or (1,)
        padded = replace(self, dims=(*rows, -(-columns // _LANES) * _LANES))
        return padded.num_bytes


@dataclass(frozen=True, eq=False)
class Instruction:
    """Holds one instruction.

    Attributes:
      name: Its name, once in a module.
      opcode: As in the text: `fusion`, `while`, `collective-permute-start`.
      shapes: The arrays of its result, those of a tuple one after the other.
      operands: The names of the instructions whose results it reads.
      arguments: The text between its parentheses; for a constant, its value.
      attributes: The text after them.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Reads the computations that it calls, by attribute: `body`, `calls`."""
        return {key: tuple(_NAME.findall(names)) for key, names in _CALLED.findall(self.attributes)}

    @property
    def callees(self) -> tuple[str, ...]:
        """Lists all computations that it calls."""
        return tuple(name for names in self.called.values() for name in names)

    @cached_property
    def op_name(self) -> str:
        """Reads the JAX functions and scopes that it stands for; "" if the text has none."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @cached_property
    def cycles(self) -> int | None:
        """Reads the compiler's estimate of its clock cycles, where it gives one."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def is_across_slices(self) -> bool:
        """Whether it moves data between slices of TPUs."""
        return "_xla_megascale_transfer_type=" in self.attributes

    @property
    def known_trip_count(self) -> int | None:
        """Reads how often a `while` runs its body, where the compiler says so."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else None

    def integers(self, attribute: str) -> tuple[int, ...]:
        """Reads a list such as `lhs_contracting_dims={1}`; () if there is none."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(map(int, found[1].split(","))) if found and found[1] else ()

    def number(self, attribute: str, default: int) -> int:
        """Reads a number such as `index=3`."""
        found = re.search(rf"\b{attribute}=(\d+)", self.attributes)
        return int(found[1]) if found else default


@dataclass(frozen=True, eq=False)
class Computation:
    """Holds one computation: its instructions in the order of the schedule, the root by name."""

    name: str
    instructions: tuple[Instruction, ...]
    root_name: str

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """Maps names to instructions."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """Finds the instruction whose result it returns."""
        return self.by_name[self.root_name]

    def operands_of(self, instruction: Instruction) -> list[Instruction]:
        """Lists the instructions whose results an instruction reads."""
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]

    def parameter(self, number: int) -> Instruction | None:
        """Finds a parameter by its number."""
        for instruction in self.instructions:
            if instruction.opcode == "parameter" and instruction.arguments.strip() == str(number):
                return instruction
        return None


@dataclass(frozen=True, eq=False)
class Module:
    """Holds a whole program."""

    computations: dict[str, Computation]
    entry: Computation

    def callees(self, instruction: Instruction) -> list[Computation]:
        """Lists the computations that an instruction calls."""
        return [self.computations[n] for n in instruction.callees if n in self.computations]

    def branches(self, conditional: Instruction) -> list[Computation]:
        """Lists the branches of a conditional by their numbers; false comes before true."""
        called = conditional.called
        if "true_computation" not in called:
            return self.callees(conditional)
        return [self.computations[called[f"{key}_computation"][0]] for key in ("false", "true")]

    def within(self, computation: Computation, *, loops: bool = True) -> Iterator[Instruction]:
        """Yields the instructions of a computation and of all that it calls, each once.

        Args:
          computation: Where to begin.
          loops: Whether to include the bodies of its loops.
        """
        seen, left = {computation.name}, [computation]
        while left:
            here = left.pop()
            for instruction in here.instructions:
                yield instruction
                if instruction.opcode == "while" and not loops:
                    continue
                for callee in self.callees(instruction):
                    if callee.name not in seen:
                        seen.add(callee.name)
                        left.append(callee)


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Raises:
      ValueError: If the text cannot be parsed: a statement outside of the grammar, a computation
        without an end, or no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, is_entry, root = None, None, False, ""
    instructions: list[Instruction] = []
    for statement in _statements(text):
        start = _INSTRUCTION.match(statement)
        if name is None:
            header = _HEADER.match(statement)
            if header:
                name, is_entry, instructions, root = header[2], bool(header[1]), [], ""
            elif start or statement.startswith("}"):
                _refuse(statement, "is outside of a computation")
        elif statement.startswith("}"):
            root = root or (instructions[-1].name if instructions else "")
            computations[name] = Computation(name, tuple(instructions), root)
            entry = computations[name] if is_entry else entry
            name = None
        elif start:
            instruction = _instruction(start[2], statement[start.end() :])
            instructions.append(instruction)
            root = instruction.name if start[1] else root
        elif statement.strip():
            _refuse(statement, f"is no instruction of computation {name}")
    if name is not None:
        raise ValueError(f"text: computation {name} has no end")
    if entry is None:
        raise ValueError("text: must be that of a compiled program, but has no ENTRY computation")
    return Module(computations, entry)


def _statements(text: str) -> Iterator[str]:
    """Yields the headers of computations, their instructions and their ends.

    Each is a line, or as many lines as close the braces that it opens: the attributes of a kernel
    may hold lines of their own, and braces in strings.
    """
    held: list[str] = []
    depth = 0
    for line in text.splitlines():
        if not held and (_HEADER.match(line) or line.startswith("}")):
            yield line
            continue
        held.append(line)
        bare = _STRING.sub("", line) if '"' in line else line
        depth += bare.count("{") - bare.count("}")
        if depth < 0:
            _refuse("\n".join(held), "closes a brace that it does not open")
        if depth == 0:
            yield "\n".join(held)
            held.clear()
    if held:
        _refuse("\n".join(held), "opens a brace that it does not close")


def _refuse(statement: str, fault: str) -> NoReturn:
    shown = statement.strip()
    raise ValueError(f"text: {shown[:200]!r}{'...' * (len(shown) > 200)} {fault}")


def _instruction(name: str, rest: str) -> Instruction:
    end = _end_of_shape(rest)
    opcode = None if end is None else _OPCODE.match(rest, end)
    close = None if opcode is None else _closing(rest, opcode.end() - 1)
    if opcode is None or close is None:
        _refuse(f"{name} = {rest}", "is no instruction: a shape, an opcode and its operands")
    shapes = tuple(
        Shape(
            dtype,
            tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim),
            _MEMORY_SPACE.sub("", layout),
            is_on_host=_HOST in layout,
        )
        for dtype, dims, layout in _SHAPE.findall(rest[:end])
    )
    arguments = rest[opcode.end() : close]
    return Instruction(
        name=name,
        opcode=opcode[1],
        shapes=shapes,
        operands=tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[close + 1 :],
    )


def _end_of_shape(text: str) -> int | None:
    """Finds the end of the shape at the beginning of the text: a tuple's, or up to a space."""
    if text.startswith("("):
        close = _closing(text, 0)
        return None if close is None else close + 1
    end = text.find(" ")
    return end if end >= 0 else None


def _closing(text: str, start: int) -> int | None:
    """Finds the parenthesis that closes the one at `start`; None if there is none."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return None
