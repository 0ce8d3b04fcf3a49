"""Blocks of every kind: the split equals `jax.vjp`, and computes no dot twice."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.split_vjp import checks
from tests.split_vjp.checks import D, T, V, W, X, array


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.custom_vjp
def twice_the_gradient(x, w):
    return jnp.tanh(x @ w)


twice_the_gradient.defvjp(
    lambda x, w: (jnp.tanh(x @ w), (x, w, jnp.tanh(x @ w))),
    lambda kept, g: (
        2 * (g * (1 - kept[2] ** 2)) @ kept[1].T,
        2 * kept[0].T @ (g * (1 - kept[2] ** 2)),
    ),
)


@jax.custom_jvp
def smooth_step(x):
    return jnp.where(x > 0, 1.0, 0.0)


smooth_step.defjvp(lambda primals, tangents: (smooth_step(*primals), tangents[0] * jnp.exp(-1.0)))


@jax.custom_vjp
def attach_loss(y, loss):
    """Gives `loss` a gradient of its own, as mixtures of experts balance their load."""
    return y


attach_loss.defvjp(lambda y, loss: (y, None), lambda _, g: (g, jnp.float64(0.01)))


@jax.custom_vjp
def double_and_count(x, n):
    return 2 * x, n + 1


# The integer comes back with a cotangent, of the dtype float0.
double_and_count.defvjp(lambda x, n: (double_and_count(x, n), None), lambda _, g: (2 * g[0], None))


def counted(p, x, c):
    y, n = double_and_count(x @ p["w"], jnp.argmax(x, -1))
    return (y * n[:, None]) @ p["v"]


KEY = jax.random.key(0)


# Typed as Any: newer releases of JAX declare the result to take one argument.
own_gradient: Any = jax.custom_gradient(lambda w, a: (a @ w, lambda g: (2 * a.T @ g, 3 * g @ w.T)))


@jax.custom_vjp
def clip_gradient(x):
    return x


clip_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.5, 0.5),))

IDENTITY = lambda params, x, ctx: x  # noqa: E731
P = {"w": W, "v": V, "b": W[0]}
CASES: dict[str, tuple[Any, ...]] = {
    # nested calls
    "jit": (lambda p, x, c: jax.jit(lambda a, w: jax.jit(jnp.tanh)(a @ w))(x, p) @ p, W, X),
    "custom_vjp": (lambda p, x, c: twice_the_gradient(x, p["w"]) @ p["v"], P, X),
    "custom_vjp in jit": (lambda p, x, c: jax.jit(twice_the_gradient)(x, p["w"]), P, X),
    "custom_vjp in checkpoint": (
        jax.checkpoint(lambda p, x, c: jnp.sin(twice_the_gradient(x, p["w"]) @ p["v"])),
        P,
        X,
    ),
    "custom_vjp of the cotangent": (lambda p, x, c: clip_gradient(x @ p["w"]) @ p["v"], P, X),
    "custom_vjp that counts": (counted, P, X),
    "custom_vjp that counts, in checkpoint": (jax.checkpoint(counted), P, X),
    "one random mask for all rows": (
        lambda p, x, c: (
            x
            @ p["w"]
            * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (D,)))(
                jnp.broadcast_to(KEY, (T,))
            )
        ),
        P,
        X,
    ),
    "custom_jvp": (lambda p, x, c: smooth_step(x @ p["w"]) * jax.nn.relu(x @ p["v"]), P, X),
    "custom_jvp in checkpoint": (
        jax.checkpoint(lambda p, x, c: jax.nn.silu(smooth_step(x @ p["w"]) @ p["v"])),
        P,
        X,
    ),
    "custom_gradient": (
        lambda p, x, c: own_gradient(p, x),
        W,
        X,
    ),
    "gradient without a cotangent, of x": (
        lambda p, x, c: attach_loss(x @ p["w"], jnp.sum(jnp.square(x @ p["v"]))),
        P,
        X,
    ),
    "gradient without a cotangent, of a parameter": (
        lambda p, x, c: attach_loss(x @ p["w"], jnp.sum(jnp.square(p["v"]))),
        P,
        X,
    ),
    "checkpoint of a part": (
        lambda p, x, c: x + jax.checkpoint(lambda a: jnp.tanh(a @ p["w"]))(jnp.sin(x)) @ p["v"],
        P,
        X,
    ),
    "checkpoint in checkpoint": (
        jax.checkpoint(
            lambda p, x, c: jnp.sin(jax.checkpoint(lambda a: jnp.tanh(a @ p["w"]))(x) @ p["v"])
        ),
        P,
        X,
    ),
    "checkpoint of parameters alone": (
        lambda p, x, c: x @ jax.checkpoint(jnp.exp)(p["w"]) @ jnp.tanh(p["v"]),
        P,
        X,
    ),
    "vmap": (lambda p, x, c: jax.vmap(lambda row: jnp.tanh(p["w"] @ row))(x), P, X),
    "cond on x": (
        lambda p, x, c: lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: jnp.sin(x @ p["v"])),
        P,
        X,
    ),
    "switch on ctx": (
        lambda p, x, c: lax.switch(c, [lambda: x, lambda: x @ p["w"], lambda: jnp.sin(x)]),
        P,
        X,
        jnp.int32(1),
    ),
    "while without gradient": (
        lambda p, x, c: (
            x
            @ p["w"]
            * lax.stop_gradient(
                lax.while_loop(lambda t: t < 10, lambda t: 2 * t, 1 + jnp.abs(x).sum())
            )
        ),
        P,
        X,
    ),
    "solve": (lambda p, x, c: jnp.linalg.solve(p["w"] + 3 * jnp.eye(D), x.T).T, P, X),
    # parameters
    "used twice": (lambda p, x, c: jnp.tanh(x @ p) @ p, W, X),
    "used for dx and for y": (lambda p, x, c: x @ p + p[0], W, X),
    "unused in part": (lambda p, x, c: x @ p["w"], P, X),
    "all unused": (IDENTITY, P, X),
    "no parameters": (lambda p, x, c: jnp.tanh(x) * jnp.sin(x), {}, X),
    "reaches y only": (lambda p, x, c: x + jnp.tanh(p["b"]) @ p["w"], P, X),
    "y of parameters alone": (lambda p, x, c: jnp.zeros_like(x) + p["b"], P, X),
    "y a constant": (lambda p, x, c: jnp.zeros_like(x), P, X),
    "frozen": (lambda p, x, c: lax.stop_gradient(p["w"])[0] * x @ p["v"], P, X),
    "frozen x": (lambda p, x, c: lax.stop_gradient(x) @ p["w"], P, X),
    "integer": (
        lambda p, x, c: (x @ p["w"])[:, p["order"]] * p["mask"],
        {"w": W, "order": jnp.array([2, 0, 3, 1]), "mask": jnp.array([True, False, True, True])},
        X,
    ),
    "empty": (
        lambda p, x, c: {"h": x["h"] @ p["w"] + p["e"].sum(), "e": x["e"] * p["e"]},
        {"w": W, "e": jnp.zeros(0)},
        {"h": X, "e": jnp.zeros(0)},
    ),
    "empty rows": (lambda p, x, c: jnp.tanh(x @ p), W, jnp.zeros((0, D))),
    "scalar": (lambda p, x, c: jnp.tanh(x * p["a"] + p["b"]), {"a": 2.0, "b": 0.5}, X),
    "weakly typed": (
        lambda p, x, c: jnp.tanh(x * p),
        jnp.asarray(2.0),
        jnp.asarray([0.5, 1], jnp.float32),
    ),
    "key": (
        lambda p, x, c: x @ p["w"] * jax.random.normal(p["key"], x.shape),
        {"w": W, "key": jax.random.key(1)},
        X,
    ),
    # activations
    "dict": (
        lambda p, x, c: {"a": jnp.tanh(x["a"] @ p["w"]), "b": x["b"] * x["a"]},
        P,
        {"a": X, "b": X + 1},
    ),
    "tuple": (lambda p, x, c: (x[1] @ p["w"], x[0]), P, (X, X + 1)),
    "named tuple with None": (
        lambda p, x, c: Pair(Pair(x.left.left @ p["w"], None), x.right),
        P,
        Pair(Pair(X, None), X),
    ),
    "passes through": (
        lambda p, x, c: {**x, "h": x["h"] @ p["w"]},
        P,
        {"h": X, "f": X[0], "i": jnp.arange(3), "n": jnp.bool_(True)},
    ),
    "integer in x": (
        lambda p, x, c: {"h": x["h"] @ p["w"] * x["i"][:, None], "i": x["i"] + 1},
        P,
        {"h": X, "i": jnp.arange(T)},
    ),
    "key in x": (
        lambda p, x, c: {
            "h": x["h"] @ p["w"] * jax.random.normal(x["key"], (T, D)),
            "key": jax.random.fold_in(x["key"], 1),
        },
        P,
        {"h": X, "key": jax.random.key(1)},
    ),
    "constant leaves in y": (
        lambda p, x, c: {"h": x["h"] @ p["w"], "s": jnp.zeros((), jnp.bfloat16), "i": jnp.int8(3)},
        P,
        {"h": X, "s": jnp.ones((), jnp.bfloat16), "i": jnp.int8(1)},
    ),
    "same leaf twice": (lambda p, x, c: (x[0], x[0]), P, (X, X + 1)),
    "no leaf of x read": (lambda p, x, c: (x[1] @ p["w"], x[1]), P, (X, X + 1)),
    # operations
    "sort": (lambda p, x, c: jnp.sort(x @ p["w"], axis=-1), P, X),
    "gather": (lambda p, x, c: p["w"][jnp.argmax(x, -1)] * x, P, X),
    "scatter": (lambda p, x, c: x.at[jnp.argsort(x[:, 0])].add(x @ p["w"]), P, X),
    "routing": (lambda p, x, c: _route(p, x), {"gate": V, "experts": array(D, D, D)}, X),
    "einsum": (lambda p, x, c: jnp.einsum("td,de,te,ef->tf", x, p["w"], jnp.sin(x), p["v"]), P, X),
    "conv": (
        lambda p, x, c: lax.conv_general_dilated(x, p, (1,), "SAME"),
        array(2, 2, 3),
        array(1, 2, 6),
    ),
    "cumulative": (lambda p, x, c: jnp.cumsum(jnp.cumprod(x @ p["w"], 0), 1), P, X),
    "complex": (
        lambda p, x, c: jnp.tanh(x @ p) * (1 + 2j),
        W + 1j * V,
        X + 1j * array(T, D, seed=3),
    ),
    "real of complex": (lambda p, x, c: jnp.real(jnp.exp(x @ p)), W + 1j * V, X),
    "debug print": (lambda p, x, c: (jax.debug.callback(lambda _: None, x), x @ p["w"])[1], P, X),
}


def _route(params, x):
    scores, chosen = lax.top_k(jax.nn.softmax(x @ params["gate"]), 2)
    outputs = jnp.einsum("td,tkde->tke", x, params["experts"][chosen])
    return x + jnp.einsum("tk,tke->te", scores, jnp.tanh(outputs))


@pytest.mark.parametrize("case", CASES)
def test_equals_vjp(case):
    parts = checks.assert_equals_vjp(*CASES[case])
    block, params, x, *ctx = CASES[case]
    if "integer" not in case and "key" not in case:
        counted = sum(checks.count_parts("dot_general", parts, params, x, *ctx))
        assert counted <= checks.count_vjp("dot_general", block, params, x, *ctx)


def test_bfloat16():
    def block(params, x, ctx):
        return x + jnp.tanh(x @ params["w"].astype(x.dtype)) @ params["v"].astype(x.dtype)

    params = jax.tree.map(lambda a: a.astype(jnp.float32), P)
    # Sums in another order, in 8 bits.
    parts = checks.assert_equals_vjp(block, params, X.astype(jnp.bfloat16), rtol=2**-6)
    # The casts of parameters are no residuals.
    assert all(a.shape == X.shape and a.dtype == jnp.bfloat16 for a in checks.passed_on(parts))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_aux_loss(wrap):
    def block(params, x, ctx):
        y = jnp.tanh(x @ params["w"])
        return y, jnp.square(y @ params["v"]).sum() + jnp.sum(params["b"] ** 2)

    checks.assert_equals_vjp(wrap(block), P, X, has_aux=True)
    # No path from y, or none from x.
    checks.assert_equals_vjp(wrap(lambda p, x, c: (x, block(p, x, c)[1])), P, X, has_aux=True)
    checks.assert_equals_vjp(wrap(lambda p, x, c: (x, jnp.sum(p["b"]))), P, X, has_aux=True)
    checks.assert_equals_vjp(
        wrap(lambda p, x, c: (x @ p["w"], jnp.float64(1.5))), P, X, has_aux=True
    )


def test_has_grad_names_the_leaves_that_have_one():
    params = {"frozen": W, "mask": jnp.array(True), "unused": W, "used": W}
    parts = checks.split(
        lambda p, x, c: jnp.where(p["mask"], x @ p["used"], x @ lax.stop_gradient(p["frozen"])),
        params,
        X,
    )
    assert parts.has_grad == (False, False, False, True)


def test_closed_over_values():
    table = array(D, D, seed=9)

    @jax.jit
    def run(tracer, params, x):
        def block(params, x, ctx):
            return jnp.sin(x @ (params["w"] * tracer)) @ table

        parts = checks.split(block, params, x)
        return checks.reference(block, params, x, None), checks.run(parts, params, x, None)

    expected, actual = run(V, P, X)
    for want, got in zip(expected, actual, strict=True):
        checks.assert_leaves_close("closed over", want, got, 1e-12)


def test_leaves_of_any_array_type_and_avals():
    params = jax.tree.map(np.asarray, P)
    avals = jax.eval_shape(lambda *trees: trees, P, X)
    block = lambda p, x, c: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    parts = checks.split(block, *avals)
    expected = checks.reference(block, P, X, None)
    for want, got in zip(expected, checks.run(parts, params, np.asarray(X), None), strict=True):
        checks.assert_leaves_close("NumPy", want, got, 1e-12)
