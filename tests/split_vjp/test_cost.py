"""Which functions count as look-ups: so little work that every rank may as well do it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dualpipe_jax._split_vjp import is_look_up

TABLE = jax.ShapeDtypeStruct((7, 4), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 3), jnp.int32)
ROWS = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)


def dropped(table: Any, tokens: Any) -> Any:
    return table[tokens] * jax.random.bernoulli(jax.random.key(0), 0.5, ROWS.shape)


def printed(table: Any, tokens: Any) -> Any:
    jax.debug.print("{}", tokens)
    return table[tokens]


def called_back(table: Any, tokens: Any) -> Any:
    return jax.pure_callback(lambda rows: rows, ROWS, table[tokens])


@pytest.mark.parametrize(
    ("embed", "expected"),
    [
        (lambda table, tokens: table[tokens], True),
        (lambda table, tokens: jnp.tanh(jnp.take(table, tokens, axis=0)) * 2, True),
        (lambda table, tokens: table[tokens] + table[jnp.arange(3)], True),
        (jax.jit(jax.checkpoint(lambda table, tokens: table[tokens])), True),
        (lambda table, tokens: table[tokens] @ table.T, False),
        (lambda table, tokens: jax.nn.one_hot(tokens, 7) @ table, False),
        (lambda table, tokens: lax.scan(lambda c, t: (c, table[t]), 0, tokens)[1], False),
        (dropped, False),
        (printed, False),
        (called_back, False),
    ],
)
def test_look_ups(embed: Callable[..., Any], expected: bool) -> None:
    assert is_look_up(embed, TABLE, TOKENS) == expected
