"""Mistakes in the arguments of a call of a step: parameters, batch, key, loss scale."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.wrong_calls import users
from tests.wrong_calls.mistakes import (
    Mistake,
    always,
    amounts,
    left_out,
    mistake,
    never,
    wrong_type,
)
from tests.wrong_calls.users import BATCH, LAYERS, PARAMS, ROWS, D


def with_parameters(*paths: Sequence[str]) -> Callable[[Any], list[Any]]:
    return lambda value: [users.with_leaf(PARAMS, tuple(path), value) for path in paths]


_of_blocks = with_parameters(("blocks", "w"), ("blocks", "b"))
_of_leaves = with_parameters(("ends", "table"), ("blocks", "w"), ("blocks", "b"))
# A user's function has the values under these names.
_INSIDE = ("ends", "microbatch", "model", "x")


def params_mistakes() -> list[Mistake]:
    """Mistakes in parameters."""
    blocks = PARAMS["blocks"]
    return [
        wrong_type(),
        left_out(),
        mistake("missing key", {}, *(users.without(PARAMS, part) for part in ("ends", "blocks"))),
        mistake(
            "missing leaf",
            users.without(PARAMS, "ends", "table"),
            users.without(PARAMS, "blocks", "w"),
            also=_INSIDE,
        ),
        mistake("extra key", {**PARAMS, "block": 1}, {**PARAMS, "opt": jnp.ones(3)}),
        mistake("extra key", {**PARAMS, "shared": {"g": jnp.ones(2)}}, legal=always),
        mistake("key that is no text", {**PARAMS, 3: jnp.ones(3)}, {**PARAMS, None: jnp.ones(3)}),
        mistake(
            "text for a leaf",
            *_of_leaves("text"),
            *_of_leaves(np.array("text")),
            *_of_leaves(np.array(["text"] * LAYERS)),
        ),
        mistake("None for a leaf", *_of_leaves(None), also=_INSIDE),
        mistake("object for a leaf", *_of_leaves(object()), *_of_leaves({1}), *_of_leaves(len)),
        mistake(
            "object for a leaf",
            *_of_leaves(np.array([None] * LAYERS)),
            *_of_leaves(np.array(["2020-01-01"] * LAYERS, "datetime64[D]")),
        ),
        mistake("list for a leaf", *_of_blocks([1.0, 2.0]), *_of_blocks([]), also=_INSIDE),
        mistake("number beyond all floats", *_of_blocks(10**400), *_of_leaves(2**70)),
        mistake("scalar for an array", *_of_blocks(1.0), *_of_blocks(jnp.ones(()))),
        mistake("wrong leading dim", *(with_parameters(("blocks", "b"))(jnp.ones((3, D)))[0],)),
        mistake(
            "fewer layers than stages",
            *({**PARAMS, "blocks": jax.tree.map(lambda a, n=n: a[:n], blocks)} for n in (0, 1)),
        ),
        mistake("empty", {"ends": {}, "blocks": {}}, {"ends": (), "blocks": ()}, also=_INSIDE),
        mistake(
            "wrong shape",
            *_of_leaves(jnp.ones((LAYERS, D, D + 1)))[:2],
            *_of_leaves(jnp.ones((LAYERS, D + 1)))[2:],
            *_of_leaves(jnp.ones((LAYERS, D, D, 2, 3)))[1:2],
            also=_INSIDE,
        ),
        mistake("wrong dtype", *_of_blocks(jnp.ones((LAYERS, D, D), complex))[:1], also=_INSIDE),
        mistake("integers for floats", *_of_leaves(jnp.ones((LAYERS, D), int))[2:], legal=always),
        mistake("array of NumPy", jax.tree.map(np.asarray, PARAMS), legal=always),
        mistake("NaN", *_of_leaves(jnp.full((LAYERS, D), jnp.nan))[2:], legal=always),
    ]


def batch_mistakes() -> list[Mistake]:
    """Mistakes in a batch."""

    def of(leaf: Any) -> list[Any]:
        return [{**BATCH, "x": leaf}, {**BATCH, "y": leaf}]

    return [
        wrong_type(also=_INSIDE),
        left_out(),
        mistake("missing key", users.without(BATCH, "x"), users.without(BATCH, "y"), also=_INSIDE),
        mistake("extra key", {**BATCH, "z": jnp.ones((ROWS, 2))}, legal=always),
        mistake("extra key", {**BATCH, "z": 3}, {**BATCH, "z": "text"}, {**BATCH, "z": len}),
        mistake("text for a leaf", *of("text"), *of(np.array(["text"] * ROWS))),
        mistake("None for a leaf", *of(None), also=_INSIDE),
        mistake("object for a leaf", *of(object()), *of(np.array([None] * ROWS)), *of({1})),
        mistake("scalar for an array", *of(1.0), *of(jnp.ones(()))),
        mistake("list for a leaf", *of([1.0] * ROWS), *of([]), also=_INSIDE),
        mistake("wrong leading dim", *of(jnp.ones((ROWS + 2, D)))),
        mistake(
            "rows that do not divide",
            *(jax.tree.map(lambda a, n=n: a[:n], BATCH) for n in (0, 1, 3)),
        ),
        mistake("wrong shape", *of(jnp.ones((ROWS, D + 1))), of(jnp.ones(ROWS))[0], also=_INSIDE),
        mistake("wrong dtype", {**BATCH, "x": jnp.ones((ROWS, D), complex)}, also=_INSIDE),
        mistake("integers for floats", {**BATCH, "x": jnp.ones((ROWS, D), int)}, legal=always),
        mistake("array of NumPy", jax.tree.map(np.asarray, BATCH), legal=always),
        mistake("NaN", {**BATCH, "y": jnp.full(ROWS, jnp.nan)}, legal=always),
    ]


def rng_mistakes() -> list[Mistake]:
    """Mistakes in a key."""
    return [
        wrong_type(lambda v: v is None),
        mistake("number for a key", 0, 1, np.uint32(3), 2**40),
        mistake("wrong shape", jax.random.split(jax.random.key(0)), jnp.ones((3,), jnp.uint32)),
        mistake("wrong dtype", jnp.ones((2,)), jnp.ones((2,), jnp.int32), jnp.ones((2,), bool)),
        mistake("key of the old kind", jax.random.PRNGKey(0), legal=always),
    ]


def scale_mistakes() -> list[Mistake]:
    """Mistakes in a loss scale."""
    numbers = [each for each in amounts(is_open=True) if each.name not in ("wrong type", "NaN")]
    return [
        wrong_type(
            lambda v: v is None or (isinstance(v, int | float | np.floating) and bool(v > 0))
        ),
        *(each for each in numbers if each.name not in ("infinite", "number far too large")),
        mistake("infinite", float("inf"), float("-inf")),
        mistake("NaN", float("nan")),
        mistake("number far too large", 10**400, legal=never),
    ]
