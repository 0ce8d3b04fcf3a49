"""A GPT-style byte-level language model: Flax modules, and the `dpj.Model` made of them.

Decoder-only, pre-norm, with tied embeddings. Positions are ALiBi's (arXiv:2108.12409), which take
no parameters and, in a run this short, learn from the nearest bytes far sooner than an embedding.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import dualpipe_jax as dpj

VOCABULARY = 256  # bytes


class Ends(nn.Module):
    """The parameters outside the layers: the embedding, which is also the output, and a norm."""

    width: int
    vocabulary: int = VOCABULARY
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(
            self.vocabulary, self.width, embedding_init=init, dtype=self.dtype
        )
        self.norm = nn.LayerNorm(dtype=self.dtype)

    def embed(self, text: jax.Array) -> jax.Array:
        """Maps int32[batch, length] to dtype[batch, length, width]."""
        return self.embedding(text)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps dtype[batch, length, width] to float32[batch, length, vocabulary]."""
        return self.embedding.attend(self.norm(x)).astype(jnp.float32)

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.logits(self.embed(text))


class Block(nn.Module):
    """One layer: causal self-attention, then an MLP, each behind a norm and beside a residual."""

    heads: int
    dtype: Any = jnp.float32
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        drop = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))
        width, bias = x.shape[-1], _causal_bias(heads=self.heads, length=x.shape[-2])
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.heads,
            dtype=self.dtype,
            attention_fn=functools.partial(nn.dot_product_attention, bias=bias),
        )
        norm, dense = (functools.partial(c, dtype=self.dtype) for c in (nn.LayerNorm, nn.Dense))
        attended: Any = attention(norm()(x))
        x = x + drop(attended)
        hidden = nn.gelu(dense(4 * width)(norm()(x)))
        return x + drop(dense(width)(hidden))


def _causal_bias(*, heads: int, length: int) -> jax.Array:
    """Makes the bias of attention's logits, float32[heads, length, length].

    To query i, key j is worth -(i - j) 2^(-8 (h + 1) / heads) in head h if j <= i, else nothing.
    """
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1, dtype=jnp.float32) / heads)
    return jnp.where(distance >= 0, -slopes[:, None, None] * distance, -jnp.inf)


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """A model of given sizes: its parameters, in float32, and the functions of them."""

    layers: int
    width: int
    heads: int
    vocabulary: int = VOCABULARY
    dtype: Any = jnp.float32
    dropout: float = 0.0

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes parameters, those of the blocks stacked over the layers."""
        ends_key, blocks_key = jax.random.split(key)
        x = jnp.zeros((1, 1, self.width), jnp.float32)
        init_block = jax.vmap(lambda key: Block(heads=self.heads).init(key, x)["params"])
        return {
            "ends": self._ends.init(ends_key, jnp.zeros((1, 1), jnp.int32))["params"],
            "blocks": init_block(jax.random.split(blocks_key, self.layers)),
        }

    def for_pipeline(self) -> dpj.Model:
        """Gives the model as functions of a batch of windows; the loss is in nats a byte.

        Of a window of context + 1 bytes the first `context` are read and the last ones predicted.
        """

        def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
            logits, labels = self._logits(ends, x), ctx.microbatch[:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        return dpj.Model(
            embed=lambda ends, ctx: self._embed(ends, ctx.microbatch[:, :-1]),
            block=lambda block_params, x, ctx: self._block(block_params, x, ctx.rng),
            head=head,
        )

    def output(self, ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        """Gives the logits of a microbatch, float32[rows, context, vocabulary], for `dpj.apply`."""
        return self._logits(ends, x)

    def flops_per_token(self, context: int) -> float:
        """Counts forward and backward of the model (PaLM, arXiv:2204.02311, appendix B)."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        return 6 * num_params + 12 * self.layers * self.width * context

    @property
    def _ends(self) -> Ends:
        return Ends(width=self.width, vocabulary=self.vocabulary, dtype=self.dtype)

    def _embed(self, ends: Any, text: jax.Array) -> Any:
        return self._ends.apply({"params": ends}, text, method="embed")

    def _block(self, block_params: Any, x: jax.Array, rng: jax.Array | None) -> Any:
        block = Block(heads=self.heads, dtype=self.dtype, dropout=self.dropout)
        rngs = {} if rng is None else {"dropout": rng}
        return block.apply({"params": block_params}, x, rngs=rngs)

    def _logits(self, ends: Any, x: jax.Array) -> Any:
        return self._ends.apply({"params": ends}, x, method="logits")
