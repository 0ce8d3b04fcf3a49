"""Random blocks: operations drawn over a pool of values, calls nested at random."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.split_vjp import checks
from tests.split_vjp.checks import D, T, array

UNARY = [jnp.tanh, jnp.sin, lambda a: a[::-1], lambda a: jnp.sort(a, -1), lax.stop_gradient]
BINARY = [jnp.add, jnp.multiply, jnp.maximum, lambda a, b: a @ b.T @ b / T]
WRAPS = [lambda fn: fn, jax.jit, jax.checkpoint]


def draw_block(rng: np.random.Generator, num_steps: int, depth: int = 2) -> Any:
    """Draws a function `(weights, values [T, D]) -> [T, D]` that gives the same in every trace."""
    steps: list[Any] = []
    for _ in range(num_steps):
        kind = rng.choice(["unary", "binary", "weight", "weight", "bias", "call", "scan", "cond"])
        inner: Any = None
        if kind in ("call", "scan", "cond"):
            if not depth:
                continue
            inner = WRAPS[rng.integers(len(WRAPS))](draw_block(rng, 3, depth - 1))
        steps.append((kind, inner, *rng.integers(1 << 16, size=3)))

    def run(weights: list, values: list) -> Any:
        values = list(values)
        for kind, inner, i, j, k in steps:
            a, b = values[i % len(values)], values[j % len(values)]
            w = weights[k % len(weights)]
            if kind == "unary":
                value = UNARY[k % len(UNARY)](a)
            elif kind == "binary":
                value = BINARY[k % len(BINARY)](a, b)
            elif kind == "weight":
                value = a @ w
            elif kind == "bias":
                value = a + jnp.tanh(w)[k % D]
            elif kind == "call":
                value = inner(weights, [a, b])
            elif kind == "cond":
                value = choose(inner, weights, a, b)
            else:
                value = scan(inner, weights, a, b)
            values.append(value)
        return values[-1] + values[len(values) // 2]

    return run


def scan(inner: Any, weights: list, start: Any, rows: Any) -> Any:
    """Runs `inner` once for each row, on its result for the rows before."""

    def body(h: Any, row: Any) -> tuple[Any, Any]:
        return jnp.tanh(inner(weights, [h, rows + row])), h.sum()

    return lax.scan(body, start, rows)[0]


def choose(inner: Any, weights: list, a: Any, b: Any) -> Any:
    """Runs `inner` on one operand or another, or not at all."""
    return lax.switch(
        jnp.argmax(jnp.abs(a).sum(-1)) + 1,
        [
            lambda: inner(weights, [a, b]),
            lambda: inner(weights[::-1], [b, jnp.sin(a)]),
            lambda: a + jnp.tanh(weights[0])[1],
        ],
    )


@pytest.mark.parametrize("seed", range(16))
def test_equals_vjp(seed):
    fn = draw_block(np.random.default_rng(seed), 8)
    wrap = WRAPS[seed % len(WRAPS)]
    block = wrap(lambda params, x, ctx: (fn(params, [x[0], x[1], ctx]), x[0] + x[1] @ params[0]))
    params, x = [array(D, D, seed=i) for i in range(3)], (array(T, D), array(T, D, seed=1))
    ctx = array(T, D, seed=2)
    # Deeper than other blocks: 1e-11 of the largest entry is still only the order of sums.
    checks.assert_equals_vjp(block, params, x, ctx, rtol=1e-11)
