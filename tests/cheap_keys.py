"""Random keys of a few operations each, for steps with dropout.

With JAX's own, two thirds of the time that a small step with dropout takes to compile go to the
generator, of which each layer has a copy. Which key is folded into which, and so all that a test of
keys looks at, is the same with these. That a step takes JAX's own keys as well is shown by
`test_exact.test_batch_axes` and the tests of Flax's dropout.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl


def _mix(bits: jax.Array) -> jax.Array:
    """Spreads 32 bits: the upper ones change with all, come down, and all change again."""
    bits = bits * jnp.uint32(0x9E3779B1)
    return (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)


def _fold_in(key: jax.Array, data: Any) -> jax.Array:
    # Not symmetric: folding in 1 and then 2 is not folding in 2 and then 1.
    return _mix(_mix(key) + jnp.uint32(data))


def _numbered(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Folds its own index into each entry of `shape`."""
    return _fold_in(key, jnp.arange(math.prod(shape), dtype=jnp.uint32)).reshape(shape)


def _random_bits(key: jax.Array, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
    bits = _numbered(key ^ jnp.uint32(0x9E3779B9), shape)  # others than those of split keys
    if bit_width == 64:
        return bits.astype(jnp.uint64) << 32 | _mix(bits).astype(jnp.uint64)
    return (bits >> (32 - bit_width)).astype(f"uint{bit_width}")


CHEAP = define_prng_impl(
    key_shape=(1,),
    seed=lambda seed: _mix(seed.astype(jnp.uint32) + jnp.uint32(1)).reshape(1),
    split=lambda key, shape: _numbered(key, shape)[..., None],
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="cheap",
    tag="cheap",
)


def make_key(seed: int) -> jax.Array:
    """As `jax.random.key`."""
    return jax.random.key(seed, impl=CHEAP)
