"""A model continues a text, byte by byte, by the pipeline's forward: no device holds all layers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TEMPERATURE = 0.8


def continue_text(
    logits: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    prompt: bytes,
    *,
    num_bytes: int,
    context: int,
    rows: int,
    seed: int,
) -> str:
    """Continues a prompt; each byte sees the last `context` ones.

    Args:
      logits: Maps parameters and windows, int32[rows, context + 1], to the logits of the bytes
        after the first `context` of each, float32[rows, context, 256].
      params: The parameters.
      prompt: At least a byte.
      num_bytes: By how many it is continued.
      context: Bytes of a window.
      rows: Rows that `logits` takes; all are the same.
      seed: Of the draws.
    """
    end = len(prompt) + num_bytes
    text = np.zeros(max(end, context + 1), np.int32)
    text[: len(prompt)] = np.frombuffer(prompt, np.uint8)

    @jax.jit
    def run(params: Any, text: jax.Array, key: jax.Array) -> jax.Array:
        def add_byte(index: jax.Array, text: jax.Array) -> jax.Array:
            # The model is causal: bytes of the window from `index` on change nothing.
            start = jnp.maximum(index - context, 0)
            window = jax.lax.dynamic_slice(text, (start,), (context,))
            windows = jnp.broadcast_to(jnp.pad(window, (0, 1)), (rows, context + 1))
            everywhere = jax.sharding.reshard(logits(params, windows), jax.P())
            scores = everywhere[0, index - 1 - start]
            byte = jax.random.categorical(jax.random.fold_in(key, index), scores / TEMPERATURE)
            return text.at[index].set(byte)

        return jax.lax.fori_loop(len(prompt), end, add_byte, text)

    text = run(params, text, jax.random.key(seed))
    return bytes(np.asarray(text[:end], np.uint8)).decode(errors="replace")
