"""The report of preflight: records, and the plain text of all of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe_jax._predict.waits import Waits
from dualpipe_jax._preflight.copies import Copy
from dualpipe_jax._preflight.kernels import Kernel
from dualpipe_jax._preflight.predict import Prediction
from dualpipe_jax._preflight.text import (
    COLLECTIVES_HEAD,
    WAITS_LEGEND,
    branch_lines,
    collective_rows,
    copies_lines,
    host_lines,
    kernel_line,
    prediction_line,
    quiet_ticks,
    show_bytes,
    show_flops,
    show_number,
    show_time,
    sums_table,
    text_table,
    ticks_table,
)
from dualpipe_jax._preflight.timing import Collective
from dualpipe_jax._preflight.work import ActionWork
from dualpipe_jax._schedule.execution import Execution

_LOOPS = {
    "steady": "the steady state, {num_beats} beats a trip",
    "ramp": "the scan over ticks, one a trip: there is no steady state",
    "other": "the outermost with collectives: the program has none of a pipelined step",
    "plain": "the outermost of most work: no loop has collectives",
}
# A head, and rows.
_Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Tells how much of a device's memory a step needs, in bytes.

    Attributes:
      arguments: The step's arguments.
      outputs: Its results.
      aliased: The part of the outputs that takes the place of (donated) arguments.
      temporaries: The space reserved for all other values.
      host_temporaries: The same in the host's memory; 0 where the compiler does not tell the two
        memories apart, as on CPUs.
      host_capacity: The host's memory for a device, as the caller says; None for no limit.
      peak: The most in use at one time, as the compiler counts it; None where it does not. A TPU's
        includes values in the chip's fast memory, so that in a small program it is more than
        `needed`.
      needed: Arguments, outputs that take no argument's place, and temporaries: the memory that
        must be free. For a step that the TPU compiler refused, the figure in its refusal.
      capacity: The device's memory; None where nothing is published.
      fits: Whether the needed memory is within the capacity; None where that is not known.
    """

    arguments: int | None = None
    outputs: int | None = None
    aliased: int | None = None
    temporaries: int | None = None
    host_temporaries: int | None = None
    host_capacity: float | None = None
    peak: int | None = None
    needed: int | None = None
    capacity: int | None = None
    fits: bool | None = None

    @property
    def fits_host(self) -> bool | None:
        """Whether the temporaries in the host's memory fit there; None if there is no limit."""
        if self.host_capacity is None or self.host_temporaries is None:
            return None
        return self.host_temporaries <= self.host_capacity


@dataclass(frozen=True, kw_only=True)
class ProgramSize:
    """Tells the size of the compiled program.

    Attributes:
      num_instructions: The instructions of all computations, fused ones included.
      code_bytes: The code that a device loads; None where the compiler does not say.
      global_permutes: The names of permutes in which every core waits, since a TPU's compiler has
        no barrier left for their pairs, and the JAX functions and scopes that they stand for.
    """

    num_instructions: int
    code_bytes: int | None
    global_permutes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoopTrip:
    """Tells the work and the collectives of one trip of the steady loop.

    Attributes:
      kind: `"steady"`; `"ramp"`, the scan over ticks, where there is no steady loop; in a program
        of another origin, `"other"`, the outermost loop with collectives, or `"plain"`, where no
        loop has any, the outermost of most work.
      name: The instruction's name.
      num_trips: How often it runs; None if the program does not say.
      num_beats: The beats of a trip of the steady loop, one for each chunk of a rank; None of
        another loop.
      flops: FLOPs of the matmuls of one trip, on the rank that has most.
      cycles: The compiler's estimate of its cycles; None without.
      compute_seconds: How long they take; None where neither cycles nor a peak are known.
      exposed_seconds: For how long compute stands still for collectives; for those in the branches
        of a conditional, the mean over a step's trips, or the time of the most expensive branch
        where it is not known how many trips take which.
      actions: The work of each action.
      collectives: The collectives.
      host_copies: The copies between the memories of the device and of its host, each way.
    """

    kind: str
    name: str
    num_trips: int | None
    num_beats: int | None
    flops: float
    cycles: float | None
    compute_seconds: float | None
    exposed_seconds: float | None
    actions: tuple[ActionWork, ...]
    collectives: tuple[Collective, ...]
    host_copies: tuple[Collective, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """Tells whether a step fits, and whether its communication is hidden.

    Attributes:
      topology: The topology's name.
      device: The device's name.
      axes: The mesh axes' sizes.
      apart: Mesh axes along which not all neighbours are neighbours on the chips' grid.
      compiler_options: XLA's options that the step was compiled with.
      compile_seconds: How long the compiler took; less where JAX's cache on disk had the program.
      memory: The memory of a device.
      program: The program's size; None if the step does not fit.
      loop: One trip of the steady loop; None if there is no such loop, or the step does not fit.
      kernels: The kernels that XLA does not see into, their FLOPs, and the source of these.
      copies: The copies of whole slot buffers in loops, of which there should be none: see
        `_preflight/copies.py`.
      execution: How the order of the schedule became the program, all decided; None if the program
        does not say it, as one of forwards alone.
      prediction: The time of a step.
      waits: After each tick of a predicted step in ticks, who waits, for which rank, how long and
        why, in microseconds; None for others.
      failure: The compiler's message if the step does not fit; "" if it does.
    """

    topology: str
    device: str
    axes: dict[str, int]
    apart: tuple[str, ...]
    compiler_options: dict[str, bool | int | str]
    compile_seconds: float
    memory: Memory
    program: ProgramSize | None
    loop: LoopTrip | None
    copies: tuple[Copy, ...]
    prediction: Prediction
    execution: Execution | None = None
    waits: Waits | None = None
    kernels: tuple[Kernel, ...] = ()
    failure: str = ""

    @property
    def faults(self) -> tuple[str, ...]:
        """Lists the mistakes of the program.

        They are copies of whole slot buffers over the link to the host, which no step has, and
        temporaries that do not fit into the host's memory.
        """
        memory = self.memory
        too_large = (
            f"{show_bytes(memory.host_temporaries)} of temporaries do not fit into the "
            f"{show_bytes(memory.host_capacity)} of the host's memory for a device; leave more "
            "slots on the device (slots_on_device=), or rematerialise"
        )
        return (too_large,) * (memory.fits_host is False) + tuple(
            f"{copy.shape} is copied over the link to the host {copy.count} times in a loop "
            f"({copy.where}, {copy.action}), where one slot should be: this takes longer than all "
            "else in the loop; choose other values to offload"
            for copy in self.copies
            if copy.is_over_host_link
        )

    def __str__(self) -> str:
        """Writes the report as plain text."""
        tables = [text_table(head, rows) for head, rows in self.tables()]
        tables += ["\n".join(self.notes())] if self.waits is not None else []
        return "\n\n".join(["\n".join(self.summary()), *tables])

    def summary(self) -> list[str]:
        """Writes the lines above the tables."""
        axes = ", ".join(f"{axis} {size}" for axis, size in self.axes.items())
        options = [f"{name}={value}" for name, value in self.compiler_options.items()] or ["none"]
        parts = [
            ("device", [f"{self.topology}, {self.device}; mesh {axes}"]),
            ("compiled", [f"in {self.compile_seconds:.1f} s, with XLA's options"]),
            ("", options),
            ("memory", _memory_lines(self.memory)),
            ("", [f"the compiler: {self.failure}"] if self.failure else []),
            ("program", [] if self.program is None else _program_lines(self.program)),
            ("executed", [] if self.execution is None else [str(self.execution)]),
            ("kernels", [kernel_line(kernel) for kernel in self.kernels]),
            ("step", [prediction_line(self.prediction)]),
            ("loop", ["none with matmuls"] if self.loop is None else _loop_lines(self.loop)),
            ("copies", [] if self.program is None else copies_lines(self.copies)),
            ("FAULT", list(self.faults)),
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

    def notes(self) -> list[str]:
        """Writes the lines below the tables."""
        if self.waits is None:
            return []
        least = show_time(self.prediction.dependency_seconds)
        return [
            *WAITS_LEGEND,
            f"ticks without waits: {quiet_ticks(self.waits) or 'none'}",
            f"without false waits the schedule takes {least}",
        ]

    def tables(self) -> list[_Table]:
        """Makes heads and rows of the tables: actions, collectives, waits by tick, their sums."""
        if self.loop is None:
            return []
        actions = [
            (action.name, show_number(action.cycles), show_flops(action.flops))
            for action in self.loop.actions
        ]
        tables: list[_Table] = [(("action", "cycles", "matmuls"), actions)]
        if self.loop.collectives:
            tables.append((COLLECTIVES_HEAD, collective_rows(self.loop.collectives)))
        if self.loop.host_copies:
            head = ("copy", *COLLECTIVES_HEAD[1:])
            tables.append((head, collective_rows(self.loop.host_copies)))
        if self.waits is not None:
            seconds = self.prediction.loop_seconds or 0.0
            tables += [ticks_table(self.waits), sums_table(self.waits, seconds)]
        return tables


def _memory_lines(memory: Memory) -> list[str]:
    verdicts = {True: "fits", False: "DOES NOT FIT", None: "capacity not known"}
    capacity = "" if memory.capacity is None else f" of {show_bytes(memory.capacity)}"
    lines = [f"{show_bytes(memory.needed)}{capacity} a device: {verdicts[memory.fits]}"]
    if memory.arguments is not None:
        lines.append(
            f"arguments {show_bytes(memory.arguments)}, outputs {show_bytes(memory.outputs)} "
            f"({show_bytes(memory.aliased)} in place of arguments)"
        )
        lines.append(
            f"temporaries {show_bytes(memory.temporaries)}; "
            f"live at the peak {show_bytes(memory.peak)}"
            + ", fast memory included"
            * ((memory.peak or 0) > (memory.needed or 0))
        )
    if memory.host_temporaries:
        line = f"temporaries in the host's memory {show_bytes(memory.host_temporaries)}"
        if memory.fits_host is not None:
            line += f" of {show_bytes(memory.host_capacity)}: {verdicts[memory.fits_host]}"
        lines.append(line)
    return lines


def _program_lines(program: ProgramSize) -> list[str]:
    code = "" if program.code_bytes is None else f", {show_bytes(program.code_bytes)} of code"
    lines = [f"{program.num_instructions:,} instructions{code}"]
    found = program.global_permutes
    if found:
        number = "1 permute makes" if len(found) == 1 else f"{len(found)} permutes make"
        lines.append(
            f"{number} every core wait: the compiler has no pairwise barrier left for them:"
        )
        lines += [f"  {name}  {op_name}".rstrip() for name, op_name in found.items()]
    return lines


def _loop_lines(loop: LoopTrip) -> list[str]:
    trips = "an unknown number of" if loop.num_trips is None else f"{loop.num_trips:,}"
    hidden = sum(collective.is_hidden is True for collective in loop.collectives)
    number = sum(collective.is_beside_another for collective in loop.collectives)
    beside = f", {number} beside another that is exposed" if number else ""
    cycles = "" if loop.cycles is None else f"{show_number(loop.cycles)} cycles, "
    return [
        f"{_LOOPS[loop.kind].format(num_beats=loop.num_beats)}; {trips} trips",
        (
            f"a trip: {cycles}{show_flops(loop.flops)} of matmuls, "
            f"{show_time(loop.compute_seconds)} of compute, "
            f"{show_time(loop.exposed_seconds)} exposed"
        ),
        f"{hidden} of {len(loop.collectives)} collectives hidden{beside}",
        *branch_lines(loop.collectives),
        *host_lines(loop.host_copies),
    ]
