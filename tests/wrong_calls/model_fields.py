"""Mistakes in the fields of a Model, and in the Aux that a block returns."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.wrong_calls import users
from tests.wrong_calls.mistakes import (
    Mistake,
    UsersError,
    always,
    flags,
    functions,
    is_big,
    left_out,
    mistake,
    wrong_type,
)
from tests.wrong_calls.users import LAYERS


def _nonsense(function: Any, *, more: tuple[Any, ...] = ()) -> list[Mistake]:
    """Mistakes in a function of the model."""
    wrong = (None, "text", object(), [], {}, len, *more)
    return [
        mistake("function that returns nonsense", *map(users.returns, wrong)),
        mistake("function that raises", users.raises, raises=UsersError),
        mistake(
            "function that returns another shape",
            users.changes(function, lambda y: y[..., None, None]),
            users.changes(function, lambda y: (y, y)),
            users.changes(function, lambda y: {"y": y}),
            users.changes(function, lambda y: jnp.ones((2, 3, 5))),
        ),
        mistake(
            "function that returns another dtype",
            users.changes(function, lambda y: y > 0),
            users.changes(function, lambda y: y.astype(complex)),
        ),
    ]


def model_fields(functions_of: Mapping[str, Any]) -> dict[str, list[Mistake]]:
    """Mistakes in each field of a Model."""
    numbered = (float("nan"), 3, True)
    mistakes = {
        "embed": [
            *functions(),
            *(m for m in _nonsense(users.embed) if m.name.endswith(("nonsense", "raises"))),
            left_out(),
        ],
        "head": [*functions(), *_nonsense(users.head, more=(3, True)), left_out()],
        "weight": [*functions(optional=True), *_nonsense(users.weight, more=(True,))],
        "has_aux": flags(),
        "block_has_aux": flags(),
    }
    if "layout" in functions_of:
        mistakes["block"] = [
            wrong_type(callable, also=("layout",)),
            mistake("missing key", {}, {"a": users.block}),
            mistake("extra key", {**functions_of["block"], "c": users.block}, also=("layout",)),
            mistake("None for a leaf", {**functions_of["block"], "a": None}),
        ]
        mistakes["layout"] = [
            wrong_type(),
            mistake("unknown name", ("a", "b", "b", "c"), ("a", "b", "b", "\ud800")),
            mistake("too few", ("a", "b"), ("a", "a", "a", "a"), (), also=("params", "blocks")),
            mistake("too many", ("a", *"bbbbbbb"), ("a",) * 20_000, also=("params", "blocks")),
            mistake("text for a sequence", "abbb", "a"),
            mistake("number for a name", (0, 1, 1, 1), ("a", "b", "b", None)),
        ]
    else:
        mistakes["block"] = [*functions(), *_nonsense(users.block, more=numbered), left_out()]
        mistakes["layout"] = [
            wrong_type(lambda v: v is None),
            mistake("name without a kind", ("a",) * LAYERS, ["block"] * LAYERS),
        ]
    return mistakes


def aux_mistakes() -> dict[str, list[Mistake]]:
    """Mistakes in the fields of an Aux that a block returns."""
    vector, nan = jnp.ones(3), float("nan")
    numbers = bool | int | float | complex | np.number | np.bool_
    return {
        "loss": [
            wrong_type(lambda v: v is None or isinstance(v, float | np.floating)),
            mistake("array for a number", vector, jnp.ones((1, 1)), np.ones(2)),
            mistake("wrong dtype", jnp.ones((), int), jnp.ones((), complex), True, 3),
            mistake("NaN", nan, jnp.float32(nan), legal=always),
        ],
        "metrics": [
            wrong_type(lambda v: v is None or isinstance(v, numbers) or is_big(v)),
            mistake("text for a leaf", {"m": "text"}, ["a", 1], np.array("text")),
            mistake("object for a leaf", {"m": object()}, (len, 1), np.array([None])),
            mistake("key for a leaf", {"m": jax.random.key(0)}),
            mistake("another form", {"m": vector}, [1, True], {}, 2.5, nan, legal=always),
        ],
    }
