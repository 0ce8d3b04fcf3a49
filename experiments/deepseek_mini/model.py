"""A small model of DeepSeek-V3's shape: parameters, and the `dpj.Model` made of its modules.

DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437), section 2. Bytes are the tokens. A
window of context + 1 of them is a row: the first `context` are read, the next ones predicted.
"""

import functools
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

import dualpipe_jax as dpj
from experiments.deepseek_mini import routing
from experiments.deepseek_mini.layers import LatentAttention, Layer, MixtureOfExperts, SwiGlu, dense

VOCABULARY = 256  # bytes


class Ends(nn.Module):
    """The parameters outside the layers: embedding, output, and multi-token prediction.

    Attributes:
      width: The size of the residual stream.
      layer: The transformer block of the prediction of the token after the next, a dense one.
      vocabulary: Its size.
      dtype: The dtype of the compute.
    """

    width: int
    layer: nn.Module
    vocabulary: int = VOCABULARY
    dtype: Any = None

    def setup(self) -> None:
        init = nn.initializers.normal(0.02)
        self.embedding = nn.Embed(
            self.vocabulary, self.width, embedding_init=init, dtype=self.dtype
        )
        self.norm = nn.RMSNorm(dtype=self.dtype)
        self.output = dense(self.vocabulary, name="output", dtype=self.dtype)
        self.hidden_norm = nn.RMSNorm(dtype=self.dtype)
        self.next_norm = nn.RMSNorm(dtype=self.dtype)
        self.projection = dense(self.width, name="projection", dtype=self.dtype)
        self.deeper_norm = nn.RMSNorm(dtype=self.dtype)

    def embed(self, text: jax.Array) -> jax.Array:
        """Maps int32[rows, length] to [rows, length, width]."""
        return self.embedding(text)

    def losses(self, x: jax.Array, text: jax.Array) -> dict[str, jax.Array]:
        """Gives the mean losses of the next token, and of the one after it.

        Section 2.2, equations 21 to 25, for depth 1: position i has of the layers h_i, and of the
        text t_{i+1}, the next token; it predicts t_{i+2}:

            h'_i = M [norm(h_i); norm(Emb(t_{i+1}))],  h^1 = block(h'),  P = softmax(Out(h^1_i))

        Args:
          x: [rows, length, width], h.
          text: int32[rows, length + 1].
        """
        following = text[:, 1:]
        deeper = jnp.concatenate(
            [self.hidden_norm(x), self.next_norm(self.embedding(following))], axis=-1
        )
        deeper = self.layer(self.projection(deeper))
        main = self._losses(self.norm(x), following)
        # The last position's token is beyond the window.
        mtp = self._losses(self.deeper_norm(deeper)[:, :-1], following[:, 1:])
        return {"main": main.mean(), "mtp": mtp.mean()}

    def _losses(self, x: jax.Array, labels: jax.Array) -> jax.Array:
        logits = self.output(x)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def __call__(self, text: jax.Array) -> dict[str, jax.Array]:
        return self.losses(self.embed(text[:, :-1]), text)


@dataclass(frozen=True, kw_only=True)
class DeepSeekMini:
    """A model of given sizes: its parameters, and the functions of them.

    Attributes:
      dense_layers: The first ones.
      expert_layers: Those behind them.
      width: The size of the residual stream.
      heads: The number of attention heads.
      head_size: Without position.
      rotary_size: With.
      latent_size: The size of the latent behind keys and values.
      query_latent_size: The size of the latent behind queries.
      hidden: The hidden units of a dense layer's feed-forward network.
      experts: Routed ones of an expert layer.
      chosen: Routed ones a token.
      expert_hidden: The hidden units of each of them, and of the shared one.
      scale: The factor of the gates.
      balance_loss: The sequence-wise balance loss's factor.
      mtp_weight: The factor of the loss of multi-token prediction, the report's lambda.
      capacity_factor: As of `MixtureOfExperts`.
      vocabulary: Tokens there are.
      dtype: The dtype of the compute.
    """

    dense_layers: int = 1
    expert_layers: int = 5
    width: int = 64
    heads: int = 4
    head_size: int = 16
    rotary_size: int = 8
    latent_size: int = 32
    query_latent_size: int = 48
    hidden: int = 192
    experts: int = 8
    chosen: int = 2
    expert_hidden: int = 48
    scale: float = 1.0
    balance_loss: float = 1e-4
    mtp_weight: float = 0.3
    capacity_factor: float | None = None
    vocabulary: int = VOCABULARY
    dtype: Any = None

    @property
    def layout(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return ("dense",) * self.dense_layers + ("experts",) * self.expert_layers

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Makes parameters, those of each kind of layer stacked."""
        ends_key, *keys = jax.random.split(key, 3)
        x = jnp.zeros((1, 2, self.width), jnp.float32)
        blocks = {}
        for kind, kind_key in zip(("dense", "experts"), keys, strict=True):
            if count := self.layout.count(kind):
                init = functools.partial(self._layer(kind).init, x=x)
                blocks[kind] = jax.vmap(init)(jax.random.split(kind_key, count))["params"]
        text = jnp.zeros((1, 3), jnp.int32)
        return {"ends": self._ends.init(ends_key, text)["params"], "blocks": blocks}

    def for_pipeline(self, axis: str | None = None, *, is_ragged: bool = False) -> dpj.Model:
        """Gives the model as functions of a batch of windows; losses are in nats a token.

        Args:
          axis: The mesh axis of the experts, over which the rows of the batch are spread too; None
            for all experts on one device.
          is_ragged: Whether dropless exchanges are ragged (`dispatch.has_ragged`).
        """

        def block_of(kind: str) -> Any:
            layer = self._layer(kind, axis, is_ragged=is_ragged)
            return lambda params, x, ctx: layer.apply({"params": params}, x)

        def embed(ends: Any, ctx: dpj.Context) -> Any:
            return self._ends.apply({"params": ends}, ctx.microbatch[:, :-1], method="embed")

        def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> Any:
            variables = {"params": ends}
            losses: Any = self._ends.apply(variables, x, ctx.microbatch, method="losses")
            return losses["main"] + self.mtp_weight * losses["mtp"], losses

        return dpj.Model(
            embed=embed,
            block={kind: block_of(kind) for kind in dict.fromkeys(self.layout)},
            head=head,
            has_aux=True,
            layout=self.layout,
        )

    def param_specs(self, params: Any, axis: str) -> Any:
        """Gives the specs of parameters over the axis of the experts: their kernels by expert."""

        def spec(path: Any, leaf: Any) -> PartitionSpec:
            is_routed = _names(path)[-3:-1] in [
                ("feed_forward", name) for name in ("gate", "up", "down")
            ]
            return PartitionSpec(None, axis) if is_routed and leaf.ndim == 4 else PartitionSpec()

        return jax.tree_util.tree_map_with_path(spec, params)

    def flops_per_token(self, context: int) -> float:
        """Counts forward and backward, the chosen experts alone (arXiv:2204.02311, appendix B)."""
        shapes = jax.eval_shape(self.init, jax.random.key(0))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        unused = (self.experts - self.chosen) * 3 * self.width * self.expert_hidden
        num_params -= self.expert_layers * unused
        # One more layer is that of the multi-token prediction.
        attention = (len(self.layout) + 1) * self.heads * (2 * self.head_size + self.rotary_size)
        return 6 * num_params + 6 * attention * context

    def _layer(self, kind: str, axis: str | None = None, *, is_ragged: bool = False) -> Layer:
        attention = LatentAttention(
            heads=self.heads,
            head_size=self.head_size,
            rotary_size=self.rotary_size,
            latent_size=self.latent_size,
            query_latent_size=self.query_latent_size,
            dtype=self.dtype,
        )
        feed_forward: nn.Module = SwiGlu(self.hidden, self.dtype)
        if kind == "experts":
            feed_forward = MixtureOfExperts(
                experts=self.experts,
                chosen=self.chosen,
                hidden=self.expert_hidden,
                scale=self.scale,
                balance_loss=self.balance_loss,
                capacity_factor=self.capacity_factor,
                axis=axis,
                is_ragged=is_ragged,
                dtype=self.dtype,
            )
        return Layer(attention, feed_forward, self.dtype)

    @property
    def _ends(self) -> Ends:
        return Ends(self.width, self._layer("dense"), self.vocabulary, self.dtype)


def is_trained(params: Any) -> Any:
    """Says for every parameter whether it is trained: all but the biases of the routers."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] != "bias", params)


def balance(params: Any, load: jax.Array, *, rate: jax.Array | float) -> Any:
    """Updates the biases of the routers by the loads of a step, int32[expert layers, experts]."""

    def update(path: Any, leaf: jax.Array) -> jax.Array:
        if _names(path)[-1] != "bias":
            return leaf
        return routing.balanced(leaf, load, rate=rate)

    return jax.tree_util.tree_map_with_path(update, params)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(key.key for key in path)
