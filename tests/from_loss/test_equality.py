"""Pairs of layers that look alike and are not: each must count as different.

A pair that counted as the same would be a wrong gradient without a word.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from dualpipe_jax._from_loss.equality import Equality

X, M, KEY = jnp.ones((4, 3)), jnp.ones((4, 4)), jax.random.key(0)
IMAGE, FILTERS = jnp.ones((1, 8, 8, 2)), jnp.ones((3, 3, 2, 2))
Function = Callable[..., Any]


def custom_vjp(scale: float) -> Function:
    """Doubles, with another derivative for each scale."""

    @jax.custom_vjp
    def double(x: Any, n: Any) -> Any:
        return x * 2 + n

    double.defvjp(
        lambda x, n: (double(x, n), n), lambda n, ct: (ct * scale * (n + 1).astype(ct.dtype), None)
    )
    return lambda x: double(x, jnp.int32(1))


def custom_vjp_of_floats(scale: float) -> Function:
    @jax.custom_vjp
    def double(x: Any) -> Any:
        return x * 2

    double.defvjp(lambda x: (x * 2, None), lambda _, ct: (ct * scale,))
    return double


def custom_jvp(scale: float) -> Function:
    @jax.custom_jvp
    def double(x: Any) -> Any:
        return x * 2

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * scale))
    return double


def custom_jvp_of_integers(scale: float) -> Function:
    @jax.custom_jvp
    def double(x: Any, n: Any) -> Any:
        return x * 2 + n

    double.defjvp(lambda primals, tangents: (double(*primals), tangents[0] * scale))
    return lambda x: double(x, jnp.int32(1))


def callback(scale: float) -> Function:
    def on_host(a: Any) -> Any:
        return np.asarray(a) * scale

    return lambda x: jax.pure_callback(on_host, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def kernel(scale: float) -> Function:
    def run(x: Any, out: Any) -> None:
        out[...] = x[...] * scale

    return lambda x: pl.pallas_call(
        run, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True
    )(x)


def kernel_on_grid(*block: int) -> Function:
    def run(x: Any, out: Any) -> None:
        out[...] = x[...] * 2

    spec = pl.BlockSpec(block, lambda i: (i, 0))
    return lambda x: pl.pallas_call(
        run,
        grid=(2,),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=True,
    )(x)


def nested(function: Function) -> Function:
    """Calls a function under the name that all others have."""

    def layer(x: Any) -> Any:
        return function(x)

    return lambda x: jax.checkpoint(lambda x: jax.jit(layer)(x))(x)


def with_constant(value: float) -> Function:
    array = np.full((4, 3), value)
    return jax.checkpoint(lambda x: x * jnp.asarray(array))


def dot(**options: Any) -> Function:
    usual: dict[str, Any] = {"dimension_numbers": (((0,), (0,)), ((), ()))}
    return lambda x: lax.dot_general(x, M, **{**usual, **options})


def conv(**options: Any) -> Function:
    usual: dict[str, Any] = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }
    return lambda x: lax.conv_general_dilated(IMAGE, FILTERS, **{**usual, **options})


def scanned(length: int, step: float = 1.0, **options: Any) -> Function:
    return lambda x: lax.scan(lambda c, _: (c * step, None), x, None, length=length, **options)[0]


def in_scan(function: Function) -> Function:
    return lambda x: lax.scan(lambda c, _: (function(c), None), x, None, length=2)[0]


def branches(*scales: float) -> Function:
    return lambda x: lax.cond(x[0, 0] > 0, *(lambda x, s=s: x * s for s in scales), x)


def remat(*names: str) -> Function:
    policies = jax.checkpoint_policies
    named = policies.save_only_these_names(*names)
    return jax.checkpoint(
        jnp.sin, policy=policies.save_from_both_policies(policies.dots_saveable, named)
    )


def remat_by(ndim: int) -> Function:
    def policy(prim: Any, *avals: Any, **params: Any) -> bool:
        return avals[0].ndim == ndim

    return jax.checkpoint(jnp.sin, policy=policy)


class Policy:
    """A policy as a method, of which each access makes another one."""

    def __init__(self, ndim: int):
        self.ndim = ndim

    def save(self, unused: Any, prim: Any, *avals: Any, **params: Any) -> bool:
        return avals[0].ndim == self.ndim


POLICY = Policy(2)


def remat_by_itself(is_known: bool) -> Function:
    """A policy that holds itself, and a variable that may have no value."""

    def policy(prim: Any, *avals: Any, **params: Any) -> bool:
        return policy is not None or later

    if is_known:
        later = True
    return jax.checkpoint(jnp.sin, policy=policy)


def remat_by_method(policy: Policy, unused: int) -> Function:
    return jax.checkpoint(jnp.sin, policy=partial(policy.save, unused))


DIFFERENT: dict[str, tuple[Function, Function]] = {
    "custom_vjp, an integer argument": (custom_vjp(2.0), custom_vjp(3.0)),
    "custom_vjp": (custom_vjp_of_floats(2.0), custom_vjp_of_floats(3.0)),
    "custom_jvp": (custom_jvp(2.0), custom_jvp(3.0)),
    "custom_jvp, an integer argument": (custom_jvp_of_integers(2.0), custom_jvp_of_integers(3.0)),
    "custom_vjp in a scan": (in_scan(custom_vjp(2.0)), in_scan(custom_vjp(3.0))),
    "custom_vjp in a checkpoint": (
        jax.checkpoint(custom_vjp(2.0)),
        jax.checkpoint(custom_vjp(3.0)),
    ),
    "callback": (callback(2.0), callback(3.0)),
    "callback of equal text": (callback(2.0), callback(2.0)),
    "kernel": (kernel(2.0), kernel(3.0)),
    "kernel, other blocks": (kernel_on_grid(2, 3), kernel_on_grid(2, 1)),
    "dot, precision": (dot(), dot(precision="highest")),
    "dot, preferred type": (dot(), dot(preferred_element_type=jnp.float64)),
    "dot, dims": (dot(), dot(dimension_numbers=(((0,), (1,)), ((), ())))),
    "sort, descending": (lambda x: lax.sort(x), lambda x: -lax.sort(-x)),
    "sort, dim": (lambda x: lax.sort(x, dimension=0), lambda x: lax.sort(x, dimension=1)),
    "sort, keys": (
        lambda x: lax.sort((x, x), num_keys=1)[0],
        lambda x: lax.sort((x, x), num_keys=2)[0],
    ),
    "sort, stable": (
        lambda x: lax.sort(x, is_stable=True),
        lambda x: lax.sort(x, is_stable=False),
    ),
    "top_k": (lambda x: lax.top_k(x, 1)[0].sum(), lambda x: lax.top_k(x, 2)[0].sum()),
    "conv, padding": (conv(), conv(padding=((0, 2), (1, 1)))),
    "conv, dilation": (conv(), conv(rhs_dilation=(2, 2))),
    "conv, precision": (conv(), conv(precision="highest")),
    "nested jits of one name": (nested(lambda x: x * 2), nested(lambda x: x * 3)),
    "checkpoint, policy": (
        jax.checkpoint(jnp.sin, policy=jax.checkpoint_policies.dots_saveable),
        jax.checkpoint(jnp.sin),
    ),
    "checkpoint, names of a policy": (remat("a"), remat("b")),
    "checkpoint, values of a policy": (remat_by(2), remat_by(3)),
    "checkpoint, a policy's argument": (remat_by_method(POLICY, 0), remat_by_method(POLICY, 1)),
    "checkpoint, a policy's object": (remat_by_method(POLICY, 0), remat_by_method(Policy(2), 0)),
    "checkpoint, a policy without a value": (remat_by_itself(False), remat_by_itself(False)),
    "scan, length": (scanned(2), scanned(3)),
    "scan, direction": (scanned(2, reverse=True), scanned(2)),
    "scan, body": (scanned(2, 2.0), scanned(2, 3.0)),
    "branches": (branches(2.0, 3.0), branches(3.0, 2.0)),
    "closed-over arrays": (with_constant(2.0), with_constant(3.0)),
    "weak type": (
        lambda x: (jnp.asarray(2.0) * 1).astype(int) + x,
        lambda x: (jnp.asarray(2.0, x.dtype) * 1).astype(int) + x,
    ),
    "literal": (lambda x: x * 2.0, lambda x: x * 3.0),
    "literal, sign of zero": (lambda x: x * 0.0, lambda x: x * -0.0),
    "literal's dtype": (
        lambda x: lax.clamp(0, x.astype(int), 2) + x,
        lambda x: lax.clamp(np.int64(0), x.astype(int), np.int64(2)) + x,
    ),
    "key's algorithm": (
        lambda x: x * jax.random.uniform(jax.random.key(0, impl="threefry2x32")),
        lambda x: x * jax.random.uniform(jax.random.key(0, impl="rbg")),
    ),
    "reduction's dims": (lambda x: x.sum(0).sum(), lambda x: x.sum(1).sum()),
    "axis name": (
        lambda x: jax.vmap(lambda r: lax.psum(r, "i"), axis_name="i")(x),
        lambda x: jax.vmap(lambda r: lax.pmax(r, "i"), axis_name="i")(x),
    ),
    "operands": (lambda x: x - 2 * x, lambda x: 2 * x - x),
    "dims of gather": (lambda x: x[:, jnp.array([0, 1])], lambda x: x[jnp.array([0, 1])].sum()),
    "random bits": (
        lambda x: jax.random.bits(KEY, (2,), jnp.uint8),
        lambda x: jax.random.bits(KEY, (2,), jnp.uint16),
    ),
}

_one_kernel, _one_callback = kernel(2.0), callback(2.0)
_times_two = custom_vjp(2.0)


def _sine(x: Any) -> Any:
    return jnp.sin(x)


SAME: dict[str, tuple[Function, Function]] = {
    "custom_vjp of equal rules": (custom_vjp(2.0), custom_vjp(2.0)),
    "custom_jvp of equal rules": (custom_jvp(2.0), custom_jvp(2.0)),
    "one custom_vjp": (_times_two, _times_two),
    "library functions": (lambda x: jax.nn.gelu(x) * jax.nn.silu(x),) * 2,
    "one kernel": (_one_kernel, _one_kernel),
    "flags of nested jits": (
        jax.checkpoint(lambda x: jax.jit(_sine, inline=False)(x)),
        jax.checkpoint(lambda x: jax.jit(jnp.sin, keep_unused=True, donate_argnums=0)(x)),
    ),
    "arrays of equal values": (with_constant(2.0), with_constant(2.0)),
    "policies of equal names": (remat("a", "b"), remat("b", "a")),
    "policies of equal values": (remat_by(2), remat_by(2)),
    "policies of one method": (remat_by_method(POLICY, 0), remat_by_method(POLICY, 0)),
    "policies that hold themselves": (remat_by_itself(True), remat_by_itself(True)),
    "scans of equal bodies": (scanned(2, 2.0), scanned(2, 2.0)),
}


def are_same(one: Function, other: Function) -> bool:
    programs = [jax.make_jaxpr(lambda x, f=f: f(x))(X) for f in (one, other)]
    assert all(program.jaxpr.eqns for program in programs)
    one_token, other_token = map(Equality().program, programs)
    return one_token == other_token


@pytest.mark.parametrize("name", DIFFERENT)
def test_functions_that_differ_are_different(name: str) -> None:
    one, other = DIFFERENT[name]
    assert not are_same(one, other)
    assert are_same(one, one)


@pytest.mark.parametrize("name", SAME)
def test_functions_that_are_the_same_count_as_one(name: str) -> None:
    assert are_same(*SAME[name])


def test_a_rule_that_may_depend_on_which_operands_have_tangents_is_different() -> None:
    def scaled(scale: float) -> Function:
        @jax.custom_jvp
        def f(x: Any, y: Any) -> Any:
            return x * y

        def jvp(primals: Any, tangents: Any) -> Any:
            (x, y), (dx, dy) = primals, tangents
            if isinstance(dy, SymbolicZero):
                return x * y, dx * y * scale
            return x * y, dx * y + x * dy

        f.defjvp(jvp, symbolic_zeros=True)
        return lambda x: f(x, jnp.ones_like(x))

    assert not are_same(scaled(2.0), scaled(3.0))


def test_a_rule_that_cannot_be_traced_is_different() -> None:
    def broken() -> Function:
        @jax.custom_vjp
        def f(x: Any) -> Any:
            return x * 2

        def refuse(_: Any, ct: Any) -> Any:
            raise ValueError

        f.defvjp(lambda x: (x * 2, None), refuse)
        return f

    assert not are_same(broken(), broken())
