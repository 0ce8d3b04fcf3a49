"""Values that wait in the host's memory: sent there, brought back, and how they lie there.

An array is in the host's memory by its type, and passes through loops and barriers as any other. A
value lies there as `[rows, columns]` with columns a multiple of 128 where its size allows it: a
TPU pads the last dim of an array to 128, and the padding would travel too. Where XLA shards a
value by itself, its dims stay as they are.

XLA chooses a layout for every loop; where two loops want one array in different layouts, it copies
the whole array to the device, turns it, and copies it back, in every tick. So every value is
row-major on TPUs where it leaves the device and where it arrives.

On CPUs the host's memory is the device's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dualpipe_jax._executor import barriers

_SPACES = jax.memory.Space
# The width of a TPU's vector register, in which the last dim of an array is padded.
_LANES = 128


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Finds the shape in which a value lies in the host's memory.

    >>> packed_shape((4, 256, 1024)), packed_shape((3, 16, 256, 64)), packed_shape((5, 3))
    ((1024, 1024), (6144, 128), (5, 3))
    """
    size = math.prod(shape)
    if barriers.xla_shards() or not shape or size % _LANES:
        return shape
    columns = shape[-1] if shape[-1] % _LANES == 0 else _LANES
    return size // columns, columns


def padded_bytes(aval: Any) -> int:
    """Counts the bytes that a value takes in the host's memory of a TPU, and on its way there."""
    *rows, columns = packed_shape(aval.shape) or (1,)
    return math.prod(rows) * -(-columns // _LANES) * _LANES * aval.dtype.itemsize


def full(shape: tuple[int, ...], fill: Any, dtype: Any) -> jax.Array:
    """Makes an array in the host's memory; none is made on the device first."""
    return lax.broadcast(jax.device_put(jnp.full((), fill, dtype), _SPACES.Host), shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HostSlots:
    """Holds the slots of one value in the host's memory, packed, `[row, ...]`.

    XLA starts no access to such an array before the one before has ended. So in a program with
    beats each chunk has an array of its own: a beat writes one chunk's values while it reads
    another's.

    Attributes:
      of_chunks: The array of each chunk, or one for all.
    """

    of_chunks: tuple[jax.Array, ...]

    def read(self, row: Any, shape: tuple[int, ...], chunk: int) -> jax.Array:
        """Brings the value of a row, which has this shape, to the device."""
        array = self.of_chunks[chunk % len(self.of_chunks)]
        packed = lax.dynamic_slice_in_dim(array, row, 1).reshape(array.shape[1:])
        return barriers.row_major(jax.device_put(packed, _SPACES.Device)).reshape(shape)

    def write(self, row: Any, value: jax.Array, chunk: int) -> "HostSlots":
        """Returns the slots with a value from the device in a row; in place inside a loop."""

        def put(array: jax.Array) -> jax.Array:
            packed = barriers.row_major(value.reshape(packed_shape(value.shape)))
            there = jax.device_put(packed, _SPACES.Host).reshape(1, *packed.shape)
            return lax.dynamic_update_slice_in_dim(array, there, row, 0)

        return self._change(put, chunk)

    def after(self, value: jax.Array, chunk: int) -> "HostSlots":
        """Has the next write of a chunk come after a value that was read there."""
        return self._change(lambda array: barriers.after(array, value), chunk)

    def poison(self, row: Any, num_rows: int, fill: Any) -> "HostSlots":
        """Overwrites rows of all chunks."""

        def put(array: jax.Array) -> jax.Array:
            dead = full((num_rows, *array.shape[1:]), fill, array.dtype)
            return lax.dynamic_update_slice_in_dim(array, dead, row, 0)

        return HostSlots(tuple(map(put, self.of_chunks)))

    def _change(self, change: Callable[[jax.Array], jax.Array], chunk: int) -> "HostSlots":
        n = chunk % len(self.of_chunks)
        changed = change(self.of_chunks[n])
        return HostSlots((*self.of_chunks[:n], changed, *self.of_chunks[n + 1 :]))
