"""Splits `scan`: dx in one loop, the weight gradients in another."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.split_vjp import checks
from tests.split_vjp.blocks import RNN, STACK, rnn, stack
from tests.split_vjp.checks import D, X


def with_(block, **kwargs):
    return lambda params, x, ctx: block(params, x, ctx, **kwargs)


def nested(params, x, ctx, *, wrap=lambda body: body):
    """Scans over repetitions of a scan over layers."""

    def inner(h, layer):
        return h + jnp.sin(h @ layer["w"] + layer["b"]), h.sum()

    def outer(h, scale):
        h, sums = lax.scan(wrap(inner), scale * h, params["stack"])
        return h * params["gain"], sums

    h, sums = lax.scan(wrap(outer), x, jnp.arange(1.0, 3.0))
    return h + sums.sum() * params["gain"]


def carry_of_both(params, x, ctx):
    """Carries a parameter beside x, and lets it change."""

    def body(carry, scale):
        h, w = carry
        return (jnp.tanh(h @ w), 1.1 * w + scale * params["u"]), None

    (h, w), _ = lax.scan(body, (x, params["w"]), jnp.arange(3.0))
    return h + w[0]


def carry_of_one(params, x, ctx):
    """Carries one array that mixes x and parameters."""

    def body(h, _):
        return jnp.tanh(h[:, ::-1] * 0.9), None

    both = jnp.concatenate([x @ params["w"], jnp.broadcast_to(params["b"], x.shape)], axis=1)
    return lax.scan(body, both, None, length=3)[0][:, :D]


def scalar_carries(params, x, ctx):
    """Carries scalars that start as constants, the same one twice, between others."""

    def body(carry, layer):
        total, h, count, again, sums = carry
        h = jnp.tanh(h @ layer["w"] * (1 + again) + layer["b"] * count)
        total = total + h.sum()
        return (total, h, count + 1.0, again * 0.5 + total * 0.1, sums + h.sum(0)), again * h

    carry = (0.0, x, 0.0, 0.0, jnp.zeros(D))
    (total, h, _, again, sums), ys = lax.scan(body, carry, params)
    return h * again + total + sums + ys.sum(0)


def same_array_twice(params, x, ctx):
    """Gives a loop the same array as constant, carry and scanned input."""

    def body(carry, row):
        h, g = carry
        return (jnp.sin(h @ params["w"]) + row, g * h.mean() + x.sum()), row @ params["u"]

    (h, g), ys = lax.scan(body, (x, x), x)
    return h + g + ys


def alternating(params, x, ctx):
    """Chooses a branch in every iteration."""

    def body(h, layer):
        index, w = layer
        return lax.cond(index % 2 == 0, lambda: jnp.tanh(h @ w), lambda: h + w[0]), None

    return lax.scan(body, x, (jnp.arange(5), params["w"]))[0]


def from_zeros(params, x, ctx):
    """Sums in a loop that starts from zeros, as attention in blocks does."""

    def body(carry, row):
        best, total = carry
        score = x @ params["w"] @ row
        new = jnp.maximum(best, score)
        total = total * jnp.exp(best - new)[:, None] + jnp.exp(score - new)[:, None] * row
        return (new, total), None

    start = jnp.full(x.shape[:1], -1e9), jnp.zeros_like(x)
    return lax.scan(body, start, x @ params["u"])[0][1]


CASES = {
    "time": (rnn, RNN),
    "time, reverse": (with_(rnn, reverse=True), RNN),
    "time, unrolled": (with_(rnn, unroll=2), RNN),
    "time, checkpointed body": (with_(rnn, wrap=jax.checkpoint), RNN),
    "time, checkpoint of all": (jax.checkpoint(rnn), RNN),
    "layers": (stack, STACK),
    "layers, reverse": (with_(stack, reverse=True), STACK),
    "layers, checkpointed body": (with_(stack, wrap=jax.checkpoint), STACK),
    "layers, checkpoint of both": (jax.checkpoint(with_(stack, wrap=jax.checkpoint)), STACK),
    "layers, jitted body": (with_(stack, wrap=jax.jit), STACK),
    "no iteration": (stack, {"w": jnp.zeros((0, D, D)), "b": jnp.zeros((0, D))}),
    "one iteration": (stack, {"w": STACK["w"][:1], "b": STACK["b"][:1]}),
    "layers, one leaf frozen": (
        lambda p, x, c: stack({**p, "w": lax.stop_gradient(p["w"])}, x, c),
        STACK,
    ),
    "nested": (nested, {"stack": STACK, "gain": jnp.float64(0.3)}),
    "nested, checkpointed bodies": (
        with_(nested, wrap=jax.checkpoint),
        {"stack": STACK, "gain": jnp.float64(0.3)},
    ),
    "carry of both": (carry_of_both, RNN),
    "carry of one": (carry_of_one, RNN),
    "scalar carries": (scalar_carries, STACK),
    "same array twice": (same_array_twice, RNN),
    "alternating": (alternating, STACK),
    "from zeros": (from_zeros, RNN),
    "fori_loop": (
        lambda p, x, c: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"] + i), x),
        RNN,
    ),
    "map": (lambda p, x, c: lax.map(lambda row: jnp.tanh(p["w"] @ row), x), RNN),
    "associative_scan": (
        lambda p, x, c: lax.associative_scan(jnp.multiply, jnp.tanh(x @ p["w"])),
        RNN,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_vjp(case):
    block, params = CASES[case]
    parts = checks.assert_equals_vjp(block, params, X)
    counted = sum(checks.count_parts("dot_general", parts, params, X))
    assert counted == checks.count_vjp("dot_general", block, params, X)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # Per iteration: 2 dots forward; dh and dx; dW and dU.
        ("time", [6, 6, 6]),
        ("time, reverse", [6, 6, 6]),
        ("layers", [5, 5, 5]),
        ("layers, reverse", [5, 5, 5]),
        ("layers, jitted body", [5, 5, 5]),
        # Recomputed once.
        ("layers, checkpointed body", [5, 10, 5]),
        ("nested", [10, 10, 10]),
    ],
)
def test_weight_gradients_leave_the_loop_of_dx(case, expected):
    block, params = CASES[case]
    parts = checks.split(block, params, X)
    assert checks.count_parts("dot_general", parts, params, X) == expected


def test_keeps_activations_only():
    for case in ("time", "layers", "layers, checkpointed body", "scalar carries"):
        block, params = CASES[case]
        parts = checks.split(block, params, X)
        # Neither weights nor their gradients, per iteration or not.
        assert all(a.shape[-2:] != (D, D) for a in checks.passed_on(parts)), case
    parts = checks.split(CASES["layers, checkpointed body"][0], STACK, X)
    residuals = [*parts.residual, *parts.weight_residual]
    assert [a.shape for a in residuals] == [(5, *X.shape)]


def test_an_unused_stack_has_no_gradient():
    params = {"used": STACK, "unused": STACK}
    parts = checks.assert_equals_vjp(lambda p, x, c: stack(p["used"], x, c), params, X)
    assert parts.has_grad == (False, False, True, True)
