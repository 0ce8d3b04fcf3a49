"""A small model of Linen modules, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import dualpipe_jax as dpj

WIDTH, VOCABULARY, LENGTH, ROWS, LAYERS = 4, 7, 3, 2, 4
Float = {"param_dtype": jnp.float64, "dtype": jnp.float64}


class Layer(nn.Module):
    """A residual layer; its kernel is boxed, with names, where `names` are given."""

    rate: float = 0.0
    hidden: int = 6
    names: tuple[Any, ...] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool = False) -> jax.Array:
        init = nn.initializers.normal(0.5)
        if self.names is not None:
            init = nn.with_partitioning(init, self.names)
        h = nn.Dense(self.hidden, kernel_init=init, **Float)(nn.LayerNorm(**Float)(x))
        h = nn.Dropout(self.rate)(nn.gelu(h), deterministic=deterministic)
        return x + nn.Dense(WIDTH, **Float)(h)


class Model(nn.Module):
    """A model as one writes it in Flax: layers by name, the embedding used twice."""

    num_layers: int = LAYERS
    names: tuple[Any, ...] | None = None

    def setup(self) -> None:
        self.embedding = nn.Embed(VOCABULARY, WIDTH, **Float)
        self.layers = [Layer(names=self.names) for _ in range(self.num_layers)]
        self.norm = nn.LayerNorm(**Float)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding(tokens)

    def head(self, x: jax.Array) -> jax.Array:
        return self.embedding.attend(self.norm(x))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def tokens_of(num_rows: int) -> jax.Array:
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, size=(num_rows, LENGTH))
    return jnp.asarray(tokens)


def loss_of(logits: Any, tokens: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def mesh_of(num_ranks: int = 2) -> jax.sharding.Mesh:
    return jax.make_mesh((num_ranks,), ("pipe",), devices=jax.devices()[:num_ranks])


def three_modules(**options: Any) -> Any:
    parts: Any = {
        "embed": nn.Embed(VOCABULARY, WIDTH, **Float),
        "block": Layer(),
        "head": nn.Dense(VOCABULARY, **Float),
        "loss": loss_of,
    }
    return dpj.linen.model(**{**parts, **options})


class Normalised(nn.Module):
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=self.frozen, **Float)(x)
