"""Where a forward keeps an activation function with the contraction that feeds it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import split_vjp

PARAMS = {"up": jnp.ones((4, 8)), "gate": jnp.ones((4, 8)), "down": jnp.ones((8, 4))}


def _gelu(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def _gated(params: Any, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def _plain(params: Any, x: jax.Array) -> jax.Array:
    return jnp.maximum(x @ params["up"], 0) @ params["down"]


def _of_x(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x) @ params["up"] @ params["down"]


def _softmax(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x @ params["up"]) @ params["down"]


@pytest.mark.parametrize(
    ("block", "count"), [(_gelu, 1), (_gated, 1), (_plain, 0), (_of_x, 0), (_softmax, 0)]
)
def test_barriers_of_a_rematerialised_forward(block: Callable[..., Any], count: int) -> None:
    assert _barriers(jax.checkpoint(block)) == count


@pytest.mark.parametrize("block", [_gelu, _gated])
def test_stored_input_needs_none(block: Callable[..., Any]) -> None:
    assert _barriers(block) == 0


def _barriers(block: Callable[..., Any]) -> int:
    x = jnp.ones((2, 4))
    split = split_vjp(lambda params, x, ctx: (x + block(params, x), Aux()), PARAMS, x, ())
    text = str(jax.make_jaxpr(split.forward)(PARAMS, x, ()))
    return text.count("optimization_barrier")
