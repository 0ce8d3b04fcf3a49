"""A batch, a loss and a mesh for published models, which bring their own layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, LENGTH, ROWS = 11, 6, 8


def make_batch() -> dict[str, jax.Array]:
    """Makes tokens, and a mask of those that are no padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCABULARY, size=(ROWS, LENGTH))
    lengths = rng.integers(2, LENGTH + 1, size=(ROWS, 1))
    return {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(np.arange(LENGTH) < lengths, int)}


def loss_of(logits: jax.Array, batch: Any) -> jax.Array:
    tokens = batch["tokens"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:])
    return losses.mean()


def mesh_of() -> jax.sharding.Mesh:
    return jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
