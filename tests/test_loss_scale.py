"""A scaled loss: cotangents that float16 holds, gradients that do not show it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from tests.models import (
    assert_close,
    make_batch,
    make_mesh,
    make_model,
    make_params,
    sequential_value_and_grad,
)

WIDTH, LAYERS, ROWS, NUM_MICROBATCHES = 8, 4, 16, 4


@pytest.mark.slow
def test_a_scale_does_not_show() -> None:
    """Not in a weighted loss, nor in aux losses, metrics and gradients, over shards or not."""
    model = make_model(frozenset(["weight", "block_has_aux", "has_aux"]))
    params, batch = make_params(4), make_batch(8)
    grad_fn = dpj.value_and_grad(
        model, mesh=make_mesh(2, data=2), num_microbatches=4, batch_axes="data"
    )
    want = sequential_value_and_grad(model, 8)(params, batch)
    step = jax.jit(lambda scale: grad_fn(params, batch, loss_scale=scale))
    # Not a power of two, which would hide the rounding.
    assert_close(step(jnp.float64(3e4)), want)
    assert_close(step(jnp.int32(7)), want)


def make_half_model(dtype: Any) -> dpj.Model:
    """Computes in `dtype`, from parameters of float32; the loss is a mean of small things."""

    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        inner = jnp.tanh(x @ params["up"].astype(dtype))
        return x + inner @ params["down"].astype(dtype)

    def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return 1e-6 * jnp.square(x.astype(jnp.float32) @ ends["out"]).mean()

    return dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch.astype(dtype) @ ends["table"].astype(dtype),
        block=block,
        head=head,
    )


def make_half_params() -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 4, jnp.float32)

    return {
        "ends": {"table": normal(3, WIDTH), "out": normal(WIDTH, 1)},
        "blocks": {"up": normal(LAYERS, WIDTH, WIDTH), "down": normal(LAYERS, WIDTH, WIDTH)},
    }


def test_float16_needs_it() -> None:
    params = make_half_params()
    batch = jnp.asarray(np.random.default_rng(1).normal(size=(ROWS, 3)), jnp.float32)
    options: Any = {"mesh": make_mesh(2), "num_microbatches": NUM_MICROBATCHES}
    grad_fn = dpj.value_and_grad(make_half_model(jnp.float16), **options)
    step = jax.jit(lambda scale: grad_fn(params, batch, loss_scale=scale))
    loss, want = sequential_value_and_grad(make_half_model(jnp.float32), NUM_MICROBATCHES)(
        params, batch
    )

    def error(grads: Any) -> float:
        norms = [
            (jnp.linalg.norm(g - w), jnp.linalg.norm(w))
            for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True)
        ]
        return float(max(off / size for off, size in norms))

    alone, grads = jax.jit(grad_fn)(params, batch)
    assert error(grads) > 0.5  # the smallest number of float16 is 6e-8
    assert all(grad.dtype == jnp.float32 for grad in jax.tree.leaves(grads))
    scaled, grads = step(jnp.float32(2**15))
    # float16 rounds to 1 in 2000, in each of some ten steps from head to embedding.
    assert error(grads) < 0.01
    assert abs(scaled / loss - 1) < 0.01
    assert scaled == alone
    # Beyond its largest number, 65504, the user is to see that the step must be skipped.
    _, grads = step(jnp.float32(2.0**40))
    assert not all(jnp.isfinite(grad).all() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (0, ValueError, "loss_scale=0: must be positive and finite"),
        (float("inf"), ValueError, "loss_scale=inf: must be positive and finite"),
        (
            10**400,
            ValueError,
            r"loss_scale=10*[.]*: must be positive and finite in float64, or None",
        ),
        (True, TypeError, "loss_scale=True: must be a positive number, or None"),
        ("dynamic", TypeError, "loss_scale='dynamic': must be a positive number, or None"),
        (np.ones(2, np.float32), ValueError, r"got an array float32\[2\]; give a scalar"),
        (np.complex64(1), ValueError, r"got an array complex64\[\]"),
    ],
)
def test_values_that_are_no_scale_are_refused(
    scale: Any, error: type[Exception], message: str
) -> None:
    grad_fn = dpj.value_and_grad(make_model(), mesh=make_mesh(2), num_microbatches=2)
    with pytest.raises(error, match=message):
        grad_fn(make_params(2), make_batch(2), loss_scale=scale)
