"""Compares a split backward with `jax.vjp`, and counts the operations and bytes of its parts.

The reference differentiates with respect to all leaves, integers included, and knows nothing of
how the library picks the differentiable ones.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import SplitVjp, split_vjp

FLOAT0 = jax.dtypes.float0

D, T = 4, 3  # width, and rows of x


def array(*shape: int, dtype: Any = float, seed: int = 0) -> jax.Array:
    values = np.random.default_rng([seed, *shape]).normal(size=shape)
    return jnp.asarray(values / np.sqrt(shape[-1] if shape else 1), dtype)


W, V, X = array(D, D), array(D, D, seed=1), array(T, D)


def split(block: Callable, params: Any, x: Any, ctx: Any = None, *, has_aux: bool = False):
    """Splits `block`, which returns y, or (y, aux)."""
    return split_vjp(_with_aux(block, has_aux), params, x, ctx)


def assert_equals_vjp(
    block: Callable,
    params: Any,
    x: Any,
    ctx: Any = None,
    *,
    has_aux: bool = False,
    rtol: float = 1e-12,  # of a leaf's largest entry: in float64 only the order of sums differs
) -> SplitVjp:
    """Requires y, aux, dx and dparams of the split `block` to equal those of `jax.vjp`."""
    params, x = jax.tree.map(jnp.asarray, (params, x))
    parts = split(block, params, x, ctx, has_aux=has_aux)

    def both(params: Any, x: Any, ctx: Any) -> Any:
        return reference(block, params, x, ctx), run(parts, params, x, ctx, has_aux=has_aux)

    expected, actual = jax.jit(both)(params, x, ctx)
    for name, want, got in zip(("y", "dx", "dparams"), expected, actual, strict=True):
        assert_leaves_close(name, want, got, rtol)
    return parts


def reference(block: Callable, params: Any, x: Any, ctx: Any) -> Any:
    """Leaves of (y and aux, dx, dparams) of `jax.vjp`, those that have a cotangent."""
    out, pull = jax.vjp(lambda params, x: block(params, x, ctx), params, x)
    dparams, dx = pull(jax.tree.map(cotangent, out))
    return jax.tree.leaves(out), _without_float0(dx), _without_float0(dparams)


def run(parts: SplitVjp, params: Any, x: Any, ctx: Any, *, has_aux: bool = False) -> Any:
    """Leaves of (y and aux, dx, dparams) of a split block; zeros where it has no gradient."""
    y, aux, residual, weight_residual = parts.forward(params, x, ctx)
    assert (aux.loss is not None) == has_aux
    dy = _without_float0(jax.tree.map(cotangent, y))
    daux = cotangent(aux.loss) if has_aux else None
    dx, stash, _, gradients = parts.input_grad(params, ctx, residual, weight_residual, dy, daux)
    with_weight_grad = iter(parts.weight_grad(params, ctx, weight_residual, stash))
    with_input_grad = iter(gradients)
    for name, values in zip(
        ("residual", "weight_residual", "stash"), (residual, weight_residual, stash), strict=True
    ):
        avals = getattr(parts, name)
        assert [(v.shape, v.dtype) for v in values] == [(a.shape, a.dtype) for a in avals], name
    dparams = []
    made = zip(parts.made_with_input_grad, parts.made_with_weight_grad, strict=True)
    for leaf, (by_input_grad, by_weight_grad) in zip(jax.tree.leaves(params), made, strict=True):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            grads = [next(with_input_grad)] if by_input_grad else []
            grads += [next(with_weight_grad)] if by_weight_grad else []
            dparams.append(sum(grads) if grads else jnp.zeros(leaf.shape, leaf.dtype))
        else:
            assert not by_input_grad
            assert not by_weight_grad
    assert not [*with_input_grad, *with_weight_grad]
    return jax.tree.leaves((y, aux)), dx, dparams


def cotangent(leaf: Any) -> Any:
    """Makes a cotangent with no two entries alike."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return np.zeros(leaf.shape, FLOAT0)
    values = 0.3 + jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
    return values.astype(leaf.dtype)


def assert_leaves_close(name: str, want: list, got: list, rtol: float) -> None:
    """Requires the same shapes and dtypes, and values close to `want`."""
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in want], name
    for i, (a, b) in enumerate(zip(want, got, strict=True)):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
        a, b = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        scale = np.abs(a).max(initial=0)
        np.testing.assert_allclose(b, a, rtol=0, atol=rtol * scale, err_msg=f"{name}, leaf {i}")


def num_bytes(avals: Iterable[Any]) -> int:
    """Sums the bytes of `avals`."""
    return sum(int(np.prod(a.shape, dtype=int)) * a.dtype.itemsize for a in avals)


def passed_on(parts: SplitVjp) -> list[Any]:
    """Lists the avals of all values that pass from one part to another."""
    return [*parts.residual, *parts.weight_residual, *parts.stash]


def count(name: str, fn: Callable, *args: Any) -> int:
    """Counts how often `fn` runs the primitive `name`, in nested jaxprs too."""
    return _count(name, jax.make_jaxpr(fn)(*args).jaxpr)


def count_parts(name: str, parts: SplitVjp, params: Any, x: Any, ctx: Any = None) -> list[int]:
    """Counts how often forward, input_grad and weight_grad run the primitive `name`."""
    y, aux, *_ = jax.eval_shape(parts.forward, params, x, ctx)
    dy = [leaf for leaf in jax.tree.leaves(y) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    residual, weight_residual, stash = (
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        for avals in (parts.residual, parts.weight_residual, parts.stash)
    )
    return [
        count(name, parts.forward, params, x, ctx),
        count(name, parts.input_grad, params, ctx, residual, weight_residual, dy, aux.loss),
        count(name, parts.weight_grad, params, ctx, weight_residual, stash),
    ]


def count_vjp(name: str, block: Callable, params: Any, x: Any, ctx: Any = None) -> int:
    """Counts how often `jax.vjp` of `block`, forward and backward, runs the primitive `name`."""
    return count(name, lambda params, x: reference(block, params, x, ctx), params, x)


def _count(name: str, jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [_count(name, sub) for sub in jaxprs_in_params(eqn.params)]
        total += (eqn.primitive.name == name) + times * sum(inner)
    return total


def _without_float0(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != FLOAT0]


def _with_aux(block: Callable, has_aux: bool) -> Callable:
    def run(params: Any, x: Any, ctx: Any) -> tuple[Any, Aux]:
        y, loss = block(params, x, ctx) if has_aux else (block(params, x, ctx), None)
        return y, Aux(loss=loss)

    return run
