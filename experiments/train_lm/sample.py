"""A model continues a text, byte by byte, in plain JAX without a pipeline."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .model import LanguageModel

TEMPERATURE = 0.8


def continue_text(
    model: LanguageModel,
    params: Any,
    prompt: bytes,
    *,
    num_bytes: int,
    context: int,
    seed: int,
) -> str:
    """Continues `prompt`, at least a byte, by `num_bytes`; sees the last `context` at each."""
    end = len(prompt) + num_bytes
    text = np.zeros(max(end, context), np.int32)
    text[: len(prompt)] = np.frombuffer(prompt, np.uint8)

    @jax.jit
    def run(params: Any, text: jax.Array, key: jax.Array) -> jax.Array:
        def add_byte(index: jax.Array, text: jax.Array) -> jax.Array:
            # The model is causal: bytes of the window from `index` on change nothing.
            start = jnp.maximum(index - context, 0)
            window = jax.lax.dynamic_slice(text, (start,), (context,))
            logits = model.logits(params, window[None])[0, index - 1 - start]
            byte = jax.random.categorical(jax.random.fold_in(key, index), logits / TEMPERATURE)
            return text.at[index].set(byte)

        return jax.lax.fori_loop(len(prompt), end, add_byte, text)

    text = run(params, text, jax.random.key(seed))
    return bytes(np.asarray(text[:end], np.uint8)).decode(errors="replace")
