"""Which experts a token goes to, with which gates, and how their loads are kept even.

DeepSeek-AI, "DeepSeek-V3 Technical Report" (arXiv:2412.19437), section 2.1.2. Token t has the
affinity s_it = sigmoid(u_t . e_i) to expert i.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Routing(NamedTuple):
    """The choice for each token.

    Attributes:
      experts: int32[tokens, chosen], each token's experts, all different.
      gates: [tokens, chosen], the factors of their outputs.
    """

    experts: jax.Array
    gates: jax.Array


def route(affinities: jax.Array, bias: jax.Array, *, num_chosen: int, scale: float) -> Routing:
    """Chooses experts by affinity and bias, with gates of affinity alone (equations 13 and 16).

    Args:
      affinities: [tokens, experts].
      bias: [experts], added for the choice only; it has no gradient.
      num_chosen: Experts a token.
      scale: By which the gates, which add up to 1 over a token's experts, are multiplied.
    """
    _, experts = lax.top_k(lax.stop_gradient(affinities + bias), num_chosen)
    is_chosen = jax.nn.one_hot(experts, affinities.shape[-1], dtype=affinities.dtype)
    chosen = jnp.einsum("tke,te->tk", is_chosen, affinities)
    # g_it = s_it / sum over the chosen of s_jt
    return Routing(experts, scale * chosen / chosen.sum(-1, keepdims=True))


def loads(routing: Routing, num_experts: int) -> jax.Array:
    """Counts the tokens of each expert, int32[experts]."""
    return jax.nn.one_hot(routing.experts, num_experts, dtype=jnp.int32).sum(
        (0, 1), dtype=jnp.int32
    )


def sequence_loss(affinities: jax.Array, *, num_chosen: int) -> jax.Array:
    """Makes the sequence-wise balance loss of one microbatch, a scalar (equations 17 to 20).

    The share of a sequence's tokens among whose most affine experts i is (the bias has no part in
    it) times its mean affinity, where a token's affinities add up to 1; 1 if all are alike. The
    mean over sequences; to be multiplied by a small factor.

    Args:
      affinities: [sequences, length, experts].
      num_chosen: Experts a token.
    """
    num_experts = affinities.shape[-1]
    _, experts = lax.top_k(lax.stop_gradient(affinities), num_chosen)
    is_top = jax.nn.one_hot(experts, num_experts, dtype=affinities.dtype).sum(-2)
    # f_i = experts / (chosen T) sum_t [s_it in top k];  P_i = 1/T sum_t s_it / sum_j s_jt
    f = is_top.mean(-2) * (num_experts / num_chosen)
    p = (affinities / affinities.sum(-1, keepdims=True)).mean(-2)
    return (f * p).sum(-1).mean()


def balanced(bias: jax.Array, load: jax.Array, *, rate: jax.Array | float) -> jax.Array:
    """Moves the bias up where an expert had less than the mean load, down where it had more.

    Section 2.1.2, "Auxiliary-Loss-Free Load Balancing": by `rate` each, whatever the difference.

    Args:
      bias: [..., experts].
      load: [..., experts], tokens of a step.
      rate: The report's gamma.
    """
    load = load.astype(bias.dtype)
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)
