"""Models of loss functions: `from_loss`, and the trees of its models."""

from typing import Any

import jax
import jax.numpy as jnp

import dualpipe_jax as dpj
from tests.wrong_calls import tensors, users
from tests.wrong_calls.linen_models import tree_mistakes
from tests.wrong_calls.mistakes import (
    Mistake,
    but,
    counts,
    flags,
    functions,
    left_out,
    mistake,
    wrong_type,
)
from tests.wrong_calls.oracle import Target
from tests.wrong_calls.users import BATCH, LAYERS, D, UsersError

PARAMS: dict[str, Any] = {
    "table": jnp.ones((D, D)),
    **{f"layer_{i}": {"w": jnp.ones((D, D))} for i in range(LAYERS)},
}


def loss_fn(params: Any, batch: Any, rng: Any = None) -> Any:
    x = batch["x"] @ params["table"]
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params[f"layer_{i}"]["w"])
    return jnp.square(x.sum(-1) - batch["y"]).mean()


def _returns(change: Any) -> Any:
    return lambda params, batch: change(loss_fn(params, batch))


def _backwards(params: Any, batch: Any) -> Any:
    x = batch["x"] @ params["table"]
    for i in reversed(range(LAYERS)):
        x = x + jnp.tanh(x @ params[f"layer_{i}"]["w"])
    return x.sum()


def _prints(params: Any, batch: Any) -> Any:
    jax.debug.print("{}", batch["y"].sum())
    return loss_fn(params, batch)


def _mistakes() -> dict[str, list[Mistake]]:
    """Mistakes in each argument of `from_loss`."""
    return {
        "loss_fn": [
            *functions(),
            left_out(),
            mistake("returns another type", _returns(lambda loss: "text"), also=("loss_fn",)),
            mistake("returns nothing", _returns(lambda loss: None)),
            mistake("returns no scalar", _returns(lambda loss: jnp.ones(3) * loss)),
            mistake("returns a triple", _returns(lambda loss: (loss, loss, loss))),
            mistake("function that raises", users.raises, raises=UsersError),
            mistake("layers out of order", _backwards),
            mistake("effect", _prints),
        ],
        "params": [
            left_out(),
            mistake("missing layer", users.without(PARAMS, "layer_2"), also=("layers",)),
            mistake("text for a leaf", {**PARAMS, "table": "text"}),
            mistake("object for a leaf", {**PARAMS, "table": object()}),
            mistake("keys of several types", {**PARAMS, 3: jnp.ones(1)}),
        ],
        "microbatch": [
            left_out(),
            mistake("empty", {}, ()),
            mistake("scalar for an array", {**BATCH, "y": 1.0}),
            mistake("other leading dims", {**BATCH, "y": jnp.ones(3)}),
            mistake("text for a leaf", {**BATCH, "y": "text"}),
            mistake("object for a leaf", {**BATCH, "y": object()}),
        ],
        "layers": [
            wrong_type(lambda v: isinstance(v, list | tuple) and all(type(n) is str for n in v)),
            left_out(),
            mistake("unknown name", "layers_{}", "layer", "layer_{}/v", "{}", "x" * 100_000),
            mistake("odd characters", "", "/", "layer_{}/", "layer_{}_{}", "\ud800", "layer_(.*)"),
            mistake("empty", (), [], ("",)),
            mistake("named twice", ("layer_{}", "layer_{}")),
            mistake("bytes for text", b"layer_{}"),
        ],
        "shared": [
            wrong_type(lambda v: isinstance(v, list | tuple) and all(type(n) is str for n in v)),
            mistake("unknown name", "layer_9", ("table", "nothing"), "tab"),
            mistake("odd characters", "", "/table", "\ud800"),
            mistake("bytes for text", b"table"),
        ],
        "rng": tensors.rng_mistakes(),
        "has_aux": [*flags(), mistake("metrics that are not there", True, also=("loss_fn",))],
        "weight": functions(optional=True),
        "max_x": but(counts(), "number far too large", "number beyond all floats"),
        "max_kinds": but(counts(optional=True), "number far too large", "number beyond all floats"),
    }


def targets() -> list[Target]:
    """Lists the callables of loss functions' models."""
    model = dpj.from_loss(loss_fn, PARAMS, BATCH, layers="layer_{}")
    canonical = model.params(PARAMS)
    valid = {"loss_fn": loss_fn, "params": PARAMS, "microbatch": BATCH, "layers": "layer_{}"}
    return [
        Target(name="from_loss", call=dpj.from_loss, valid=valid, mistakes=_mistakes(), weight=3),
        Target(
            name="LossModel.params",
            call=lambda **given: model.params(**given),
            valid={"tree": PARAMS},
            mistakes={
                "tree": [
                    wrong_type(also=("params",)),
                    mistake("missing key", users.without(PARAMS, "table"), also=("params",)),
                    mistake("wrong shape", {**PARAMS, "table": jnp.ones(3)}, also=("params",)),
                    mistake(
                        "wrong dtype", {**PARAMS, "table": jnp.ones((D, D), int)}, also=("params",)
                    ),
                ]
            },
        ),
        Target(
            name="LossModel.tree",
            call=lambda **given: model.tree(**given),
            valid={"canonical": canonical},
            mistakes={
                "canonical": [
                    *but(tree_mistakes(canonical, own="canonical"), "extra key"),
                    mistake("another form", PARAMS),
                ]
            },
        ),
    ]
