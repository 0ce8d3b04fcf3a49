"""A GPT-style byte-level language model: Flax modules, and the `dpj.Model` made of them.

A batch is int32[batch_size, context + 1]: bytes 0 .. context - 1 are read, 1 .. context predicted.
"""

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dualpipe_jax as dpj

VOCABULARY = 256
_INIT = nn.initializers.normal(0.02)


class Ends(nn.Module):
    """What stands outside the layers: the embedding, tied with the output, and the final norm."""

    width: int
    context: int

    def setup(self) -> None:
        self.bytes = nn.Embed(VOCABULARY, self.width, embedding_init=_INIT)
        self.norm = nn.LayerNorm()

    def embed(self, text: jax.Array) -> jax.Array:
        """Gives int32[batch, length] as float32[batch, length, width]."""
        return self.bytes(text)

    def logits(self, x: jax.Array) -> jax.Array:
        """Gives float32[batch, length, width] as float32[batch, length, VOCABULARY]."""
        return self.bytes.attend(self.norm(x))

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.logits(self.embed(text))


def _causal_bias(heads: int, length: int) -> jax.Array:
    """Makes ALiBi's attention bias (arXiv:2108.12409), float32[heads, length, length].

    Head h sees the past with -slope_h * distance, slope_h = 2^(-8 (h + 1) / heads), and no future.
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1) / heads)
    return jnp.where(distance >= 0, -slopes[:, None, None] * distance, -jnp.inf)


class Block(nn.Module):
    """One layer: causal self-attention and an MLP, each behind a norm and beside a residual."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            attention_fn=functools.partial(
                nn.dot_product_attention, bias=_causal_bias(self.heads, x.shape[1])
            ),
        )
        x = x + attention(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """The sizes of a model, and what follows from them."""

    layers: int
    width: int
    heads: int
    context: int

    @cached_property
    def _ends(self) -> Ends:
        return Ends(width=self.width, context=self.context)

    @cached_property
    def _block(self) -> Block:
        return Block(heads=self.heads)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes parameters: those of the ends, and those of the blocks stacked over the layers."""
        ends_key, blocks_key = jax.random.split(key)
        text = jnp.zeros((1, self.context), jnp.int32)
        x = jnp.zeros((1, self.context, self.width), jnp.float32)
        init_block = jax.vmap(lambda key: self._block.init(key, x)["params"])
        return {
            "ends": self._ends.init(ends_key, text)["params"],
            "blocks": init_block(jax.random.split(blocks_key, self.layers)),
        }

    def embed(self, ends: Any, text: jax.Array) -> jax.Array:
        return self._ends.apply({"params": ends}, text, method="embed")

    def block(self, block_params: Any, x: jax.Array) -> jax.Array:
        return self._block.apply({"params": block_params}, x)

    def logits(self, ends: Any, x: jax.Array) -> jax.Array:
        return self._ends.apply({"params": ends}, x, method="logits")

    def for_pipeline(self) -> dpj.Model:
        """Gives the model as three functions; the loss is in nats a byte."""

        def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
            logits = self.logits(ends, x)
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, ctx.microbatch[:, 1:]
            ).mean()

        return dpj.Model(
            embed=lambda ends, ctx: self.embed(ends, ctx.microbatch[:, :-1]),
            block=lambda block_params, x, ctx: self.block(block_params, x),
            head=head,
        )
