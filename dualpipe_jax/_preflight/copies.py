"""Finds copies of whole buffers inside loops, which cost time and memory for nothing.

A buffer is an array that a loop carries and that the program writes an entry at a time: some
`dynamic-update-slice` puts one entry along a dim at an index that is not a constant. The slots of
the executor are such, `[slot, ...]` and `[slot, layer, ...]`. A copy is an instruction in the body
of a loop, or in a computation called there, whose result has the shape of a buffer, that reads as
many elements, and that is no write in place: a copy, a transpose, a select, or a fusion. Moves into
fast memory and out of it that keep the layout do not count, as they run beside compute; nor do
buffers smaller than `LEAST_BYTES`. A copy of a whole buffer between the host's memory and the
device's is one, whatever the layouts: it takes longer than all else in a trip.

>>> from dualpipe_jax._preflight.hlo import parse
>>> module = parse('''
... %body (p: (s32[], f32[9,64,512])) -> (s32[], f32[9,64,512]) {
...   %p = (s32[], f32[9,64,512]{2,1,0}) parameter(0)
...   %slot = s32[] get-tuple-element(%p), index=0
...   %slots = f32[9,64,512]{2,1,0} get-tuple-element(%p), index=1
...   %turned = f32[9,64,512]{1,2,0} copy(%slots)
...   %entry = f32[1,64,512]{1,2,0} broadcast(%slot), dimensions={}
...   %written = f32[9,64,512]{1,2,0} dynamic-update-slice(%turned, %entry, %slot, %slot, %slot)
...   %back = f32[9,64,512]{2,1,0} copy(%written)
...   ROOT %out = (s32[], f32[9,64,512]{2,1,0}) tuple(%slot, %back)
... }
...
... ENTRY %main (a: (s32[], f32[9,64,512])) -> (s32[], f32[9,64,512]) {
...   %a = (s32[], f32[9,64,512]{2,1,0}) parameter(0)
...   ROOT %while = (s32[], f32[9,64,512]{2,1,0}) while(%a), condition=%c, body=%body
... }
... ''')
>>> copies = find_copies(module, WorkCounter(module), None)
>>> [(copy.shape, copy.num_bytes, copy.count) for copy in copies]
[('f32[9,64,512]', 1179648, 2)]
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dualpipe_jax import _scopes
from dualpipe_jax._preflight.collectives import kind_of_copy
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module, Shape
from dualpipe_jax._preflight.loops import FoundLoop
from dualpipe_jax._preflight.work import (
    OTHER,
    WorkCounter,
    action_of,
    most_trips,
    short_name,
    trip_count,
)

LEAST_BYTES = 2**20
# These make a whole new array; a fusion may.
_COPIES = ("copy", "transpose", "select", "copy-start", "fusion")


@dataclass(frozen=True, kw_only=True)
class Copy:
    """Counts the copies of buffers of one shape, in one kind of loop.

    Attributes:
      where: `"steady"`, in the steady loop; `"tick"`, in the scan over ticks; `"once"`, in that
        scan but around the steady loop, once a step; `"loop"`, in another loop.
      action: `"forward"`, `"input_grad"`, `"full_backward"`, ...; `"other"` in code that belongs to
        no action alone.
      shape: The buffer's, such as `"bf16[5,4,1024,1024]"`.
      num_bytes: Its size.
      count: How many of them a trip makes, or for `"once"` a step, on a rank whose action it is.
      cycles: The cycles of all of these, as the compiler estimates; None without estimates.
      is_over_host_link: Whether they are between the memories of the device and of its host.
    """

    where: str
    action: str
    shape: str
    num_bytes: int
    count: int
    cycles: float | None
    is_over_host_link: bool = False


def find_copies(module: Module, counter: WorkCounter, loop: FoundLoop | None) -> tuple[Copy, ...]:
    """Lists the copies of whole buffers in loops.

    Those over the link to the host come first, then those of most cycles, then of most bytes.

    Args:
      module: The program.
      counter: The work of its instructions.
      loop: The steady loop, or the scan over ticks; None if there is neither.
    """
    buffers = _find_buffers(module)
    found: dict[tuple[str, str, Shape, bool], tuple[int, float]] = {}
    for here, instruction, times, where, action in _in_loops(module, loop):
        is_over_host_link = kind_of_copy(here, instruction) is not None
        for shape in _copied(module, instruction, buffers, is_over_host_link=is_over_host_link):
            cycles = counter.of(instruction, module.entry).cycles
            key = where, action, shape, is_over_host_link
            count, total = found.get(key, (0, 0.0))
            found[key] = count + times, total + times * cycles
    copies = (
        Copy(
            where=where,
            action=short_name(action),
            shape=f"{shape.dtype}[{','.join(map(str, shape.dims))}]",
            num_bytes=shape.num_bytes,
            count=count,
            cycles=cycles or None,
            is_over_host_link=is_over_host_link,
        )
        for (where, action, shape, is_over_host_link), (count, cycles) in found.items()
    )
    return tuple(
        sorted(copies, key=lambda c: (not c.is_over_host_link, -(c.cycles or 0), -c.num_bytes))
    )


def _find_buffers(module: Module) -> set[Shape]:
    """Finds the shapes of all buffers that are large enough."""
    written, carried = set(), set()
    for where in module.computations.values():
        for instruction in where.instructions:
            if instruction.opcode == "while":
                carried.update(instruction.shapes)
            elif instruction.opcode in ("dynamic-update-slice", "dynamic-update-slice-start"):
                buffer, update, *indices = where.operands_of(instruction)
                sizes = zip(buffer.shapes[0].dims, update.shapes[0].dims, indices, strict=True)
                if any(a > b == 1 and i.opcode != "constant" for a, b, i in sizes):
                    written.add(buffer.shapes[0])
    return {shape for shape in written & carried if shape.num_bytes >= LEAST_BYTES}


def _in_loops(
    module: Module, loop: FoundLoop | None
) -> Iterator[tuple[Computation, Instruction, int, str, str]]:
    """Yields the instructions in loops: where each stands, how often it runs, in which action."""

    def within(
        here: Computation, times: int, where: str, action: str
    ) -> Iterator[tuple[Computation, Instruction, int, str, str]]:
        for instruction in here.instructions:
            if instruction.opcode == "while":
                body = module.computations[instruction.called["body"][0]]
                inside, again = _kind_of_loop(module, instruction, body, where, loop)
                trips = trip_count(module, instruction, here) or most_trips(instruction)
                of_body = _action(module, body, action) if again else OTHER
                yield from within(body, times * trips if again else 1, inside, of_body)
            elif instruction.opcode in ("conditional", "call"):
                for callee in module.callees(instruction):
                    yield from within(callee, times, where, _action(module, callee, action))
            elif where:
                yield here, instruction, times, where, action

    yield from within(module.entry, 1, "", OTHER)


def _kind_of_loop(
    module: Module, instruction: Instruction, body: Computation, where: str, loop: FoundLoop | None
) -> tuple[str, bool]:
    """Finds `Copy.where` for a loop's body, and whether its trips count for the loop around it."""
    if loop is None or loop.kind not in ("steady", "ramp"):
        return "loop", where == "loop"
    if instruction is loop.instruction:
        return ("steady", False) if loop.kind == "steady" else ("tick", False)
    holds_it = any(inner is loop.instruction for inner in module.within(body))
    if holds_it:
        return ("once" if where == "tick" else "tick"), False
    return (where or "loop"), bool(where)


def _action(module: Module, inside: Computation, around: str) -> str:
    """Names the action of a loop or branch; the action around it if it has several or none."""
    names = {action_of(instruction.op_name) for instruction in module.within(inside)} - {
        OTHER,
        _scopes.SEND,
    }
    if names == {_scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD}:
        return _scopes.FULL_BACKWARD
    return names.pop() if len(names) == 1 else around


def _copied(
    module: Module, instruction: Instruction, buffers: set[Shape], *, is_over_host_link: bool
) -> list[Shape]:
    """Lists the shapes of the buffers that an instruction copies."""
    if instruction.opcode not in _COPIES:
        return []
    if instruction.opcode == "copy-start":
        target, source = instruction.shapes[:2]
        is_move = target.layout == source.layout and not is_over_host_link
        return [target] if target in buffers and not is_move else []
    if instruction.opcode != "fusion":
        return [shape for shape in instruction.shapes if shape in buffers]
    (fused,) = module.callees(instruction)
    root = fused.root
    results = fused.operands_of(root) if root.opcode == "tuple" else [root]
    if len(results) < len(instruction.shapes):  # a kernel's, of several
        return []
    sizes = {
        _size(parameter)
        for parameter in fused.instructions
        if parameter.opcode == "parameter" and parameter.shapes
    }
    return [
        shape
        for result, shape in zip(results, instruction.shapes, strict=True)
        if shape in buffers and _size(result) in sizes and not _is_in_place(fused, result)
    ]


def _size(instruction: Instruction) -> tuple[str, int]:
    return instruction.shapes[0].dtype, instruction.shapes[0].num_bytes


def _is_in_place(fused: Computation, result: Instruction) -> bool:
    """Whether a result is a parameter, with some entries of it overwritten or none."""
    while result.opcode in ("bitcast", "dynamic-update-slice"):
        result = fused.operands_of(result)[0]
    return result.opcode == "parameter"
