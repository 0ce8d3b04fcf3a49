"""Chains that end in a barrier, stashes that may wait, values read from a slot in parts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax._executor.buffers import SlotBuffer
from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import split_vjp

PARAMS = {
    "up": jnp.ones((4, 8)),
    "gate": jnp.ones((4, 8)),
    "down": jnp.ones((8, 4)),
    "qkv": jnp.ones((4, 3, 4)),
    "many": jnp.ones((4, 12, 4)),
}
ROWS = 2


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x @ params["up"]) @ params["down"]


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    return jax.nn.softmax(query @ key.T) @ value


def _stacked(params: Any, x: jax.Array) -> jax.Array:
    return _attend(*jnp.einsum("td,dck->ctk", x, params["qkv"]))


def _apart(params: Any, x: jax.Array) -> jax.Array:
    return _attend(*(x @ params["qkv"][:, i] for i in range(3)))


def _all_of_it(params: Any, x: jax.Array) -> jax.Array:
    stacked = jnp.einsum("td,dck->ctk", x, params["qkv"])
    return _attend(*stacked) + jnp.tanh(stacked).sum(0)


def _split(block: Callable[..., Any]) -> Any:
    x = jnp.ones((ROWS, 4))
    return split_vjp(lambda params, x, ctx: (x + block(params, x), Aux()), PARAMS, x, ())


def _waiting(block: Callable[..., Any]) -> list[tuple[tuple[int, ...], bool]]:
    split = _split(block)
    both = zip(split.stash, split.stash_may_wait, strict=True)
    return sorted((aval.shape, may) for aval, may in both)


def test_cotangents_wait() -> None:
    assert _waiting(_mlp) == [((ROWS, 4), True), ((ROWS, 8), True)]


def test_recomputed_values_do_not() -> None:
    """One operand of the second matmul is recomputed: the activation."""
    recomputed = (ROWS, 8), False
    assert _waiting(jax.checkpoint(_mlp)) == [((ROWS, 4), True), recomputed, ((ROWS, 8), True)]


def test_moved_values_do_not() -> None:
    """Cotangents of queries, keys and values, put together for one contraction; all else would."""
    split = _split(lambda params, x: _stacked(params, _mlp(params, x)))
    moved = [
        may for aval, may in zip(split.stash, split.stash_may_wait, strict=True) if 3 in aval.shape
    ]
    assert moved == [False]
    assert any(split.stash_may_wait)


def test_if_nothing_else_is_left_all_wait() -> None:
    split = _split(_stacked)
    assert split.stash
    assert all(split.stash_may_wait)


def _many(params: Any, x: jax.Array) -> jax.Array:
    stacked = jnp.einsum("td,dck->ctk", x, params["many"])
    heads = [_attend(stacked[i], stacked[i + 1], stacked[i + 2]) for i in range(0, 12, 3)]
    return jnp.stack(heads).sum(0)


@pytest.mark.parametrize(
    ("block", "count"),
    [
        (_stacked, 1),
        (jax.checkpoint(_stacked), 0),
        (_apart, 0),
        (_all_of_it, 0),
        (_many, 0),  # twelve would be too many
    ],
)
def test_parts(block: Callable[..., Any], count: int) -> None:
    split = _split(block)
    parts = (*split.residual_parts, *split.weight_residual_parts)
    assert len(parts) == len(split.residual) + len(split.weight_residual)
    assert sorted(set(parts)) == ([1, 3] if count else [1])
    assert parts.count(3) == count


@pytest.mark.parametrize("is_unrolled", [True, False])
def test_reading_in_parts_reads_the_same(is_unrolled: bool) -> None:
    lead = (4,) if is_unrolled else (4, 2)
    arrays = tuple(
        jnp.arange(math.prod(lead + shape), dtype=jnp.float32).reshape(lead + shape)
        for shape in ((6, 2), (3,), ())
    )
    buffer = SlotBuffer(
        (arrays, arrays) if is_unrolled else arrays,
        shapes=((6, 2), (3,), ()),
        memory_orders=(None,) * 3,
        parts=(3, 1, 1),
        is_unrolled=is_unrolled,
    )
    whole, parts = (buffer.read(1, jnp.int32(2), in_parts=is_on) for is_on in (False, True))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, whole, parts))


def test_a_value_read_in_parts_is_not_put_together() -> None:
    """XLA sees that the readers take it apart again; where they want all of it, it is."""
    buffer = jnp.ones((4, 3, 8, 8))

    def text(reader: Callable[..., Any]) -> str:
        def read(buffer: jax.Array, slot: jax.Array) -> jax.Array:
            layers = SlotBuffer(
                ((buffer,),),
                shapes=((3, 8, 8),),
                memory_orders=(None,),
                parts=(3,),
                is_unrolled=True,
            )
            (value,) = layers.read(0, slot, in_parts=True)
            return reader(value)

        return str(jax.jit(read).lower(buffer, jnp.int32(1)).compile().as_text())

    assert "concatenate" not in text(lambda value: _attend(value[0], value[1], value[2]))
    assert "concatenate" in text(lambda value: value)


# --- finish_chains: where a forward keeps an activation function with the contraction before it -


def _gated(params: Any, x: jax.Array) -> jax.Array:
    return (jax.nn.silu(x @ params["gate"]) * (x @ params["up"])) @ params["down"]


def _plain(params: Any, x: jax.Array) -> jax.Array:
    return jnp.maximum(x @ params["up"], 0) @ params["down"]


def _of_x(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x) @ params["up"] @ params["down"]


def _softmax(params: Any, x: jax.Array) -> jax.Array:
    return jax.nn.softmax(x @ params["up"]) @ params["down"]


@pytest.mark.parametrize(
    ("block", "count"), [(_mlp, 1), (_gated, 1), (_plain, 0), (_of_x, 0), (_softmax, 0)]
)
def test_barriers_of_a_rematerialised_forward(block: Callable[..., Any], count: int) -> None:
    assert _barriers(jax.checkpoint(block)) == count


@pytest.mark.parametrize("block", [_mlp, _gated])
def test_stored_input_needs_none(block: Callable[..., Any]) -> None:
    assert _barriers(block) == 0


def _barriers(block: Callable[..., Any]) -> int:
    x = jnp.ones((ROWS, 4))
    text = str(jax.make_jaxpr(_split(block).forward)(PARAMS, x, ()))
    return text.count("optimization_barrier")
