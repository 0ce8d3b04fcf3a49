"""Taking JAX's types of varying values out of a traced function."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import P, lax

from dualpipe_jax._model import varying as _varying
from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import split_vjp


def test_types_in_a_loop_alone() -> None:
    """A loop's inputs and outputs are the same on all devices, its carry is not."""
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])

    @jax.checkpoint
    def loop(w: jax.Array, x: jax.Array, ctx: None) -> tuple[jax.Array, Aux]:
        def body(h: jax.Array, _: None) -> tuple[jax.Array, None]:
            return lax.psum(jnp.sin(h * w) * (lax.axis_index("model") + 1), "model"), None

        return lax.scan(body, x, length=2)[0], Aux()

    w = x = jnp.arange(1.0, 4)
    aval = jax.eval_shape(lambda: x)
    split = _varying.inside(
        lambda: split_vjp(loop, aval, aval, None), mesh=mesh, outer=(), manual=("model",)
    )

    def run(w: jax.Array, x: jax.Array, dy: jax.Array) -> list[jax.Array]:
        _, _, residual, weight_residual = split.forward(w, x, None)
        dx, stash, *_ = split.input_grad(w, None, residual, weight_residual, [dy], None)
        dw = split.weight_grad(w, None, weight_residual, stash)
        assert split.reduce_axes == ((),)
        return [*dw, *dx]

    plain = jax.shard_map(run, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    _, pull = jax.vjp(lambda w, x: 3 * jnp.sin(3 * jnp.sin(x * w) * w), w, x)
    for got, want in zip(jax.jit(plain)(w, x, x), pull(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_an_axis_spreads_from_leaf_to_leaf() -> None:
    """Each round carries it one leaf on, as many rounds as there are leaves, and one to see it."""
    mesh = jax.make_mesh((2,), ("model",), devices=jax.devices()[:2])
    rounds = []

    def step(x: list[jax.ShapeDtypeStruct]) -> tuple[list, int]:
        rounds.append(x)
        first = _varying.aval(x[0], ["model"])
        return [[first, *x[:-1]]], len(rounds)

    aval = jax.ShapeDtypeStruct((3,), jnp.float32)
    x, last = _varying.inside(
        lambda: _varying.close_over(step, [aval] * 3), mesh=mesh, outer=(), manual=("model",)
    )
    assert last == len(rounds) == 4
    assert [_varying.varies_over(leaf) for leaf in x] == [{"model"}] * 3
