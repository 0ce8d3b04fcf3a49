"""Flax Linen models: `linen.model`, its methods, and conversions."""

from collections.abc import Callable
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dualpipe_jax as dpj
from tests.wrong_calls import users
from tests.wrong_calls.mistakes import (
    Mistake,
    UsersError,
    always,
    but,
    counts,
    flags,
    functions,
    left_out,
    mistake,
    names,
    wrong_type,
)
from tests.wrong_calls.oracle import Target
from tests.wrong_calls.steps import under_trace
from tests.wrong_calls.users import MESH

TOKENS = jnp.arange(8).reshape(4, 2) % 7


def loss_of(logits: Any, tokens: Any) -> Any:
    return jnp.square(logits).mean()


def part_functions(good: Any, *, optional: bool = False) -> list[Mistake]:
    """Mistakes in a function of a Flax model."""
    wrong, inside = (None, "text", object(), {}, len), ("model", "loss", "logits")
    return [
        *functions(optional=optional, also=inside),
        mistake("function that returns nonsense", *map(users.returns, wrong), also=inside),
        mistake("function that raises", users.raises, raises=UsersError),
    ]


_PARTS: dict[str, Any] = {
    "embed": nn.Embed(7, 4),
    "block": nn.Dense(4),
    "head": nn.Dense(7),
    "loss": loss_of,
}


@cache
def _linen() -> Any:
    return dpj.linen.model(**_PARTS)


@cache
def _linen_params() -> Any:
    return under_trace(_linen().init, key=jax.random.key(0), batch=TOKENS, num_layers=4)


@cache
def _arrays() -> Any:
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), _linen_params())


def make_linen(**arguments: Any) -> Any:
    """Makes a model, its parameters and a step."""
    model = dpj.linen.model(**arguments)
    init: Any = model.init
    params = under_trace(init, key=jax.random.key(0), batch=TOKENS, num_layers=4)
    grad_fn = dpj.value_and_grad(model, mesh=MESH, num_microbatches=2)
    under_trace(grad_fn, params=params, batch=TOKENS)


def _module_mistakes(good: Any) -> list[Mistake]:
    """Mistakes in a Linen module."""
    return [
        wrong_type(),
        left_out(),
        mistake("class for an object", nn.Dense, nn.Embed),
        mistake("module of the other Flax", nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
        mistake("pair of other things", (good, 3), (3, len), (good, good, good), (good,), ()),
        mistake(
            "wrong shape",
            nn.Dense(3) if good is _PARTS["embed"] else nn.Dense(5),
            also=("model", "embed", "head", "block"),
        ),
    ]


_KWARGS = [
    wrong_type(lambda v: v is None or v == {} if isinstance(v, dict | None) else False),
    mistake("number for a name", {3: 1}, {None: 2}),
    mistake("unknown keyword of the module", {"determinstic": True}, {"x": 1}),
]


def _linen_mistakes() -> dict[str, list[Mistake]]:
    return {
        "embed": _module_mistakes(_PARTS["embed"]),
        "block": _module_mistakes(_PARTS["block"]),
        "head": but(_module_mistakes(_PARTS["head"]), "wrong shape"),  # logits may be of any width
        "loss": part_functions(loss_of, optional=True),
        "weight": part_functions(users.weight, optional=True),
        "has_aux": flags(),
        "block_has_aux": flags(),
        "layout": [
            wrong_type(lambda v: v is None),
            mistake("name without a kind", ("a",) * 4, ["block"] * 4, ("a",)),
            mistake("text for a sequence", "abbb"),
            mistake("number for a name", (0, 1), (None,) * 4),
        ],
        **{f"{part}_kwargs": _KWARGS for part in ("embed", "block", "head")},
        "rngs": [
            wrong_type(
                lambda v: (
                    isinstance(v, str) or v in ((), [])
                    if isinstance(v, str | tuple | list)
                    else False
                )
            ),
            mistake("number for a name", (1, 2), [None], ("dropout", 3)),
            mistake("bytes for text", b"dropout", (b"dropout",)),
        ],
        "constants": [
            wrong_type(lambda v: v is None or v == {} if isinstance(v, dict | None) else False),
            mistake("missing key", {"stats": {}}, {"stats": {"ends": {}}}),
            mistake("extra key", {"params": {"ends": {}, "blocks": {}}}),
            mistake("text for a leaf", {"stats": "text"}, {"stats": 3}),
            mistake("key that is no text", {3: {"ends": {}}}),
        ],
        "axis": but(
            names(("pipe",), extra=lambda v: isinstance(v, str)),
            "unknown name",
            "odd characters",
            "very long text",
        ),
    }


def _init(name: str) -> Callable[..., Any]:
    def call(**arguments: Any) -> Any:
        layers = {n: arguments.pop(n) for n in ("num_layers",) if n in arguments}
        return under_trace(
            lambda **traced: getattr(_linen(), name)(**traced, **layers), **arguments
        )

    return call


def _init_mistakes() -> dict[str, list[Mistake]]:
    return {
        "key": [
            wrong_type(),
            left_out(),
            mistake("number for a key", 0, 1, 2**40),
            mistake("wrong shape", jax.random.split(jax.random.key(0)), jnp.ones(3, jnp.uint32)),
            mistake("wrong dtype", jnp.ones(2), jnp.ones(2, bool)),
            mistake("key of the old kind", jax.random.PRNGKey(0), legal=always),
        ],
        "batch": [
            left_out(),
            mistake("text for a leaf", "text", {"x": "text"}, np.array("text")),
            mistake("object for a leaf", object(), [len]),
            mistake(
                "wrong dtype",
                jnp.ones((4, 2), complex),
                jnp.ones((4, 2)),
                also=("embed", "microbatch"),
            ),
        ],
        "num_layers": [*counts(most=10**8), left_out()],
    }


def tree_mistakes(good: Any, *, own: str) -> list[Mistake]:
    """Mistakes in a tree of parameters."""
    return [
        wrong_type(),
        left_out(),
        mistake("missing key", {}, *(users.without(good, key) for key in good)),
        mistake("text for a leaf", dict.fromkeys(good, "text"), also=(own,)),
        mistake("key that is no text", {**good, 3: 1}, {1: 2}),
    ]


_FLAX_PARAMS = {
    "embed": jnp.ones(5),
    **{f"layers_{i}": {"w": jnp.ones(2)} for i in range(3)},
}


def _layers_mistakes() -> list[Mistake]:
    return [
        wrong_type(),
        left_out(),
        mistake("unknown name", "blocks_{}", "layer_{}", "layers", "a/layers_{}", also=("tree",)),
        mistake(
            "odd characters",
            "layers_{}{}",
            "{}/layers",
            "/",
            "//",
            "layers_{}/",
            "a//b",
            "layers_{0}",
            "layers_{",
            "layers_\ud800{}",
            also=("tree",),
        ),
        mistake("very long text", "x" * 100_000, "a/" * 10_000 + "layers_{}", also=("tree",)),
    ]


def _conversion_mistakes() -> dict[str, list[Mistake]]:
    return {
        "layers": _layers_mistakes(),
        "dim": [
            wrong_type(lambda v: isinstance(v, int) and not isinstance(v, bool)),
            mistake("bool for a number", True, False),
            mistake("float for an integer", 0.0, 1.5, float("nan")),
            mistake("number far too large", 1, -1, 5, 10**30, 10**5000),
        ],
        "axis": but(
            names(("pipe",), extra=lambda v: isinstance(v, str)),
            "unknown name",
            "odd characters",
            "very long text",
        ),
        "layout": [
            wrong_type(lambda v: v is None),
            mistake("too few", ("a",), ()),
            mistake("too many", ("a",) * 9, ("a",) * 20_000),
            mistake("text for a sequence", "aaa"),
            mistake("number for a name", (0, 1, 2), (None,) * 3),
        ],
    }


def _conversions() -> list[Target]:
    canonical = dpj.linen.to_canonical(_FLAX_PARAMS, "layers_{}")
    return [
        Target(
            name="linen.to_canonical",
            call=dpj.linen.to_canonical,
            valid={"tree": _FLAX_PARAMS, "layers": "layers_{}"},
            mistakes={
                **_conversion_mistakes(),
                "tree": [
                    wrong_type(),
                    left_out(),
                    mistake("missing key", {}, users.without(_FLAX_PARAMS, "layers_1")),
                    mistake("wrong shape", {**_FLAX_PARAMS, "layers_1": {"w": jnp.ones(3)}}),
                    mistake(
                        "text for a leaf",
                        {**_FLAX_PARAMS, "layers_1": "text"},
                        {**_FLAX_PARAMS, "layers_1": {"w": "text"}},
                        {**_FLAX_PARAMS, **{f"layers_{i}": {"w": "t"} for i in range(3)}},
                    ),
                    mistake("wrong structure", {**_FLAX_PARAMS, "layers_1": {"v": jnp.ones(2)}}),
                    mistake("key that is no text", {**_FLAX_PARAMS, 3: 1}),
                ],
            },
        ),
        Target(
            name="linen.to_flax",
            call=dpj.linen.to_flax,
            valid={"tree": canonical, "layers": "layers_{}"},
            mistakes={
                **_conversion_mistakes(),
                # Any name is one for the layers of the result.
                "layers": [
                    wrong_type(lambda v: isinstance(v, str) and v != ""),
                    mistake("odd characters", "layers_{}{}", "{}/layers", "/", "a//b", ""),
                ],
                "partition_name": but(
                    names(("pipe",), extra=lambda v: isinstance(v, str)),
                    "unknown name",
                    "odd characters",
                    "very long text",
                ),
                "tree": [
                    wrong_type(),
                    left_out(),
                    mistake("missing key", {}, *(users.without(canonical, k) for k in canonical)),
                    mistake("extra key", {**canonical, "more": 1}, {**canonical, 3: 1}),
                    mistake(
                        "text for a leaf",
                        {**canonical, "blocks": "text"},
                        {**canonical, "ends": "text"},
                    ),
                    mistake("scalar for an array", {**canonical, "blocks": {"w": jnp.ones(())}}),
                    mistake(
                        "wrong leading dim",
                        {**canonical, "blocks": {"w": jnp.ones((3, 2)), "v": jnp.ones((2, 2))}},
                    ),
                ],
            },
        ),
    ]


def targets() -> list[Target]:
    """Lists the callables for Linen models."""
    variables = _linen().to_variables(_arrays())
    return [
        Target(
            name="linen.model", call=make_linen, valid=_PARTS, mistakes=_linen_mistakes(), weight=2
        ),
        Target(
            name="LinenModel.init",
            call=_init("init"),
            mistakes=_init_mistakes(),
            valid={"key": jax.random.key(0), "batch": TOKENS, "num_layers": 4},
        ),
        Target(
            name="LinenModel.init_variables",
            call=_init("init_variables"),
            mistakes=_init_mistakes(),
            valid={"key": jax.random.key(0), "batch": TOKENS, "num_layers": 4},
        ),
        Target(
            name="LinenModel.to_variables",
            call=lambda **given: _linen().to_variables(**given),
            valid={"params": _arrays()},
            # Other parts stay as they are.
            mistakes={"params": but(tree_mistakes(_arrays(), own="params"), "key that is no text")},
        ),
        Target(
            name="LinenModel.to_params",
            call=lambda **given: _linen().to_params(**given),
            valid={"variables": variables},
            mistakes={"variables": tree_mistakes(variables, own="variables")},
        ),
        Target(
            name="LinenModel.with_constants",
            call=lambda **given: _linen().with_constants(**given),
            valid={"constants": {}},
            mistakes={"constants": _linen_mistakes()["constants"]},
        ),
        *_conversions(),
    ]
