"""Equations that make dx and dW and cannot be opened: dW comes with dx, and is never stashed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.split_vjp import checks
from tests.split_vjp.blocks import PARAMS, fused
from tests.split_vjp.checks import D, W, X, array


@jax.custom_vjp
def called_back(x: Any, w: Any) -> Any:
    return x @ w


def _callback_backward(kept: Any, g: Any) -> Any:
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in kept]

    def both(x: Any, w: Any, g: Any) -> Any:
        x, w, g = map(np.asarray, (x, w, g))
        return g @ w.T, x.T @ g

    return jax.pure_callback(both, shapes, *kept, g, vmap_method="sequential")


called_back.defvjp(lambda x, w: (x @ w, (x, w)), _callback_backward)


def sharded(x: Any, w: Any) -> Any:
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("one",)), jax.P())
    return jax.jit(lambda x, w: jnp.tanh(x @ w), in_shardings=sharding)(x, w)


def layers(fn: Any) -> Any:
    """Scans over layers."""
    return lambda p, x, c: lax.scan(lambda h, w: (jnp.tanh(fn(h, w)), None), x, p)[0]


def over_time(fn: Any) -> Any:
    """Uses the same weight in every iteration: its gradients are summed in the loop."""
    return lambda p, x, c: lax.scan(lambda h, _: (jnp.tanh(fn(h, p)), None), x, length=3)[0]


def in_cond(fn: Any) -> Any:
    return lambda p, x, c: lax.cond(x[0, 0] > 0, lambda: fn(x, p["w"]), lambda: jnp.sin(x))


def in_shard_map(fn: Any) -> Any:
    """Multiplies by the kernel's weight, then by one that waits, on two devices."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def block(p: Any, x: Any, c: Any) -> Any:
        call = jax.shard_map(
            lambda p, x: fn(jnp.tanh(x @ p["v"]), p["w"]),
            mesh=mesh,
            in_specs=(jax.P(), jax.P("rows")),
            out_specs=jax.P("rows"),
            check_vma=False,
        )
        return call(p, jnp.concatenate([x, -x]))[: len(x)]

    return block


KINDS = {"pallas_call": fused, "pure_callback": called_back, "jit with shardings": sharded}
STACK = array(5, D, D)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_comes_with_that_of_x(kind):
    fn = KINDS[kind]
    parts = checks.assert_equals_vjp(
        lambda p, x, c: jnp.tanh(fn(x, p["w"])) @ p["v"] + p["b"], PARAMS, X
    )
    # b, v, w
    assert parts.made_with_input_grad == (False, False, True)
    assert parts.made_with_weight_grad == (True, True, False)
    assert all(a.shape != (D, D) for a in checks.passed_on(parts))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize(
    ("block", "params"),
    [
        (layers(fused), STACK),
        (over_time(fused), W),
        (in_cond(fused), PARAMS),
        (in_shard_map(fused), PARAMS),
    ],
    ids=["layers", "time", "cond", "shard_map"],
)
def test_inside_of_equations_that_are_split(block, params, wrap):
    parts = checks.assert_equals_vjp(wrap(block), params, X)
    assert parts.made_with_input_grad[-1]
    assert not parts.made_with_weight_grad[-1]
    assert all(a.shape[-2:] != (D, D) for a in parts.stash)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_may_have_a_gradient_with_each(kind):
    """Its gradient is a sum: one use's with x's gradient, the others' later."""
    fn = KINDS[kind]
    parts = checks.assert_equals_vjp(
        lambda w, x, c: fn(jnp.tanh(x @ w), w) + jnp.sin(fn(x, w)) + x @ w, W, X
    )
    assert parts.made_with_input_grad == parts.made_with_weight_grad == (True,)
    assert checks.count_parts("dot_general", parts, W, X)[2] == 2
    assert all(a.shape != (D, D) for a in checks.passed_on(parts))


def test_no_gradient_comes_with_that_of_x_in_a_block_that_can_be_opened():
    def block(p: Any, x: Any, c: Any) -> Any:
        h = (x - x.mean(-1, keepdims=True)) * p["b"] + p["v"][0]
        return x + jnp.tanh(h @ p["w"]) @ p["v"]

    for wrapped in (block, jax.checkpoint(block)):
        assert checks.assert_equals_vjp(wrapped, PARAMS, X).made_with_input_grad == (False,) * 3


def test_a_source_smaller_than_the_gradient_waits():
    """A row that comes with dx, from which the gradient is made later at little cost."""

    @jax.custom_vjp
    def scale(x: Any, table: Any) -> Any:
        return x * table.mean(0)

    def backward(kept: Any, g: Any) -> Any:
        x, table = kept
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((D,), x.dtype)]
        both = lambda x, row, g: (g * row, (np.asarray(g) * x).sum(0))  # noqa: E731
        dx, row = jax.pure_callback(both, shapes, x, table.mean(0), g, vmap_method="sequential")
        return dx, jnp.broadcast_to(row / len(table), table.shape)

    scale.defvjp(lambda x, table: (scale(x, table), (x, table)), backward)
    parts = checks.assert_equals_vjp(lambda p, x, c: scale(x, p), array(40, D), X)
    assert parts.made_with_input_grad == (False,)
    assert [a.shape for a in parts.stash] == [(D,)]
