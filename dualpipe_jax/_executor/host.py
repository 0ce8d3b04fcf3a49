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


def to_host(value: jax.Array) -> jax.Array:
    """Sends a value to the host's memory, packed."""
    packed = barriers.row_major(value.reshape(packed_shape(value.shape)))
    return jax.device_put(packed, _SPACES.Host)


def from_host(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Brings a packed value of this shape back to the device."""
    return barriers.row_major(jax.device_put(packed, _SPACES.Device)).reshape(shape)


def full(shape: tuple[int, ...], fill: Any, dtype: Any) -> jax.Array:
    """Makes an array in the host's memory; none is made on the device first."""
    return lax.broadcast(jax.device_put(jnp.full((), fill, dtype), _SPACES.Host), shape)
