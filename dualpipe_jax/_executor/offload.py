"""Decides which values wait in the host's memory: those that a policy offloads, and others.

In: the derivatives of blocks, stages, slots, a limit. Out: the set of the values that wait there.
Such a value does so in every slot, and the program of a beat stays
straight-line code: a copy starts when F has made the value, and another one before I needs it.

If the slots of residuals are to fit into a limit on the device, those of the first layers of a
stage go: F makes them first, and I reads them last, so that both copies have the other layers'
work beside them. Within a layer, or where layers are a loop, those go first that F makes first,
for the same reason. Small values stay (`LEAST_BYTES`): many short copies would take link time for
few bytes. Values of one element stay whatever a policy says: a TPU copies none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from dualpipe_jax._executor.buffers import RESIDUALS, Place
from dualpipe_jax._executor.stages import Stages
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._sizes import LEAST_ON_HOST as LEAST_BYTES
from dualpipe_jax._sizes import format_bytes, parse_bytes
from dualpipe_jax._split_vjp import SplitVjp


@dataclass(frozen=True, kw_only=True)
class _Value:
    """Describes a value that a layer, or each layer of a loop, keeps in slots.

    Attributes:
      place: Which one it is.
      num_bytes: Bytes of one slot.
      num_slots: The slots.
      is_offloaded: Whether a policy has it wait in the host's memory.
      may_leave: Whether it may wait there otherwise.
    """

    place: Place
    num_bytes: int
    num_slots: int
    is_offloaded: bool
    may_leave: bool


def find_on_host(
    block: Mapping[Kind, SplitVjp],
    stages: Stages,
    slots: Mapping[str, int],
    *,
    slots_on_device: int | str | None,
) -> frozenset[Place]:
    """Decides which values wait in the host's memory.

    Args:
      block: The derivatives of each kind of block.
      stages: Which layers each rank has.
      slots: The slots of each buffer.
      slots_on_device: As of `Execution`; with None only a policy's leave the device.

    Raises:
      ValueError: If the values that may not leave need more room, naming the least.
    """
    values = _values(block, stages, slots)
    there = {value.place for value in values if value.is_offloaded}
    if slots_on_device is None:
        return frozenset(there)
    one = sum(value.num_bytes for value in values)
    is_count = isinstance(slots_on_device, int)
    limit = slots_on_device * one if is_count else parse_bytes(slots_on_device)
    here = [value for value in values if not value.is_offloaded]
    left = sum(value.num_bytes * value.num_slots for value in here)
    for value in here:
        if left > limit and value.may_leave:
            there.add(value.place)
            left -= value.num_bytes * value.num_slots
    if left > limit:
        raise ValueError(
            f"slots_on_device={slots_on_device!r}: must be at least {math.ceil(left / one)}, or "
            f"'{left}B': values of fewer than {format_bytes(LEAST_BYTES)} a layer and random keys "
            "do not leave the device"
        )
    return frozenset(there)


def _values(
    block: Mapping[Kind, SplitVjp], stages: Stages, slots: Mapping[str, int]
) -> list[_Value]:
    """Lists the values that residuals have, in the order in which they are to leave the device."""
    layers = [(kind, 0) for kind in stages.stacks]
    if stages.is_unrolled:
        layers = [(layer.kind, layer.index) for layer in stages.layers_of(0)]
    values: list[_Value] = []
    for kind, entry in layers:
        num_layers = 1 if stages.is_unrolled else stages.stacks[kind].max_layers
        of_layer: dict[int, _Value] = {}  # by the order in which F makes them
        for name in RESIDUALS:
            columns = (getattr(block[kind], f"{name}{end}") for end in ("", "_made", "_offloaded"))
            for number, (aval, made, is_offloaded) in enumerate(zip(*columns, strict=True)):
                size = aval.size * aval.dtype.itemsize
                is_key = jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)
                of_layer[made] = _Value(
                    place=(name, kind, entry, number),
                    num_bytes=num_layers * size,
                    num_slots=slots.get(name, 0),
                    is_offloaded=is_offloaded and aval.size > 1,
                    may_leave=aval.size > 1 and size >= LEAST_BYTES and not is_key,
                )
        values += [of_layer[made] for made in sorted(of_layer)]
    return values
