"""Layers that differ become two kinds, or tables, as a whole model: the block that runs is theirs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from tests.from_loss.test_equality import DIFFERENT, X, custom_vjp, with_constant

PARAMS = [jnp.full((3,), 0.5 + i) for i in range(4)]
# They differ in values alone, which a table gives each layer.
BY_TABLE = {"closed-over arrays", "literal", "literal, sign of zero"}
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
def test_layers_that_differ_are_of_two_kinds(name: str) -> None:
    model = dpj.from_loss(loss_of(*DIFFERENT[name]), PARAMS, X.astype(float), layers="{}")
    assert len(model.cut.kinds) == (1 if name in BY_TABLE else 2)


@pytest.mark.parametrize(
    "layers",
    [
        (custom_vjp(2.0), custom_vjp(3.0)),
        (with_constant(2.0), with_constant(3.0)),
        (lambda x: x * 2.0, lambda x: x * -0.0),
    ],
    ids=["custom_vjp", "constants", "literals"],
)
def test_each_layer_runs_its_own_function(layers: tuple[Layer, Layer]) -> None:
    loss_fn, batch = loss_of(*layers), jnp.asarray(np.random.default_rng(0).random((4, 3)))
    model = dpj.from_loss(loss_fn, PARAMS, batch, layers="{}")
    found = jax.value_and_grad(dpj.sequential(model, num_microbatches=1))(PARAMS, batch)
    wanted = jax.value_and_grad(loss_fn)(PARAMS, batch)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
