"""Finds the transfers of a program: their kinds, where they start, and where they are awaited.

They are collectives, and copies between the memories of a device and its host.

Asynchronous ones have three forms in the text: `all-to-all-start` and `all-to-all-done`;
`async-start` and `async-done`, or for copies on GPUs `fusion-start` and `fusion-done`, which call a
computation; and, on TPUs, fusions that hold an `AsyncCollectiveStart` and an `AsyncCollectiveDone`,
with fusions between them that compute while the collective goes on. On GPUs a start that the
scheduler found nothing to run beside is marked `is_sync`: it runs between the computations like a
synchronous one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dualpipe_jax._preflight.hlo import Computation, Instruction, Module, Shape

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Copies to the host's memory and from it, of whole arrays or of entries.
TO_HOST, FROM_HOST = "to host", "from host"
_HOST_COPIES = ("copy", "dynamic-slice", "dynamic-update-slice")
_START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"


@dataclass(frozen=True, eq=False, kw_only=True)
class FoundCollective:
    """Tells where a collective, or a copy to or from the host, starts and ends in a computation.

    Attributes:
      kind: One of `KINDS`, `TO_HOST` or `FROM_HOST`.
      start: The instruction that starts it; for a synchronous one, the only one.
      done: The instruction that waits for it, or None for a synchronous one.
      collective: The instruction that names the devices.
      num_bytes: Bytes of a device's operands; for an all-gather those of its result; for a ragged
        all-to-all those of the smaller of its two buffers, which is the most that may move where no
        row goes to two devices; for a copy the bytes that it moves, padding included.
    """

    kind: str
    start: Instruction
    done: Instruction | None
    collective: Instruction
    num_bytes: int


def holds_collective(module: Module, computation: Computation) -> bool:
    """Whether a computation, or one that it calls, has a collective."""
    return any(map(is_collective, module.within(computation)))


def is_collective(instruction: Instruction) -> bool:
    """Whether an instruction is a collective, or the start of one."""
    return _kind(instruction.opcode) is not None


def find_global_permutes(module: Module) -> dict[str, str]:
    """Maps the name of each permute in which every core waits for every other to its `op_name`.

    A TPU's compiler has 36 barriers between pairs of cores, of which each distinct set of pairs
    takes one. A permute for whose pairs none is left gets the one of all cores.
    """
    return {
        permute.name: permute.op_name
        for computation in module.computations.values()
        for permute in computation.instructions
        if _kind(permute.opcode) == "collective-permute"
        and '"barrier_type":"GLOBAL"' in permute.attributes
    }


def find_collectives(module: Module, where: Computation) -> list[FoundCollective]:
    """Lists the collectives of a computation and of its fusions, in the order of their starts.

    Copies to the host and from it are among them. The bodies of the computation's loops and its
    conditionals' branches are left out.
    """
    found = []
    dones = _dones(module, where)
    for instruction in where.instructions:
        begun = _begun(module, where, instruction)
        if begun is not None:
            kind, collective, home = begun
            is_sync = '"is_sync":true' in instruction.attributes
            found.append(
                FoundCollective(
                    kind=kind,
                    start=instruction,
                    done=None if is_sync else dones.get(instruction.name),
                    collective=collective,
                    num_bytes=_num_bytes(kind, collective, home),
                )
            )
    return found


def _kind(opcode: str) -> str | None:
    """Names the kind of a collective, or of the start of one."""
    opcode = opcode.removesuffix("-start")
    return opcode if opcode in KINDS else None


def kind_of_copy(where: Computation, instruction: Instruction) -> str | None:
    """Names the kind of a copy to the host or from it."""
    if instruction.opcode.removesuffix("-start") not in _HOST_COPIES:
        return None
    source, target = _ends_of_copy(where, instruction)
    if source.is_on_host == target.is_on_host:
        return None
    return TO_HOST if target.is_on_host else FROM_HOST


def _ends_of_copy(where: Computation, copy: Instruction) -> tuple[Shape, Shape]:
    """Finds the array that a copy reads, and the one that it writes: entries, not whole buffers."""
    operands = [shape for operand in where.operands_of(copy) for shape in operand.shapes[:1]]
    # (operands, result, the platform's own) of a start; a copy's start has its result first.
    result = copy.shapes[0]
    if copy.opcode == "dynamic-slice-start":
        result = copy.shapes[len(operands)]
    if "update" in copy.opcode:
        return operands[1], operands[0]
    return operands[0], result


def _begun(
    module: Module, where: Computation, instruction: Instruction
) -> tuple[str, Instruction, Computation] | None:
    """Finds the collective that an instruction starts or is, and the computation around it."""
    kind = _kind(instruction.opcode) or kind_of_copy(where, instruction)
    if kind is not None:
        return kind, instruction, where
    if instruction.opcode not in ("fusion", "fusion-start", "async-start", "call"):
        return None
    for callee in module.callees(instruction):
        if _is_between(callee) or _targets(callee, _DONE):
            continue
        for inside in callee.instructions:
            inner = _begun(module, callee, inside)
            if inner is not None and "all-reduce-scatter" in callee.name:
                # TPUs fuse an all-reduce with the slice that takes a device's part.
                return "reduce-scatter", *inner[1:]
            if inner is not None:
                return inner
    return None


def _is_between(computation: Computation) -> bool:
    """Whether a computation computes beside a collective, whose instruction it repeats."""
    return computation.name.startswith("async_collective_fusion")


def _targets(computation: Computation, target: str) -> bool:
    return any(
        call.opcode == "custom-call" and f'"{target}"' in call.attributes
        for call in computation.instructions
    )


def _dones(module: Module, where: Computation) -> dict[str, Instruction]:
    """Maps the name of each asynchronous start to the instruction that waits for it."""
    dones = {}
    for instruction in where.instructions:
        callees = module.callees(instruction)
        is_fused = instruction.opcode == "fusion" and any(_targets(c, _DONE) for c in callees)
        if is_fused or instruction.opcode.endswith("-done"):
            start = _start_of(module, where, instruction)
            if start is not None:
                dones[start.name] = instruction
    return dones


def _start_of(module: Module, where: Computation, done: Instruction) -> Instruction | None:
    """Follows a done back to its start, over the tuples, updates and fusions between."""
    seen, left = {done.name}, where.operands_of(done)
    while left:
        here = left.pop(0)
        callees = module.callees(here)
        if here.opcode.endswith("-start") or any(_targets(c, _START) for c in callees):
            return here
        passes = here.opcode in ("get-tuple-element", "async-update", "bitcast")
        if passes or any(map(_is_between, callees)):
            for operand in where.operands_of(here):
                if operand.name not in seen:
                    seen.add(operand.name)
                    left.append(operand)
    return None


def _num_bytes(kind: str, collective: Instruction, home: Computation) -> int:
    if kind in (TO_HOST, FROM_HOST):
        source, target = _ends_of_copy(home, collective)
        return min(source.padded_bytes, target.padded_bytes)
    operands = [shape for operand in home.operands_of(collective) for shape in operand.shapes]
    if kind == "ragged-all-to-all":
        # One buffer is sent from, the other received into. The program does not say how many bytes
        # move, but no more than fit in both where no row goes to two devices.
        return min(operands[0].num_bytes, operands[1].num_bytes)
    if kind != "all-gather":
        return _sum(operands)
    if not collective.opcode.endswith("-start"):
        return _sum(collective.shapes)
    # (operands, results, the platform's own: u32[] and the like)
    rest = collective.shapes[len(operands) :]
    return _sum(rest[: len(operands)])


def _sum(shapes: Iterable[Shape]) -> int:
    return sum(shape.num_bytes for shape in shapes)
