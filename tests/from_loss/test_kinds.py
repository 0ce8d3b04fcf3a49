"""Layers that differ, in whole models: they become two kinds, or their values a table."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from tests.from_loss.test_equality import DIFFERENT, X, custom_vjp, with_constant

PARAMS = [jnp.full((3,), 0.5 + i) for i in range(4)]
# They differ in literals, in constants or in values made of these, and each layer gets its own.
BY_VALUE = {
    *("closed-over arrays", "literal", "literal, sign of zero", "nested jits of one name"),
    *("weak type", "key's algorithm", "scan, body", "branches"),
    # No parameter is in them: they travel, each layer's in a slot of its own.
    *("conv, padding", "conv, dilation", "conv, precision", "random bits"),
}
Layer = Callable[[Any], Any]


def loss_of(one: Layer, other: Layer) -> Callable[..., Any]:
    """Makes a loss whose layers are of two functions, by turns."""

    def loss_fn(params: Any, x: Any) -> Any:
        for i, scale in enumerate(params):
            y = (one, other)[i % 2](x * scale)
            x = x + jnp.sum(jnp.asarray(y, x.dtype)) * 1e-2 + jnp.sin(x * scale)
        return jnp.square(x).mean()

    return loss_fn


@pytest.mark.parametrize("name", DIFFERENT)
def test_layers_that_differ_are_of_several_kinds(name: str) -> None:
    loss_fn = loss_of(*DIFFERENT[name])
    model = dpj.from_loss(loss_fn, PARAMS, X.astype(float), layers="{}", max_kinds=4)
    assert (len(model.cut.kinds) == 1) == (name in BY_VALUE)


@pytest.mark.parametrize(
    "layers",
    [
        (custom_vjp(2.0), custom_vjp(3.0)),
        (with_constant(2.0), with_constant(3.0)),
        (lambda x: x * 2.0, lambda x: x * -0.0),
        DIFFERENT["nested jits of one name"],
        DIFFERENT["key's algorithm"],
        DIFFERENT["conv, padding"],
    ],
    ids=["custom_vjp", "constants", "literals", "nested jits", "keys", "convolutions"],
)
def test_each_layer_runs_its_own_function(layers: tuple[Layer, Layer]) -> None:
    loss_fn, batch = loss_of(*layers), jnp.asarray(np.random.default_rng(0).random((4, 3)))
    model = dpj.from_loss(loss_fn, PARAMS, batch, layers="{}", max_kinds=4)
    found = jax.value_and_grad(dpj.sequential(model, num_microbatches=1))(PARAMS, batch)
    wanted = jax.value_and_grad(loss_fn)(PARAMS, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
