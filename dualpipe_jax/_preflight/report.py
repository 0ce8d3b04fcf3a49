"""What preflight found, as data and as plain text."""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe_jax._preflight.actions import Action
from dualpipe_jax._preflight.copies import Copy
from dualpipe_jax._preflight.predict import Prediction
from dualpipe_jax._preflight.timing import Collective

_LOOPS = {
    "steady": "the steady state, two beats a trip",
    "ramp": "the scan over ticks, one a trip: there is no steady state",
    "other": "the outermost with collectives: the program has none of a pipelined step",
    "plain": "the outermost of most work: no loop has collectives",
}
_PLACES = {
    "steady": "a trip of the steady loop",
    "tick": "a tick",
    "once": "a step, around the steady loop",
    "loop": "a trip of a loop",
}
_MOST_COPIES = 4  # lines
# A head, and rows.
_Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Tells of a device's memory, in bytes.

    Attributes:
      arguments: What the step is given.
      outputs: What it returns.
      aliased: Of the outputs, what takes the place of arguments (donated ones).
      temporaries: What is set aside for all that lives in between.
      peak: The most that lives at one time, as the compiler counts it; None where it does not.
      needed: Arguments, outputs that take no argument's place, and temporaries: what must be free.
        Of a step that the TPU compiler refused, what it says that would be.
      capacity: What the device has; None where nothing is published.
      fits: Whether needed and peak are within the capacity; None where it is not known.
    """

    arguments: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    peak: int | None = None
    needed: int | None = None
    capacity: int | None = None
    fits: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """Tells the size of the compiled program.

    Attributes:
      num_instructions: Those of all computations, fused ones included.
      code_bytes: What a device loads; None where the compiler does not say.
    """

    num_instructions: int
    code_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Tells of one trip of the steady loop.

    Attributes:
      kind: `"steady"`; `"ramp"`, the scan over ticks, where there is no steady loop; in a program
        that is not ours, `"other"`, the outermost loop with collectives, or `"plain"`, where no
        loop has any, the outermost of most work.
      name: The instruction's name.
      num_trips: How often it runs; None if the program does not say.
      flops: FLOPs of the matmuls of one trip, on the rank that has most.
      cycles: The compiler's estimate of its cycles; None without.
      compute_seconds: How long they take; None where neither cycles nor a peak are known.
      exposed_seconds: For how long compute stands still for collectives.
      actions: What each action costs.
      collectives: The collectives.
    """

    kind: str
    name: str
    num_trips: int | None
    flops: float
    cycles: float | None
    compute_seconds: float | None
    exposed_seconds: float | None
    actions: tuple[Action, ...]
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tells whether a step fits, and whether its communication is hidden.

    Attributes:
      topology: The topology's name.
      device: The device's name.
      axes: The mesh axes' sizes.
      apart: Mesh axes along which not all neighbours are neighbours on the chips' grid.
      compiler_options: The options it was compiled with.
      compile_seconds: How long the compiler took; less where JAX's cache on disk had the program.
      memory: A device's memory.
      program: Its size; None if the step does not fit.
      loop: One trip of the steady loop; None if there is no such loop, or nothing to look at.
      copies: The copies of whole slot buffers in loops, of which there should be none: see
        `_preflight/copies.py`.
      prediction: The time of a step.
      failure: What the compiler said if the step does not fit; "" if it does.
    """

    topology: str
    device: str
    axes: dict[str, int]
    apart: tuple[str, ...]
    compiler_options: dict[str, bool | int | str]
    compile_seconds: float
    memory: Memory
    program: Program | None
    loop: Loop | None
    copies: tuple[Copy, ...]
    prediction: Prediction
    failure: str = ""

    def __str__(self) -> str:
        """The report as plain text."""
        tables = [text_table(head, rows) for head, rows in self.tables()]
        return "\n\n".join(["\n".join(self.summary()), *tables])

    def summary(self) -> list[str]:
        """The lines above the tables."""
        axes = ", ".join(f"{axis} {size}" for axis, size in self.axes.items())
        options = [f"{name}={value}" for name, value in self.compiler_options.items()] or ["none"]
        parts = [
            ("device", [f"{self.topology}, {self.device}; mesh {axes}"]),
            ("compiled", [f"in {self.compile_seconds:.1f} s, with XLA's options"]),
            ("", options),
            ("memory", _memory_lines(self.memory)),
            ("", [f"the compiler: {self.failure}"] if self.failure else []),
            ("program", [] if self.program is None else [_program_line(self.program)]),
            ("step", [_prediction_line(self.prediction)]),
            ("loop", ["none with matmuls"] if self.loop is None else _loop_lines(self.loop)),
            ("copies", [] if self.program is None else _copies_lines(self.copies)),
        ]
        if self.apart:
            parts.append(
                ("links", [f"not all neighbours along {', '.join(self.apart)} are neighbours"])
            )
            parts.append(
                ("", ["on the chips' grid: transfers between them take longer than said here"])
            )
        return [
            f"{label if index == 0 else '':9}{line}"
            for label, lines in parts
            for index, line in enumerate(lines)
        ]

    def tables(self) -> list[_Table]:
        """Heads and rows of the tables: actions, then collectives."""
        if self.loop is None:
            return []
        actions = [
            (action.name, _number(action.cycles), _flops(action.flops))
            for action in self.loop.actions
        ]
        collectives = [
            (
                each.kind if each.count == 1 else f"{each.kind} x{each.count}",
                ", ".join(each.axes) or "-",
                "async" if each.is_async else "sync",
                _bytes(each.num_bytes),
                _time(each.link_seconds),
                _number(each.cycles),
                _flops(each.flops),
                _time(each.compute_seconds),
                _verdict(each),
            )
            for each in self.loop.collectives
        ]
        tables: list[_Table] = [(("action", "cycles", "matmuls"), actions)]
        if collectives:
            head = ("collective", "axes", "", "bytes", "link", "cycles", "matmuls", "compute", "")
            tables.append((head, collectives))
        return tables


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Sets columns of plain text, the first to the left and the others to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [first.ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        ).rstrip()
        for first, *others in lines
    )


def _memory_lines(memory: Memory) -> list[str]:
    verdict = {True: "fits", False: "DOES NOT FIT", None: "capacity not known"}[memory.fits]
    capacity = "" if memory.capacity is None else f" of {_bytes(memory.capacity)}"
    lines = [f"{_bytes(memory.needed)}{capacity} a device: {verdict}"]
    if memory.arguments is not None:
        lines.append(
            f"arguments {_bytes(memory.arguments)}, outputs {_bytes(memory.outputs)} "
            f"({_bytes(memory.aliased)} in place of arguments)"
        )
        lines.append(
            f"temporaries {_bytes(memory.temporaries)}; live at the peak {_bytes(memory.peak)}"
        )
    return lines


def _program_line(program: Program) -> str:
    code = "" if program.code_bytes is None else f", {_bytes(program.code_bytes)} of code"
    return f"{program.num_instructions:,} instructions{code}"


def _prediction_line(made: Prediction) -> str:
    if made.seconds is None:
        return f"not predicted: {made.reason}"
    return (
        f"{_time(made.seconds)} predicted: {made.schedule} {_time(made.loop_seconds)}, ranks idle "
        f"{made.idle_share or 0:.1%}; outside its loops {_time(made.outside_seconds)}"
    )


def _loop_lines(loop: Loop) -> list[str]:
    trips = "an unknown number of" if loop.num_trips is None else f"{loop.num_trips:,}"
    hidden = sum(each.is_hidden is True for each in loop.collectives)
    cycles = "" if loop.cycles is None else f"{_number(loop.cycles)} cycles, "
    return [
        f"{_LOOPS[loop.kind]}; {trips} trips",
        (
            f"a trip: {cycles}{_flops(loop.flops)} of matmuls, "
            f"{_time(loop.compute_seconds)} of compute, {_time(loop.exposed_seconds)} exposed"
        ),
        f"{hidden} of {len(loop.collectives)} collectives hidden",
    ]


def _copies_lines(copies: Sequence[Copy]) -> list[str]:
    if not copies:
        return ["none of a whole slot buffer in a loop"]
    lines = [
        f"{each.count} of a whole slot buffer {_PLACES[each.where]}"
        f"{'' if each.action == 'other' else f', in {each.action}'}: {each.shape}, "
        f"{_bytes(each.num_bytes)}{'' if each.cycles is None else f', {each.cycles:,.0f} cycles'}"
        for each in copies[:_MOST_COPIES]
    ]
    more = sum(each.count for each in copies[_MOST_COPIES:])
    return [*lines, *([f"{more} more of other shapes, or in other places"] if more else [])]


def _verdict(each: Collective) -> str:
    if each.is_hidden:
        return "hidden"
    if each.exposed_seconds is None:
        return "exposed" if not each.is_async else "not known"
    return f"exposed {_time(each.exposed_seconds)}"


def _bytes(number: int | None) -> str:
    return "-" if number is None else _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _flops(number: float) -> str:
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
    return _scaled(number, 1000, units) if number else "-"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else _scaled(seconds * 1e9, 1000, ("ns", "us", "ms"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    index = 0
    while number >= base and index + 1 < len(units):
        number, index = number / base, index + 1
    return f"{number:,.0f} {units[index]}" if number >= 100 else f"{number:.3g} {units[index]}"


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"
