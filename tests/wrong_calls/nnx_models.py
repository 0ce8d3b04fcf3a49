"""Flax NNX models, and optimizers."""

from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dualpipe_jax as dpj
from tests.wrong_calls import arguments as of
from tests.wrong_calls import tensors, users
from tests.wrong_calls.linen_models import TOKENS, loss_of, part_functions, tree_mistakes
from tests.wrong_calls.mistakes import (
    Mistake,
    always,
    but,
    flags,
    left_out,
    mistake,
    names,
    wrong_type,
)
from tests.wrong_calls.oracle import Target
from tests.wrong_calls.steps import under_trace
from tests.wrong_calls.users import MESH


class Net(nnx.Module):
    """Holds layers in a list."""

    def __init__(self, rngs: nnx.Rngs, *, num_layers: int = 4, width: int = 4):
        self.embed = nnx.Embed(7, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(num_layers)])
        self.name = "net"


@cache
def _net() -> Net:
    return Net(nnx.Rngs(0))


def _embed(net: Any, ctx: Any) -> Any:
    return net.embed(ctx.microbatch)


def _block(layer: Any, x: Any, ctx: Any) -> Any:
    return layer(x)


def _head(net: Any, x: Any, ctx: Any) -> Any:
    return net.embed.attend(x)


def make_nnx(**arguments: Any) -> Any:
    """Makes a model, its parameters and a step."""
    model = dpj.nnx.model(**arguments)
    grad_fn = dpj.nnx.value_and_grad(model, mesh=MESH, num_microbatches=2)
    params = jax.eval_shape(model.params, _net())
    under_trace(grad_fn.of_params, params=params, batch=TOKENS)


@cache
def _nnx_model() -> Any:
    return dpj.nnx.model(_net(), embed=_embed, head=_head, loss=loss_of)


def _nnx_grad_fn(**arguments: Any) -> Any:
    made = dpj.nnx.value_and_grad(
        **{n: v for n, v in arguments.items() if n not in ("module", "batch", "rng")}
    )
    module: Any = arguments.get("module")
    given = {n: v for n, v in arguments.items() if n in ("batch", "rng")}
    return under_trace(lambda **traced: made(module, **traced), **given)


def _module_mistakes() -> list[Mistake]:
    """Mistakes in a module."""
    return [
        wrong_type(),
        left_out(),
        mistake("class for an object", Net, nnx.Linear),
        mistake("module of the other Flax", nn.Dense(3)),
        mistake("state for a module", nnx.state(_net())),
    ]


def _model_mistakes() -> dict[str, list[Mistake]]:
    """Mistakes in each argument of `nnx.model`."""
    return {
        "module": [
            *_module_mistakes(),
            mistake(
                "module without layers",
                nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
                also=("blocks",),
            ),
        ],
        "blocks": [
            wrong_type(),
            mistake(
                "unknown name",
                "layer",
                "name",
                "layers.x",
                "embed.layers",
                "layers.0",
            ),
            mistake("odd characters", "", ".", "layers.", ".layers", "la yers", "\ud800"),
            # A module that is no stack of layers, but could be one; then it is not found.
            mistake("another attribute", "embed", also=("embed",)),
            mistake("very long text", "x" * 100_000, "layers." * 10_000),
            mistake("bytes for text", b"layers"),
        ],
        "embed": [*part_functions(_embed), left_out()],
        "block": part_functions(_block, optional=True),
        "head": [*part_functions(_head), left_out()],
        "loss": part_functions(loss_of, optional=True),
        "weight": part_functions(users.weight, optional=True),
        "has_aux": flags(),
        "block_has_aux": flags(),
        "layout": [
            wrong_type(lambda v: v is None),
            mistake("too few", ("a",), ()),
            mistake("too many", ("a",) * 9, ("a",) * 20_000),
            mistake("text for a sequence", "aaaa"),
            mistake("number for a name", (0, 1, 2, 3), (None,) * 4),
        ],
        "ignore": [
            wrong_type(lambda v: v in ((), []) if isinstance(v, tuple | list) else False),
            mistake("unknown name", "nothing", ("kernel", "nothing"), "x" * 100_000),
            mistake("number for a name", (3,), [None]),
        ],
        "axis": but(
            names(("pipe",), extra=lambda v: isinstance(v, str)),
            "unknown name",
            "odd characters",
            "very long text",
        ),
    }


def _nnx_targets() -> list[Target]:
    net = _net()
    other = Net(nnx.Rngs(0), num_layers=3)
    tree = _nnx_model().params(net)
    modules = _module_mistakes()
    return [
        Target(
            name="nnx.model",
            call=make_nnx,
            valid={"module": net, "embed": _embed, "head": _head, "loss": loss_of},
            mistakes=_model_mistakes(),
            weight=2,
        ),
        Target(
            name="NNXModel.params",
            call=lambda **given: _nnx_model().params(**given),
            valid={"module": net},
            mistakes={"module": [*modules, mistake("module of another size", other)]},
        ),
        Target(
            name="NNXModel.state",
            call=lambda **given: _nnx_model().state(**given),
            valid={"tree": tree},
            mistakes={
                "tree": [
                    *tree_mistakes(tree, own="tree"),
                    mistake("extra key", {**tree, "more": tree["ends"]}),
                ]
            },
        ),
        Target(
            name="nnx.value_and_grad",
            call=_nnx_grad_fn,
            valid={
                "model": _nnx_model(),
                "mesh": MESH,
                "num_microbatches": 2,
                "module": net,
                "batch": TOKENS,
            },
            mistakes={
                "model": [wrong_type(), left_out(), mistake("model of another form", users.MODEL)],
                "mesh": of.mesh_mistakes(),
                "num_microbatches": of.count_mistakes(),
                "schedule": of.schedule_mistakes(),
                "module": [
                    *but(modules, "argument left out"),
                    mistake("module of another size", other),
                ],
                "batch": but(
                    tensors.batch_mistakes(), *_OF_DICT, "rows that do not divide", "array of NumPy"
                ),
                "rng": tensors.rng_mistakes(),
            },
            weight=2,
        ),
    ]


# Classes of mistakes in a batch that is a dict, and has the leaves x and y.
_OF_DICT = (
    "extra key",
    "integers for floats",
    "NaN",
    "wrong dtype",
    "wrong shape",
    "wrong type",
    "missing key",
    "list for a leaf",
    "None for a leaf",
)


def _optimizer_targets() -> list[Target]:
    params = users.PARAMS

    def run(**arguments: Any) -> Any:
        given = {n: arguments.pop(n) for n in ("params", "grads", "state") if n in arguments}
        tx = dpj.optimizers.per_layer(**arguments)

        def step(params: Any, grads: Any = None, state: Any = None) -> Any:
            state = tx.init(params) if state is None else state
            return tx.update(params if grads is None else grads, state, params)

        return under_trace(step, **given)

    return [
        Target(
            name="optimizers.per_layer",
            call=run,
            valid={"tx": optax.adam(1e-3), "params": params},
            mistakes={
                "tx": [
                    wrong_type(),
                    left_out(),
                    mistake("class for an object", optax.GradientTransformation, optax.adam),
                    mistake("several layers combined", optax.clip_by_global_norm(1.0)),
                    mistake("another form", optax.sgd(0.1), optax.lion(0.1), legal=always),
                ],
                "blocks": [
                    wrong_type(),
                    mistake("unknown name", "layers", "block", "", "x" * 100_000),
                    mistake("bytes for text", b"blocks"),
                ],
                "params": [
                    mistake("missing key", users.without(params, "blocks"), also=("blocks",)),
                    mistake(
                        "scalar for an array",
                        users.with_leaf(params, ("blocks", "b"), 1.0),
                        users.with_leaf(params, ("blocks", "b"), jnp.ones(())),
                    ),
                    mistake(
                        "text for a leaf",
                        users.with_leaf(params, ("blocks", "b"), "text"),
                        users.with_leaf(params, ("ends", "out"), "text"),
                    ),
                    mistake(
                        "object for a leaf", users.with_leaf(params, ("blocks", "b"), object())
                    ),
                ],
            },
            weight=2,
        )
    ]


def targets() -> list[Target]:
    """Lists the callables for NNX models, and of optimizers."""
    return [*_nnx_targets(), *_optimizer_targets()]
