"""Compiled tables and bytes -> the memory of a rank inside a step, term by term.

The buffers are those of the executor: slots by `num_slots`, each with room for the layers of the
largest stage. XLA's own temporaries, for its fusions and copies, are not known here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dualpipe_jax._costs import format_bytes
from dualpipe_jax._errors import brief
from dualpipe_jax._schedule.actions import DEFERRED
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._sizes import LEAST_ON_HOST


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Holds the bytes that one layer keeps of one microbatch on one device, and two other sizes.

    Attributes:
      x: The value that travels between stages.
      residual: From the forward to the input grad, if only that reads it.
      weight_residual: From the forward to the weight grad.
      stash: From the input grad to the weight grad.
      deferred: From the input grad to a deferred weight grad, which may recompute.
      working: The largest value that is in no buffer, such as the logits.
    """

    x: float
    residual: float
    weight_residual: float
    stash: float
    deferred: float
    working: float


@dataclass(frozen=True, kw_only=True)
class ParameterBytes:
    """Counts parameters on one device, and the bytes of each.

    Attributes:
      layer: Parameters of a layer.
      ends: Parameters outside the layers; every rank has them all.
      parameter: Bytes of a parameter.
      gradient: Bytes of its gradient, in the accumulators.
      optimizer: Bytes of its optimizer state.

    Raises:
      ValueError: if one is negative or not finite, naming all such.
    """

    layer: float
    ends: float
    parameter: float
    gradient: float
    optimizer: float

    def __post_init__(self) -> None:
        wrong = [f"{n}={brief(v)}" for n, v in vars(self).items() if not 0 <= v < math.inf]
        if wrong:
            raise ValueError(f"{', '.join(wrong)}: must be a finite number, 0 or more")


@dataclass(frozen=True)
class MemoryTerm:
    """Holds one part of a rank's memory, in bytes, its factors, and in which memory it is."""

    name: str
    num_bytes: float
    why: str
    where: Literal["device", "host"] = "device"


def memory_of(
    tables: Tables,
    execution: Execution,
    *,
    sizes: tuple[int, ...],
    layer: LayerBytes,
    parameters: ParameterBytes,
) -> tuple[MemoryTerm, ...]:
    """Lists the parts of the fullest rank's memory while a step runs, and of its host's.

    Where slots are to wait on the host, values leave whole, in all slots; each is taken to be as
    large as x.

    Args:
      tables: The tables of the schedule, compiled as the step compiles it.
      execution: The step's execution, all decided but `unroll`.
      sizes: The layers of each stage.
      layer: The bytes that a layer keeps.
      parameters: The parameters.

    Raises:
      ValueError: if slots are to wait on the host, and the values of a layer are too small for it.
    """
    P, num_layers = tables.num_ranks, sum(sizes)
    of_stage = max(sizes)  # every slot and chunk has room for the largest stage
    # If the ranks do not divide the layers, each holds all of them (JAX has no uneven shards).
    shard = num_layers // P if num_layers % P == 0 else num_layers
    in_place = (tables.stage_of == np.arange(P)).all(axis=1) & (min(sizes) == of_stage)
    fetched = int((~in_place).sum()) * of_stage
    chunks = tables.num_chunks * of_stage
    full_backward = not execution.split_backward
    slots = tables.executed_slots(full_backward=full_backward)
    # A steady phase has a stash even so: weight grads hide the transfers there.
    by_layer = full_backward and tables.steady is None
    if full_backward:
        slots["stash"] = int(not by_layer)
    received = slots["received"]
    ends_bytes = parameters.parameter + parameters.gradient + parameters.optimizer

    stay = _share_on_device(execution, slots, layer, of_stage)

    def of_slots(name: str, num_bytes: float, stay: float = 1) -> MemoryTerm:
        count = slots.get(name, 0)
        why = f"{_count(count, 'slot')} x {_count(of_stage, 'layer')} x {format_bytes(num_bytes)}"
        if stay < 1:
            why = f"{stay:.0%} of {why}"
        return MemoryTerm(name.replace("_", " "), stay * count * of_stage * num_bytes, why)

    def on_host(name: str, num_bytes: float) -> MemoryTerm:
        term = of_slots(name, num_bytes, 1 - stay)
        # In a steady phase each chunk has an array of its own there.
        arrays = 1 if tables.steady is None else tables.num_chunks
        name, num_bytes = f"{term.name} on the host", arrays * term.num_bytes
        return replace(term, name=name, num_bytes=num_bytes, where="host")

    residuals = {"residual": layer.residual, "weight_residual": layer.weight_residual}
    return (
        MemoryTerm(
            "weights",
            (shard + fetched) * parameters.layer * parameters.parameter,
            f"{_count(shard, 'layer')} stored" + (f", {fetched} fetched" if fetched else ""),
        ),
        MemoryTerm(
            "gradients",
            chunks * parameters.layer * parameters.gradient,
            f"{_count(chunks, 'layer')}",
        ),
        MemoryTerm(
            "optimizer",
            shard * parameters.layer * parameters.optimizer,
            f"{_count(shard, 'layer')}",
        ),
        MemoryTerm("ends", parameters.ends * ends_bytes, "weights, gradients, optimizer state"),
        MemoryTerm(
            "received",
            (received + 2) * layer.x,
            f"{_count(received, 'slot')} and 2 on their way x {format_bytes(layer.x)}",
        ),
        *(of_slots(name, num_bytes, stay) for name, num_bytes in residuals.items()),
        MemoryTerm("stash", layer.stash, f"1 layer x {format_bytes(layer.stash)}")
        if by_layer
        else of_slots("stash", layer.stash),
        of_slots(DEFERRED, layer.stash if execution.deferred == "store" else layer.deferred),
        MemoryTerm("working", layer.working, "the largest value in no buffer"),
        *(on_host(name, num_bytes) for name, num_bytes in residuals.items() if stay < 1),
    )


def _share_on_device(
    execution: Execution, slots: Mapping[str, int], layer: LayerBytes, num_layers: int
) -> float:
    """Finds the share of the residuals that stays on the device, in whole values as large as x."""
    if execution.slots_on_device is None:
        return 1
    assert isinstance(execution.slots_on_device, int)
    if layer.x < LEAST_ON_HOST:
        raise ValueError(
            f"slots_on_device={execution.slots_on_device}: must be left out, as values of fewer "
            f"than {format_bytes(LEAST_ON_HOST)} a layer do not leave the device"
        )
    of_one = layer.residual + layer.weight_residual
    of_all = slots["residual"] * layer.residual + slots["weight_residual"] * layer.weight_residual
    share = execution.slots_on_device * of_one / of_all if of_all else 1
    num_values = num_layers * max(1, round(of_one / layer.x))
    return min(1, math.floor(share * num_values + 1e-9) / num_values)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
