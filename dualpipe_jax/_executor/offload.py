"""Decides which values wait in the host's memory: those that a policy offloads, and others.

In: the derivatives of blocks, stages, slots, a limit. Out: for each buffer and kind of layer the
values that wait there. Such a value does so in every slot, and the program of a beat stays
straight-line code: a copy starts when F has made the value, and another one before I needs it.

If the slots of residuals are to fit into a limit on the device, those of the first layers of a
stage go: F makes them first, and I reads them last, so that both copies have the other layers'
work beside them. Within a layer, or where layers are a loop, those go first that F makes first,
for the same reason. Small values stay (`LEAST_BYTES`): many short copies would take link time for
few bytes. Values of one element stay whatever a policy says: a TPU copies none.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from dualpipe_jax._executor.buffers import RESIDUALS, SLOTS
from dualpipe_jax._executor.stages import Stages
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._sizes import format_bytes, parse_bytes
from dualpipe_jax._split_vjp import SplitVjp

# A buffer, a kind, the layer's entry in `OnHost`, and the number of a value.
_Place = tuple[str, Kind, int, int]
# For each buffer and kind: for each layer of a stage whether each value is in the host's memory;
# where layers are a loop for all of them at once.
OnHost = dict[str, dict[Kind, tuple[tuple[bool, ...], ...]]]
# Values of a layer with fewer bytes stay on the device.
LEAST_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class _Value:
    """Describes a value that a layer, or each layer of a loop, keeps in slots.

    Attributes:
      place: Where `OnHost` has it.
      num_bytes: Bytes of one slot.
      num_slots: The slots.
      may_leave: Whether it may wait in the host's memory.
    """

    place: _Place
    num_bytes: int
    num_slots: int
    may_leave: bool


def find_on_host(
    block: Mapping[Kind, SplitVjp],
    stages: Stages,
    slots: Mapping[str, int],
    *,
    slots_on_device: int | str | None,
) -> OnHost:
    """Decides which slots are in the host's memory.

    Args:
      block: The derivatives of each kind of block.
      stages: Which layers each rank has.
      slots: The slots of each buffer.
      slots_on_device: As of `Execution`; with None only a policy's leave the device.

    Raises:
      ValueError: If the values that may not leave need more room, naming the least.
    """
    there = {
        (name, kind, entry, number)
        for name in SLOTS
        for kind, entry in _layers(stages)
        for number, is_there in enumerate(_offloaded(block[kind], name))
        if is_there
    }
    if slots_on_device is not None:
        there |= _spilled(_values(block, stages, slots), there, slots_on_device)
    num_layers = Counter(kind for kind, _ in _layers(stages))
    return {
        name: {
            kind: tuple(
                tuple((name, kind, entry, n) in there for n in range(len(getattr(of_kind, name))))
                for entry in range(num_layers[kind])
            )
            for kind, of_kind in block.items()
        }
        for name in SLOTS
    }


def _spilled(values: list[_Value], there: set[_Place], slots_on_device: int | str) -> set[_Place]:
    """Chooses the values that leave the device so that the rest fits."""
    one = sum(value.num_bytes for value in values)
    is_count = isinstance(slots_on_device, int)
    limit = slots_on_device * one if is_count else parse_bytes(slots_on_device)
    here = [value for value in values if value.place not in there]
    left = sum(value.num_bytes * value.num_slots for value in here)
    spilled = set()
    for value in here:
        if left <= limit:
            break
        if value.may_leave:
            spilled.add(value.place)
            left -= value.num_bytes * value.num_slots
    if left > limit:
        least = f"{math.ceil(left / one)}, or '{left}B'"
        raise ValueError(
            f"slots_on_device={slots_on_device!r}: must be at least {least}: values of fewer than "
            f"{format_bytes(LEAST_BYTES)} a layer, and random keys, do not leave the device"
        )
    return spilled


def _values(
    block: Mapping[Kind, SplitVjp], stages: Stages, slots: Mapping[str, int]
) -> list[_Value]:
    """Lists the values that residuals have, in the order in which they are to leave the device."""
    values: list[_Value] = []
    for kind, entry in _layers(stages):
        num_layers = 1 if stages.is_unrolled else stages.stacks[kind].max_layers
        of_layer = {
            made: _Value(
                place=(name, kind, entry, number),
                num_bytes=num_layers * aval.size * aval.dtype.itemsize,
                num_slots=slots.get(name, 0),
                may_leave=aval.size > 1
                and aval.size * aval.dtype.itemsize >= LEAST_BYTES
                and not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended),
            )
            for name in RESIDUALS
            for number, (aval, made) in enumerate(
                zip(
                    getattr(block[kind], name),
                    getattr(block[kind], f"{name}_made"),
                    strict=True,
                )
            )
        }
        values += [of_layer[made] for made in sorted(of_layer)]
    return values


def _layers(stages: Stages) -> list[tuple[Kind, int]]:
    """Lists the kind and the entry of each layer of the largest stage; looped, one of each kind."""
    if not stages.is_unrolled:
        return [(kind, 0) for kind in stages.stacks]
    return [(layer.kind, layer.index) for layer in stages.layers_of(0)]


def _offloaded(block: SplitVjp, name: str) -> tuple[bool, ...]:
    """Whether a policy offloads each value of a buffer."""
    avals = getattr(block, name)
    flags = getattr(block, f"{name}_offloaded") if name in RESIDUALS else (False,) * len(avals)
    return tuple(flag and aval.size > 1 for flag, aval in zip(flags, avals, strict=True))
