"""Counts the work of instructions: matmul FLOPs by their shapes, cycles as the compiler estimates.

The work of an instruction includes the computations that it calls, a loop's body as often as it
runs. Some ranks pass over the branches of conditionals, and over loops whose number of trips is not
in the text (such a loop runs once or not at all, or over all layers of a stage or none). A count of
the most work has the most expensive branch, and such loops once, or over all layers; a count of the
least work has the cheapest branch, and none of these loops.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.kernels import Kernels
from dualpipe_jax._scopes import ACTIONS, PREFIX, read_layers

# In place of an action's name.
OTHER = "other"


@dataclass(frozen=True)
class CompiledWork:
    """Holds FLOPs of matmuls, and clock cycles."""

    flops: float = 0.0
    cycles: float = 0.0

    def __add__(self, other: "CompiledWork") -> "CompiledWork":
        return CompiledWork(self.flops + other.flops, self.cycles + other.cycles)

    def __mul__(self, times: float) -> "CompiledWork":
        return CompiledWork(self.flops * times, self.cycles * times)


class WorkCounter:
    """Counts the work of a module's instructions, on the rank with the most of it or the least.

    Args:
      module: The program.
      at_least: Whether to count the least work.
      kernels: The costs of kernels.
      device: The published figures of a device, at whose peak kernels run.
    """

    def __init__(
        self,
        module: Module,
        *,
        at_least: bool = False,
        kernels: Kernels | None = None,
        device: Device | None = None,
    ):
        self._module = module
        self._at_least = at_least
        self._kernels = kernels or Kernels()
        self.has_cycles = device is not None and device.clock is not None
        # The published peak: the compiler gives no cycles for kernels.
        self._flops_per_cycle = math.inf
        if device is not None and device.clock is not None:
            self._flops_per_cycle = device.peak_flops / device.clock
        self._of_computation: dict[str, CompiledWork] = {}

    def of_computation(self, computation: Computation) -> CompiledWork:
        """Sums up a computation."""
        if computation.name not in self._of_computation:
            total = CompiledWork()
            for instruction in computation.instructions:
                total += self.of(instruction, computation)
            self._of_computation[computation.name] = total
        return self._of_computation[computation.name]

    def of(self, instruction: Instruction, where: Computation) -> CompiledWork:
        """Counts the work of an instruction in computation `where`."""
        inside = [self.of_computation(callee) for callee in self._module.callees(instruction)]
        match instruction.opcode:
            case "while":
                trips = trip_count(self._module, instruction, where)
                if trips is None:
                    trips = 0 if self._at_least else most_trips(instruction)
                called = sum(inside, CompiledWork()) * trips
            case "conditional":
                choose = min if self._at_least else max
                called = choose(
                    inside, key=lambda work: (work.cycles, work.flops), default=CompiledWork()
                )
            case _:
                called = sum(inside, CompiledWork())
        own = _FLOPS[instruction.opcode](instruction, where) if instruction.opcode in _FLOPS else 0
        of_kernel = self._kernels.flops(instruction, where)
        # The compiler's estimate for a fusion covers all instructions inside it.
        cycles = instruction.cycles
        if cycles is None:
            cycles = called.cycles + of_kernel / self._flops_per_cycle
        return CompiledWork(own + of_kernel + called.flops, cycles)


def trip_count(module: Module, loop: Instruction, where: Computation) -> int | None:
    """Finds how often a `while` runs its body: as the compiler says, else by its condition.

    None if the number is not in the text. The condition must compare a counter to a constant, and
    the counter must start from a constant and rise by one (as those of `lax.scan` do).
    """
    if loop.known_trip_count is not None:
        return loop.known_trip_count
    condition = module.computations.get(loop.called.get("condition", ("",))[0])
    if condition is None:
        return None
    compare = _compare(module, condition)
    if compare is None:
        return None
    index, limit = compare
    start = _initial(where, loop, index)
    return None if start is None else max(0, limit - start)


def most_trips(loop: Instruction) -> int:
    """Bounds the trips of a `while` whose number of trips is not in the text."""
    return read_layers(loop.op_name) or 1


def _compare(module: Module, condition: Computation) -> tuple[int, int] | None:
    """Reads `counter < limit` off a condition: the counter's index in the state, and the limit."""
    root, here = condition.root, condition
    values = here.operands_of(root)
    if root.opcode == "fusion" and module.callees(root):
        # The compare is inside the fusion, whose parameters are the fusion's operands.
        inner = module.callees(root)[0]
        passed, root = values, inner.root
        values = [
            passed[int(value.arguments)] if value.opcode == "parameter" else value
            for value in inner.operands_of(root)
        ]
    if root.opcode != "compare" or "direction=LT" not in root.attributes or len(values) != 2:
        return None
    counter, limit = values
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    return counter.number("index", -1), int(limit.arguments)


def _initial(where: Computation, loop: Instruction, index: int) -> int | None:
    """Reads the constant from which a counter starts."""
    state = where.by_name.get(loop.operands[0])
    if state is None or state.opcode != "tuple" or not 0 <= index < len(state.operands):
        return None
    value = where.by_name.get(state.operands[index])
    while value is not None and value.opcode in ("copy", "bitcast", "convert") and value.operands:
        value = where.by_name.get(value.operands[0])
    if value is None or value.opcode != "constant":
        return None
    return int(value.arguments) if re.fullmatch(r"-?\d+", value.arguments) else None


def _dot_flops(dot: Instruction, where: Computation) -> float:
    # 2 * elements of the result * product of the contracted dims
    lhs = where.operands_of(dot)[0].shapes[0]
    contracted = math.prod(lhs.dims[dim] for dim in dot.integers("lhs_contracting_dims"))
    return 2.0 * math.prod(dot.shapes[0].dims) * contracted


def _convolution_flops(convolution: Instruction, where: Computation) -> float:
    """Counts products with data, not with padding: TPUs write batched matmuls as dilated ones."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels, convolution.attributes
    lhs, rhs = (operand.shapes[0].dims for operand in where.operands_of(convolution)[:2])
    size_of = [
        dict(zip(names, dims, strict=True))
        for names, dims in zip(labels.groups(), (lhs, rhs, convolution.shapes[0].dims), strict=True)
    ]
    spatial = sorted(name for name in size_of[1] if name.isdigit())
    batch = size_of[0]["b"] // convolution.number("batch_group_count", 1)
    products = 1
    for index, dim in enumerate(spatial):
        stride, low, lhs_dilate, rhs_dilate = _window(convolution.attributes, index)
        out, kernel = np.arange(size_of[2][dim])[:, None], np.arange(size_of[1][dim])
        at = out * stride + kernel * rhs_dilate - low
        in_data = (at >= 0) & (at % lhs_dilate == 0) & (at // lhs_dilate < size_of[0][dim])
        products *= int(in_data.sum())
    return 2.0 * batch * size_of[1]["o"] * size_of[1]["i"] * products


def _window(attributes: str, index: int) -> tuple[int, int, int, int]:
    """Reads stride, low padding and dilations of one spatial dim."""
    window = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in window[1].split()) if window else {}

    def of(name: str, default: int) -> int:
        return int(fields[name].split("x")[index].split("_")[0]) if name in fields else default

    return of("stride", 1), of("pad", 0), of("lhs_dilate", 1), of("rhs_dilate", 1)


def _custom_call_flops(call: Instruction, where: Computation) -> float:
    # GPUs hand matmuls to cuBLAS: `custom_call_target="__cublas$lt$matmul"`.
    dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)
    operands = where.operands_of(call)
    if "__cublas$" not in call.attributes or dims is None or not operands:
        return 0.0
    lhs = operands[0].shapes[0].dims
    contracted = math.prod(lhs[int(dim)] for dim in re.findall(r"\d+", dims[1]))
    return 2.0 * math.prod(call.shapes[0].dims) * contracted


_FLOPS: dict[str, Callable[[Instruction, Computation], float]] = {
    "dot": _dot_flops,
    "convolution": _convolution_flops,
    "custom-call": _custom_call_flops,
}


@dataclass(frozen=True, kw_only=True)
class ActionWork:
    """Tells the work of an action in one trip of the loop.

    Attributes:
      name: `"forward"`, `"input_grad"`, ..., or `"other"` for instructions without an action's
        name.
      flops: FLOPs of its matmuls.
      cycles: Cycles, as the compiler estimates; None without estimates.
    """

    name: str
    flops: float
    cycles: float | None


def work_by_action(
    module: Module, counter: WorkCounter, body: Computation
) -> dict[str, CompiledWork]:
    """Sums up the work of a loop's body by the action in the instructions' names, or `OTHER`.

    A fusion of several actions' instructions counts under the name that the compiler gave it. An
    instruction without a name, such as a copy, counts for the action of its loop or branch if that
    has one action only.
    """
    total: dict[str, CompiledWork] = {}

    def add(where: Computation, times: float, unnamed: str = OTHER) -> None:
        for instruction in where.instructions:
            callees = module.callees(instruction)
            match instruction.opcode:
                case "while":
                    trips = trip_count(module, instruction, where) or most_trips(instruction)
                    for callee in callees:
                        add(callee, times * trips, _only_action(module, callees) or unnamed)
                case "conditional":
                    most = max(callees, key=lambda c: _size(counter.of_computation(c)))
                    add(most, times, _only_action(module, callees) or unnamed)
                case "call":
                    for callee in callees:
                        add(callee, times, unnamed)
                case _:
                    name = _action(module, instruction)
                    name = unnamed if name == OTHER else name
                    work = counter.of(instruction, where) * times
                    total[name] = total.get(name, CompiledWork()) + work

    add(body, 1)
    return total


def count_parts(module: Module, body: Computation, action: str) -> int:
    """Counts the conditionals and loops of a body that hold an action."""
    return sum(
        any(
            action_of(inner.op_name) == action
            for callee in module.callees(instruction)
            for inner in module.within(callee)
        )
        for instruction in body.instructions
        if instruction.opcode in ("while", "conditional")
    )


def _only_action(module: Module, computations: list[Computation]) -> str | None:
    """Names the action of the computations, if they have one only."""
    named = {
        action_of(instruction.op_name) for c in computations for instruction in module.within(c)
    } - {OTHER}
    return named.pop() if len(named) == 1 else None


def _size(work: CompiledWork) -> tuple[float, float]:
    return work.cycles, work.flops


def _action(module: Module, instruction: Instruction) -> str:
    """Names the action of an instruction, or of a fusion's root."""
    name = action_of(instruction.op_name)
    if name == OTHER and instruction.opcode == "fusion":
        for callee in module.callees(instruction):
            name = action_of(callee.root.op_name)
    return name


def action_of(op_name: str) -> str:
    """Reads off the innermost action in the name of an instruction, or `OTHER`."""
    found = [name for name in re.findall(rf"{re.escape(PREFIX)}\w+", op_name) if name in ACTIONS]
    return found[-1] if found else OTHER


def short_name(action: str) -> str:
    """Writes an action without the prefix of its scope.

    >>> short_name("dualpipe.input_grad")
    'input_grad'
    """
    return action.removeprefix(PREFIX)
