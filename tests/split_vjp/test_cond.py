"""Splits `cond` and `switch`: dx in one, the weight gradients in another."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.split_vjp import checks
from tests.split_vjp.blocks import PARAMS, nested_branches, two_branches
from tests.split_vjp.checks import D, T, X, array

STACK = {"w": array(5, D, D), "v": array(5, D, D, seed=1)}


def cast(params: Any, x: Any, ctx: Any) -> Any:
    """The branches read values made of the parameters, not the parameters themselves."""
    return lax.cond(
        x[0, 0] > 0,
        lambda: jnp.tanh(x @ jnp.exp(params["w"])) @ params["v"],
        lambda: jnp.sin(x @ jnp.sin(params["v"])),
    )


def switch(params: Any, x: Any, ctx: Any) -> Any:
    """A branch that does nothing, one of parameters alone, one with a cond and a scan inside."""

    def deep() -> Any:
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"] + i), x)
        return two_branches(params, h, ctx) @ params["v"]

    branches = [lambda: x, lambda: x + params["b"], lambda: jnp.sin(x @ params["w"]), deep]
    return lax.switch(jnp.argmax(x[0]) + ctx, branches)


def in_scan(params: Any, x: Any, ctx: Any, *, wrap: Any = lambda body: body) -> Any:
    """A conditional in every iteration, on the loop's carry."""
    return lax.scan(wrap(lambda h, _: (two_branches(params, h, ctx), None)), x, length=5)[0]


def over_layers(params: Any, x: Any, ctx: Any) -> Any:
    """The layers are scanned over, and the branches read their weights."""

    def body(h: Any, layer: Any) -> Any:
        return lax.cond(
            h.sum() > 0, lambda: jnp.tanh(h @ layer["w"]), lambda: jnp.sin(h) @ layer["v"]
        ), None

    return lax.scan(body, x, params)[0]


def scan_in_branch(params: Any, x: Any, ctx: Any) -> Any:
    """Whether the layers are run at all depends on x."""

    def layers() -> Any:
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, STACK["w"] * params["w"])[0]

    return lax.cond(x[0, 0] > 0, layers, lambda: x @ params["v"])


@jax.custom_vjp
def own_backward(x: Any, w: Any) -> Any:
    return lax.cond(x[0, 0] > 0, lambda: jnp.sin(x @ w), lambda: x)


def _own_backward(kept: Any, g: Any) -> Any:
    x, w = kept
    # Nothing else of a custom_vjp is known: its backward has a conditional and a loop of its own.
    g = lax.cond(x[0, 0] > 0, lambda: g * jnp.cos(x @ w), lambda: g * 2)
    times = lax.while_loop(lambda n: n[0] < x[0, 1], lambda n: (n[0] + 0.5, n[1] * 1.5), (-3.0, g))
    dx, dw = lax.cond(g[0, 0] > 0, lambda: (g @ w.T, x.T @ g), lambda: (g, w * times[1].sum()))
    return dx, dw


own_backward.defvjp(lambda x, w: (own_backward(x, w), (x, w)), _own_backward)


def while_in_backward(params: Any, x: Any, ctx: Any) -> Any:
    """Makes dx and dw in one `while` of dynamic length."""

    @jax.custom_vjp
    def fn(x: Any, w: Any) -> Any:
        return lax.fori_loop(0, jnp.int32(3 * x[0, 0] ** 2) + 1, lambda i, h: jnp.sin(h @ w), x)

    def backward(kept: Any, g: Any) -> Any:
        x, w = kept
        num = jnp.int32(3 * x[0, 0] ** 2) + 1
        return lax.fori_loop(0, num, lambda i, c: (c[0] @ w.T, c[1] + x.T @ c[0]), (g, 0 * w))

    fn.defvjp(lambda x, w: (fn(x, w), (x, w)), backward)
    return fn(x @ params["v"], params["w"]) @ params["w"]


BLOCKS = {
    "cond": (two_branches, PARAMS),
    "cond of casts": (cast, PARAMS),
    "checkpoint": (jax.checkpoint(two_branches), PARAMS),
    "checkpoint of a branch": (
        lambda p, x, c: lax.cond(
            x[0, 0] > 0,
            jax.checkpoint(lambda x: two_branches(p, jnp.sin(x), c)),
            lambda x: x @ p["v"],
            x,
        ),
        PARAMS,
    ),
    "jit": (jax.jit(lambda p, x, c: jax.jit(two_branches)(p, x, c) @ p["v"]), PARAMS),
    "cond twice": (lambda p, x, c: two_branches(p, two_branches(p, x, c), c), PARAMS),
    "cond on the same": (
        lambda p, x, c: two_branches(p, x, c) @ p["w"] + two_branches(p, x, c),
        PARAMS,
    ),
    "in a scan": (in_scan, PARAMS),
    "in a checkpointed scan": (
        lambda p, x, c: in_scan(p, x, c, wrap=jax.checkpoint),
        PARAMS,
    ),
    "scan in a branch": (scan_in_branch, PARAMS),
    "over layers": (over_layers, STACK),
    "nested": (nested_branches, PARAMS),
    "checkpoint of nested": (jax.checkpoint(nested_branches), PARAMS),
    "custom_vjp": (lambda p, x, c: own_backward(jnp.sin(x @ p["v"]), p["w"]) @ p["w"], PARAMS),
    "while in a backward": (while_in_backward, PARAMS),
    "one branch frozen": (
        lambda p, x, c: two_branches({**p, "v": lax.stop_gradient(p["v"])}, x, c),
        PARAMS,
    ),
}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", BLOCKS)
def test_equals_vjp(case, sign):
    """Whichever branch is taken."""
    block, params = BLOCKS[case]
    parts = checks.assert_equals_vjp(block, params, sign * X)
    counted = sum(checks.count_parts("dot_general", parts, params, X))
    assert counted <= checks.count_vjp("dot_general", block, params, X)


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
def test_equals_vjp_in_every_branch_of_a_switch(wrap, first):
    x = X.at[0, 0].set(9.0)  # the largest: the index is that of the context
    checks.assert_equals_vjp(wrap(switch), PARAMS, x, jnp.int32(first))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # Both branches are counted: 3 dots forward, 3 for dx, 3 for the weights.
        ("cond", [3, 3, 3]),
        ("cond of casts", [3, 3, 3]),
        ("jit", [4, 4, 4]),
        ("cond twice", [6, 6, 6]),
        ("over layers", [10, 10, 10]),
        ("in a scan", [15, 15, 15]),
        ("in a checkpointed scan", [15, 25, 15]),
        ("scan in a branch", [6, 6, 6]),
        ("nested", [7, 7, 7]),
    ],
)
def test_weight_gradients_leave_the_conditional_of_dx(case, expected):
    block, params = BLOCKS[case]
    parts = checks.split(block, params, X)
    assert checks.count_parts("dot_general", parts, params, X) == expected


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("case", ["cond", "cond of casts", "cond twice", "jit"])
def test_no_weight_and_no_weight_gradient_is_kept(case, wrap):
    block, params = BLOCKS[case]
    parts = checks.split(wrap(block), params, X)
    assert all(a.shape[-2:] != (D, D) for a in checks.passed_on(parts))


def test_branches_share_stash_entries():
    """Each branch stashes one value [T, D] and the cotangent: together they take as much."""
    parts = checks.split(two_branches, PARAMS, X)
    assert [a.shape for a in parts.stash if a.ndim == 2] == [(T, D)] * 2


def test_forward_makes_no_copy_of_a_weight():
    forward = jax.make_jaxpr(checks.split(two_branches, PARAMS, X).forward)(PARAMS, X, None).jaxpr
    (eqn,) = [e for e in _equations(forward) if e.primitive.name == "cond"]
    assert all(v.aval.shape != (D, D) for v in eqn.outvars)


def _equations(jaxpr: Any) -> list[Any]:
    inner = [e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "jit"]
    return [*jaxpr.eqns, *(e for sub in inner for e in _equations(sub))]
