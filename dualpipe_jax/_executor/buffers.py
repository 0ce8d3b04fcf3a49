"""Slot buffers: values that live between ticks, read and written in place, one entry at a time.

A slot holds a whole x (`[slot, ...]` for each leaf, plain arrays), or values that the layers of a
stage keep (`SlotBuffer`). A value of a stage's size is never gathered from a slot: the loop over
layers reads and writes one layer.

The layout of slots in a TPU's memory, which ticks and beats share: XLA chooses layouts for every
loop separately. In a tick the loops of F, I and W follow each other, then the beats, each run or
skipped (`when`); where two want a slot buffer in different layouts, XLA copies all of its slots
between them, in every tick, whether they run or not. So in ticks, and where the beats begin and
end, a buffer has one layout: residuals that of the contractions around them (`_split_vjp`), stashes
row-major. The entries that a tick writes and reads have the same one: a loop that wants another
layout transposes that value alone, where it would otherwise transpose the buffer before reading the
value. XLA still chooses two kinds of layouts: those of values with one or two dims, on which loops
mostly agree, and those of residuals larger than x that a softmax may read, as all loops take the
layout for attention scores that the softmax wants.

(TPU v5e, a transformer of two layers a stage, width 1024, four sequences of 1024 a microbatch,
stacked queries, keys and values: a tick in which all actions run takes 31.3 million cycles, not
62.3; a trip of the steady loop, in which XLA chooses, 34.3, not 34.4; and temporaries take 3,499
MiB, not 4,268. With scores row-major too: 6,701. With row-major layouts within beats of
unrolled layers too, beats took 8 to 10 % more cycles. Where layers are a loop, buffers and entries
do have these layouts in beats: the loops of I and W copied whole buffers between them there too.)
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dualpipe_jax._executor import barriers, host
from dualpipe_jax._executor.host import HostSlots
from dualpipe_jax._model.kinds import Kind
from dualpipe_jax._model.types import PyTree
from dualpipe_jax._schedule.actions import EFFECTS, Opcode
from dualpipe_jax._split_vjp import SplitVjp

# The buffers in which F keeps values for I and for W, and those in which I keeps values for W.
RESIDUALS = EFFECTS[Opcode.FORWARD].writes
STASHES = (*EFFECTS[Opcode.INPUT_GRAD].writes, *EFFECTS[Opcode.INPUT_GRAD_DEFERRING].writes)
SLOTS = (*RESIDUALS, *STASHES)
# A value in slots: the buffer, the kind of layer, the layer's number among those of its kind in a
# stage (0 for all where layers are a loop), and the value's number.
Place = tuple[str, Kind, int, int]
# The order of a value's dims in memory, the outermost first; None leaves it to XLA.
MemoryOrder = tuple[int, ...] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotBuffer:
    """Holds the values that the layers of one kind keep in slots, `[slot, layer, ...]` each.

    Where layers are unrolled each has arrays of its own, `[slot, ...]`, so that no layer waits for
    another's.

    A value that waits in the host's memory has `HostSlots`, `[slot * layer, ...]`: a TPU copies
    entries along one dim only.

    Attributes:
      arrays: The array of each value, or its `HostSlots`; with unrolled layers such a tuple for
        each layer.
      shapes: The shape of each value.
      memory_orders: The order in memory of each value's dims.
      parts: For each value the parts, along its first dim, in which straight-line code reads it.
      is_unrolled: Whether each layer has arrays of its own.
      num_layers: The layers that others have.
    """

    arrays: tuple[Any, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = field(default=(), metadata={"static": True})
    memory_orders: tuple[MemoryOrder, ...] = field(default=(), metadata={"static": True})
    parts: tuple[int, ...] = field(default=(), metadata={"static": True})
    is_unrolled: bool = field(default=False, metadata={"static": True})
    num_layers: int = field(default=1, metadata={"static": True})

    def with_arrays(self, arrays: tuple[Any, ...] = ()) -> "SlotBuffer":
        """Returns the buffer with other arrays; without any for a loop that does not use it."""
        return replace(self, arrays=arrays)

    def read(
        self, layer: Any, slot: Any, chunk: int = 0, *, in_parts: bool = False
    ) -> tuple[jax.Array, ...]:
        """Reads the values that a slot holds for a layer.

        Args:
          layer: The layer.
          slot: The slot.
          chunk: The chunk whose values they are.
          in_parts: Whether to read each value in its `parts` and to join them again: XLA does
            neither where the readers want the parts.
        """
        arrays, index = self._entry(layer, slot)
        if not arrays:
            return ()
        return tuple(
            array.read(self._row(index), shape, chunk)
            if isinstance(array, HostSlots)
            else _read_parts(array, index, parts if in_parts else 1)
            for array, shape, parts in zip(arrays, self.shapes, self.parts, strict=True)
        )

    def write(
        self, layer: Any, slot: Any, values: Sequence[jax.Array], chunk: int = 0
    ) -> "SlotBuffer":
        """Returns the buffer with a layer's values in a slot; in place inside a loop."""
        arrays, index = self._entry(layer, slot)

        def one(array: Any, value: jax.Array) -> Any:
            if isinstance(array, HostSlots):
                return array.write(self._row(index), value, chunk)
            return write(array, value, *index)

        return self._replace(layer, tuple(map(one, arrays, values)))

    def keep_fetched(
        self, layer: Any, fetched: Sequence[jax.Array], read: Sequence[jax.Array]
    ) -> tuple[jax.Array, ...]:
        """Returns values as they are read now, but those in the host's memory as `fetched` before.

        So none is fetched twice.
        """
        arrays, _ = self._entry(layer, 0)
        return tuple(
            old if isinstance(array, HostSlots) else new
            for array, old, new in zip(arrays, fetched, read, strict=True)
        )

    def poison(self, slot: Any) -> "SlotBuffer":
        """Overwrites a slot of all layers with values that spread, to find late reads."""

        def one(array: Any) -> Any:
            if _is_on_host(array):
                fill = _poison(array.of_chunks[0].dtype)
                return array.poison(slot * self.num_layers, self.num_layers, fill)
            return poison(array, slot)

        return self.with_arrays(jax.tree.map(one, self.arrays, is_leaf=_is_on_host))

    def take_layer(self, layer: int) -> "SlotBuffer":
        """Returns the buffer with the arrays of one unrolled layer alone."""
        mine = (own if number == layer else () for number, own in enumerate(self.arrays))
        return self.with_arrays(tuple(mine))

    def put_layer(self, layer: int, changed: "SlotBuffer") -> "SlotBuffer":
        """Returns the buffer with the arrays of a layer as in a buffer from `take_layer`."""
        return self._replace(layer, changed.arrays[layer]) if self.arrays else self

    def hand_on(self, layer: Any, *, after: PyTree = ()) -> "SlotBuffer":
        """Passes a buffer that was only read to its next write, as if it had been written.

        If the next loop took it from before this one, both would be alive, and XLA would copy it.
        For the same reason the next write in straight-line code has to come `after` the values that
        were computed from the entry that was read; in the host's memory `after_fetch` says so.
        """
        arrays, _ = self._entry(layer, 0)
        handed = [n for n, array in enumerate(arrays) if not (after and _is_on_host(array))]
        if not handed:
            return self
        return self._with(layer, handed, barriers.after([arrays[n] for n in handed], after))

    def hand_on_with(self, layer: Any, values: PyTree) -> tuple["SlotBuffer", PyTree]:
        """Has the next write come after all of the values, and returns these for their readers.

        Where `hand_on` waits for an entry of a value, XLA may compute that by itself and the rest
        later, and then copies all slots for the reads that this needs. (TPU v5e, a transformer with
        a flash attention kernel, eight ranks: a trip of `dualpipev` took 25 % more cycles.)
        """
        arrays, _ = self._entry(layer, 0)
        handed = [n for n, array in enumerate(arrays) if not _is_on_host(array)]
        new, values = lax.optimization_barrier(([arrays[n] for n in handed], values))
        return self._with(layer, handed, new), values

    def _with(self, layer: Any, numbers: Sequence[int], new: Sequence[Any]) -> "SlotBuffer":
        """Replaces some of a layer's arrays."""
        arrays, _ = self._entry(layer, 0)
        replaced = dict(zip(numbers, new, strict=True))
        return self._replace(layer, tuple(replaced.get(n, a) for n, a in enumerate(arrays)))

    def after_fetch(self, layer: Any, fetched: Sequence[jax.Array], chunk: int = 0) -> "SlotBuffer":
        """Has the next writes of a chunk in the host's memory come after the values fetched there.

        They need not wait for the values that are computed from them.
        """
        arrays, _ = self._entry(layer, 0)

        def one(array: Any, value: jax.Array) -> Any:
            return array.after(value, chunk) if isinstance(array, HostSlots) else array

        return self._replace(layer, tuple(map(one, arrays, fetched)))

    def in_memory_order(self, values: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Returns a slot's values; on TPUs they get the layout of the buffer's entries.

        Otherwise XLA may transpose the whole buffer for a reader that wants another layout.
        """
        return barriers.row_major(tuple(values), self.memory_orders)

    def _entry(self, layer: Any, slot: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if self.is_unrolled:
            return (self.arrays[layer] if self.arrays else ()), (slot,)
        return self.arrays, (slot, layer)

    def _row(self, index: tuple[Any, ...]) -> Any:
        """Finds an entry in an array in the host's memory."""
        slot, *layers = index
        return slot if not layers else slot * self.num_layers + layers[0]

    def _replace(self, layer: Any, arrays: tuple[Any, ...]) -> "SlotBuffer":
        if self.is_unrolled:
            arrays = (*self.arrays[:layer], arrays, *self.arrays[layer + 1 :])
        return self.with_arrays(arrays)


def allocate_slots(
    block: SplitVjp | None,
    name: str,
    kind: Kind,
    *,
    num_slots: int,
    num_layers: int,
    num_chunks: int,
    is_unrolled: bool,
    size_of_x: int,
    on_host: Collection[Place],
    poison: bool,
) -> SlotBuffer:
    """Makes an empty slot buffer.

    Args:
      block: The block whose values it holds; None in forward-only programs.
      name: Which of its values: one of `SLOTS`.
      kind: The block's kind.
      num_slots: The slots; none for a buffer without arrays.
      num_layers: The layers of the kind that a stage has.
      num_chunks: The chunks of a rank that have arrays of their own on the host.
      is_unrolled: Whether each layer gets arrays of its own.
      size_of_x: Bytes of the largest leaf of x.
      on_host: The values that wait in the host's memory.
      poison: Whether the slots start as values that spread, in tests.
    """
    if block is None:
        return SlotBuffer()
    avals = tuple(getattr(block, name))
    buffer = SlotBuffer(
        shapes=tuple(aval.shape for aval in avals),
        memory_orders=_memory_orders(block, name, size_of_x),
        parts=getattr(block, f"{name}_parts", (1,) * len(avals)),
        is_unrolled=is_unrolled,
        num_layers=1 if is_unrolled else num_layers,
    )
    if not num_slots:
        return buffer

    def make(lead: tuple[int, ...], layer: int) -> tuple[Any, ...]:
        return tuple(one(lead, aval, layer, number) for number, aval in enumerate(avals))

    def one(lead: tuple[int, ...], aval: Any, layer: int, number: int) -> Any:
        fill = _poison(aval.dtype) if poison else 0
        if (name, kind, layer, number) not in on_host:
            return jnp.full((*lead, *aval.shape), fill, aval.dtype)
        shape = (math.prod(lead), *host.packed_shape(aval.shape))
        return HostSlots(tuple(host.full(shape, fill, aval.dtype) for _ in range(num_chunks)))

    if is_unrolled:
        return buffer.with_arrays(tuple(make((num_slots,), layer) for layer in range(num_layers)))
    return buffer.with_arrays(make((num_slots, num_layers), 0))


def _memory_orders(block: SplitVjp, name: str, size_of_x: int) -> tuple[MemoryOrder, ...]:
    def of(number: int, aval: Any) -> MemoryOrder:
        if len(aval.shape) < 3 or jnp.issubdtype(aval.dtype, jax.dtypes.extended):
            return None
        if name in STASHES:
            return tuple(range(len(aval.shape)))
        best = getattr(block, f"{name}_orders")[number]
        parts = getattr(block, f"{name}_parts")[number]
        is_small = aval.size * aval.dtype.itemsize <= parts * size_of_x
        return best.dims if is_small or best.is_sure else None

    return tuple(of(number, aval) for number, aval in enumerate(getattr(block, name)))


def lay_out(buffers: PyTree) -> PyTree:
    """Returns a tree; on TPUs the arrays of its slot buffers get their order in memory."""
    is_buffer = lambda node: isinstance(node, SlotBuffer)  # noqa: E731
    nodes, structure = jax.tree.flatten(buffers, is_leaf=is_buffer)
    # In one call: each call becomes a choice between platforms.
    slots = [node for node in nodes if is_buffer(node)]
    placed = iter(
        barriers.row_major(slots, [order for buffer in slots for order in _orders_of(buffer)])
    )
    return jax.tree.unflatten(structure, [next(placed) if is_buffer(n) else n for n in nodes])


def _orders_of(buffer: SlotBuffer) -> list[MemoryOrder]:
    """Lists the memory order of every array: first the dims of slots and layers, then a value's."""
    if not buffer.arrays:
        return []
    layers = buffer.arrays if buffer.is_unrolled else [buffer.arrays]

    def behind(array: jax.Array, order: MemoryOrder) -> MemoryOrder:
        if order is None:
            return None
        lead = array.ndim - len(order)
        return (*range(lead), *(lead + dim for dim in order))

    orders: list[MemoryOrder] = []
    for arrays in layers:
        for array, order in zip(arrays, buffer.memory_orders, strict=True):
            is_here = not isinstance(array, HostSlots)
            orders += [behind(array, order)] if is_here else [None] * len(array.of_chunks)
    return orders


def allocate(avals: PyTree, *lead: int, poison: bool = False) -> PyTree:
    """Makes an array `[*lead, *shape]` for every aval: zeros, or in tests values that spread."""
    return jax.tree.map(
        lambda a: jnp.full((*lead, *a.shape), _poison(a.dtype) if poison else 0, a.dtype), avals
    )


def read(arrays: PyTree, *index: Any) -> PyTree:
    """Reads entry `[*index]` of every array."""

    def one(array: jax.Array) -> jax.Array:
        start = (*index, *(0,) * (array.ndim - len(index)))
        shape = (*(1,) * len(index), *array.shape[len(index) :])
        return lax.dynamic_slice(array, _starts(start), shape).reshape(array.shape[len(index) :])

    return jax.tree.map(one, arrays)


def write(arrays: PyTree, values: PyTree, *index: Any) -> PyTree:
    """Returns the arrays with `values` at entry `[*index]`; in place inside a loop."""

    def one(array: jax.Array, value: jax.Array) -> jax.Array:
        start = (*index, *(0,) * (array.ndim - len(index)))
        update = value.astype(array.dtype).reshape((*(1,) * len(index), *value.shape))
        return lax.dynamic_update_slice(array, update, _starts(start))

    return jax.tree.map(one, arrays, values)


def poison(arrays: PyTree, *index: Any) -> PyTree:
    """Overwrites entry `[*index]` with values that spread, to find reads that come too late."""
    old = read(arrays, *index)
    return write(arrays, jax.tree.map(lambda a: jnp.full_like(a, _poison(a.dtype)), old), *index)


def when(predicate: Any, body: Callable[[Any], Any], carry: Any) -> Any:
    """Returns `body(carry)` if `predicate` holds, else `carry`; unchanged arrays stay in place.

    A loop of one trip or none: XLA copies every array that passes through a `lax.cond`.
    """
    return lax.while_loop(
        lambda loop: loop[0], lambda loop: (jnp.zeros((), bool), body(loop[1])), (predicate, carry)
    )[1]


def _read_parts(array: jax.Array, index: tuple[Any, ...], parts: int) -> jax.Array:
    if parts == 1:
        return read(array, *index)
    rest = array.shape[len(index) + 1 :]
    size = (*(1,) * len(index), array.shape[len(index)] // parts, *rest)

    def part(number: int) -> jax.Array:
        start = _starts((*index, number * size[len(index)], *(0,) * len(rest)))
        return lax.dynamic_slice(array, start, size).reshape(size[len(index) :])

    return jnp.concatenate([part(number) for number in range(parts)])


def _is_on_host(array: Any) -> bool:
    return isinstance(array, HostSlots)


def _poison(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.nan
    return True if dtype == np.bool_ else jnp.iinfo(dtype).max


def _starts(start: Sequence[Any]) -> list[Any]:
    return [jnp.asarray(i, jnp.int32) for i in start]


def bytes_of(avals: PyTree) -> int:
    """Counts the bytes of all arrays of a tree."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(avals))
