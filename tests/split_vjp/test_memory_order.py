"""The order in memory of the values that the forward keeps for the backward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import split_vjp

ROWS, LENGTH, HEADS, SIZE = 2, 5, 3, 4
WIDTH = HEADS * SIZE
PARAMS = {
    "qkv": jnp.ones((WIDTH, 3 * WIDTH)),
    "out": jnp.ones((WIDTH, WIDTH)),
    "up": jnp.ones((WIDTH, 4 * WIDTH)),
    "down": jnp.ones((4 * WIDTH, WIDTH)),
}


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    scores = jax.nn.softmax(jnp.einsum("rqhd,rkhd->rhqk", query, key))
    return jnp.einsum("rhqk,rkhd->rqhd", scores, value).reshape(ROWS, LENGTH, WIDTH)


def _fused(params: Any, x: jax.Array) -> jax.Array:
    heads = (x @ params["qkv"]).reshape(ROWS, LENGTH, 3, HEADS, SIZE)
    return _attend(*jnp.moveaxis(heads, 2, 0)) @ params["out"]


def _separate(params: Any, x: jax.Array) -> jax.Array:
    weights = jnp.split(params["qkv"], 3, axis=-1)
    heads = ((x @ weight).reshape(ROWS, LENGTH, HEADS, SIZE) for weight in weights)
    return _attend(*heads) @ params["out"]


def _scanned(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (jnp.sin(x), None), x @ params["out"], length=2)[0]


def _orders(block: Callable[..., Any]) -> list[tuple[tuple[int, ...], tuple[int, ...], bool]]:
    x = jnp.ones((ROWS, LENGTH, WIDTH))
    split = split_vjp(lambda params, x, ctx: (block(params, x), Aux()), PARAMS, x, ())
    avals = (*split.residual, *split.weight_residual)
    orders = (*split.residual_orders, *split.weight_residual_orders)
    return [(a.shape, o.dims, o.is_sure) for a, o in zip(avals, orders, strict=True)]


def test_stacked_parts_come_first_then_heads() -> None:
    found = _orders(_fused)
    assert ((3, ROWS, LENGTH, HEADS, SIZE), (0, 1, 3, 2, 4), True) in found


def test_operands_have_the_order_in_which_the_backward_contracts_them() -> None:
    found = [dims for shape, dims, _ in _orders(_separate) if shape == (ROWS, LENGTH, HEADS, SIZE)]
    # Queries and keys are contracted over tokens, values over a head's entries.
    assert sorted(found) == [(0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 3, 1)]


def test_scores_are_left_to_the_compiler() -> None:
    for block in (_fused, _separate):
        scores = [order for order in _orders(block) if order[0] == (ROWS, HEADS, LENGTH, LENGTH)]
        assert scores
        assert not any(is_sure for _, _, is_sure in scores)


def test_a_result_has_the_order_in_which_its_contraction_makes_it() -> None:
    """Values times scores: heads, entries, tokens; heads and entries are joined after it."""
    found = [dims for shape, dims, _ in _orders(_fused) if shape == (ROWS, LENGTH, WIDTH)]
    assert (0, 2, 1) in found


def test_without_batch_dims_values_are_stored_row_by_row() -> None:
    def mlp(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ params["up"]) @ params["down"]

    assert _orders(mlp) == [
        ((ROWS, LENGTH, WIDTH), (0, 1, 2), True),
        ((ROWS, LENGTH, 4 * WIDTH), (0, 1, 2), True),
    ]


def test_readers_that_are_not_opened_may_want_anything() -> None:
    kept = [is_sure for shape, _, is_sure in _orders(_scanned) if len(shape) > 3]
    assert kept
    assert not any(kept)
