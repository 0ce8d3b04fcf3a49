"""Counts FLOPs of kernels that XLA does not see into: Pallas's, Triton's, cuDNN's attention.

The compiler gives them no cycles. A kernel's FLOPs are those that the user names, else those that
it estimates itself (`pl.CostEstimate`), else those of the attention kernels that come with JAX, as
if nothing were masked. At the device's published peak they become cycles. All others are listed as
not in the times.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._preflight.hlo import Computation, Instruction, Module, Shape

Operands = tuple[jax.ShapeDtypeStruct, ...]
KernelCost = float | Callable[[Operands], float]

_TARGET = re.compile(r'custom_call_target="([^"]*)"')
# TPUs' Pallas; GPUs': through Triton and through Mosaic; cuDNN's attention.
_KERNELS = re.compile(r"tpu_custom_call|.*triton.*|mosaic_gpu.*|__cudnn\$fmha.*")
_ESTIMATE = re.compile(r'"cost_estimate":\{"flops":"?(\d+)')
_DTYPES = {"pred": "bool", "bf16": "bfloat16", "c64": "complex64", "c128": "complex128"}
_LETTERS = {"f": "float", "s": "int", "u": "uint"}

GIVEN, ESTIMATED, PUBLISHED = "given", "its own estimate", "counted without a mask"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Counts the calls of a kernel, and their FLOPs.

    Attributes:
      name: Its name, by which `kernel_costs` may name its FLOPs.
      count: Its calls in the program's text.
      flops: The most FLOPs of a call; None if they are not known: then the times leave them out.
      source: Where the FLOPs are from; "" if they are not known.
    """

    name: str
    count: int
    flops: float | None
    source: str


def _attention(matmuls: int) -> Callable[[Operands], float]:
    """Makes a function that counts so many matmuls over all queries, keys and features."""

    def flops(operands: Operands) -> float:
        floats = [operand for operand in operands if jnp.issubdtype(operand.dtype, jnp.floating)]
        if len(floats) < 2 or len(floats[1].shape) < 2:
            return math.nan  # not the kernel that comes with JAX
        queries, keys = floats[:2]
        return 2.0 * matmuls * math.prod(queries.shape) * keys.shape[-2]

    return flops


# jax.experimental.pallas.ops.tpu: scores and output forward; for dk and dv the scores, dv, the
# scores' cotangent and dk; for dq the scores, their cotangent and dq.
_FORWARD, _DKV, _DQ = _attention(2), _attention(4), _attention(3)
_PUBLISHED: dict[str, KernelCost] = {
    "flash_attention": _FORWARD,
    "flash_mha_bwd_dkv": _DKV,
    "flash_mha_bwd_dq": _DQ,
    **{
        f"splash_{heads}_{phase}": cost
        for heads in ("mha", "mqa")
        for phase, cost in (("fwd", _FORWARD), ("dkv", _DKV), ("dq", _DQ))
    },
}


class Kernels:
    """Looks up the FLOPs of kernels.

    Args:
      given: The user's, by the beginning of the kernels' names.
    """

    def __init__(self, given: Mapping[str, KernelCost] | None = None):
        self._given = dict(given or {})

    def flops(self, call: Instruction, where: Computation) -> float:
        """Counts the FLOPs of a custom call; 0 if it is no kernel, or of unknown cost."""
        found = self._find(call, where) if is_kernel(call) else None
        return 0.0 if found is None else found[0]

    def list_calls(self, module: Module) -> tuple[Kernel, ...]:
        """Lists the kernels of a module by name, those of unknown cost first."""
        calls: dict[tuple[str, str], list[float]] = {}
        for where in module.computations.values():
            for call in where.instructions:
                if is_kernel(call):
                    flops, source = self._find(call, where) or (math.nan, "")
                    calls.setdefault((name_of(call), source), []).append(flops)
        kernels = [
            Kernel(name=name, count=len(flops), flops=max(flops) if source else None, source=source)
            for (name, source), flops in calls.items()
        ]
        return tuple(sorted(kernels, key=lambda kernel: (kernel.flops is not None, kernel.name)))

    def _find(self, call: Instruction, where: Computation) -> tuple[float, str] | None:
        """Finds the FLOPs of a kernel, and where they are from; None if they are not known."""
        name, estimate = name_of(call), _ESTIMATE.search(call.attributes)
        given, published = _longest(self._given, name), _longest(_PUBLISHED, name)
        if given is not None:
            return _evaluate(given, call, where, name), GIVEN
        if estimate is not None and int(estimate[1]):
            return float(estimate[1]), ESTIMATED
        if published is not None:
            flops = _call(published, call, where)
            return None if math.isnan(flops) else (flops, PUBLISHED)
        return None


def is_kernel(call: Instruction) -> bool:
    """Whether an instruction calls a kernel that XLA does not see into."""
    if call.opcode != "custom-call":
        return False
    target = _TARGET.search(call.attributes)
    return target is not None and _KERNELS.fullmatch(target[1]) is not None


def name_of(call: Instruction) -> str:
    """Finds the name of a kernel: that of its `pallas_call`, else of the function around it."""
    scopes = call.op_name.removesuffix("/pallas_call").split("/")
    names = re.findall(r"[\w.=\-]+", scopes[-1])
    return names[-1] if names else re.sub(r"\.\d+$", "", call.name)


def _longest(costs: Mapping[str, KernelCost], name: str) -> KernelCost | None:
    """Finds the cost under the longest key with which a name begins."""
    keys = [key for key in costs if name.startswith(key)]
    return costs[max(keys, key=len)] if keys else None


def _evaluate(cost: KernelCost, call: Instruction, where: Computation, name: str) -> float:
    flops = _call(cost, call, where)
    if not is_flops(flops):
        raise ValueError(
            f"kernel_costs: the function for {name!r} gives {flops!r}, must be FLOPs of a call"
        )
    return float(flops)


def _call(cost: KernelCost, call: Instruction, where: Computation) -> float:
    if not callable(cost):
        return float(cost)
    return cost(
        tuple(_aval(operand.shapes[0]) for operand in where.operands_of(call) if operand.shapes)
    )


def is_flops(value: Any) -> bool:
    """Whether a value is a number of FLOPs."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return 0 <= float(value) < math.inf
    except OverflowError:  # an integer beyond all floats
        return False


def _aval(shape: Shape) -> jax.ShapeDtypeStruct:
    """Makes the aval of an operand; a dtype that NumPy does not know becomes uint8."""
    dtype = _DTYPES.get(shape.dtype)
    if dtype is None and shape.dtype.startswith("f8"):
        dtype = f"float8_{shape.dtype.removeprefix('f8')}"
    if dtype is None:
        letter, bits = shape.dtype[:1], shape.dtype[1:]
        dtype = f"{_LETTERS[letter]}{bits}" if letter in _LETTERS and bits.isdigit() else "uint8"
    return jax.ShapeDtypeStruct(shape.dims, jnp.dtype(dtype))
