"""The valid arguments from which wrong calls start: a model, its parameters, a batch, meshes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dualpipe_jax as dpj
from tests.wrong_calls.mistakes import UsersError

D, ROWS, LAYERS = 4, 4, 4


def make_mesh(*sizes: int, names: tuple[str, ...] = ("pipe", "data"), **more: Any) -> Any:
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names[: len(sizes)], devices=devices, **more)


MESH = make_mesh(2, 2)
PARAMS: dict[str, Any] = {
    "ends": {"table": jnp.ones((D, D)), "out": jnp.ones(D)},
    "blocks": {"w": jnp.ones((LAYERS, D, D)), "b": jnp.ones((LAYERS, D))},
}
BATCH: dict[str, Any] = {"x": jnp.ones((ROWS, D)), "y": jnp.ones(ROWS)}


def embed(ends: Any, ctx: dpj.Context) -> Any:
    return ctx.microbatch["x"] @ ends["table"]


def block(params: Any, x: Any, ctx: dpj.Context) -> Any:
    return x + jnp.tanh(x @ params["w"] + params["b"])


def head(ends: Any, x: Any, ctx: dpj.Context) -> Any:
    return jnp.mean(x @ ends["out"] - ctx.microbatch["y"])


def head_with_metrics(ends: Any, x: Any, ctx: dpj.Context) -> Any:
    return head(ends, x, ctx), {"rows": x.shape[0]}


def errors_of_rows(ends: Any, x: Any, ctx: dpj.Context) -> Any:
    return x @ ends["out"] - ctx.microbatch["y"]


def weight(microbatch: Any) -> Any:
    return microbatch["y"].sum()


FUNCTIONS: dict[str, Any] = {"embed": embed, "block": block, "head": head}
MODEL = dpj.Model(**FUNCTIONS)
# Two kinds of layers, of one block.
KINDS: dict[str, Any] = {
    "embed": embed,
    "block": {"a": block, "b": block},
    "head": head,
    "layout": ("a", "b", "b", "b"),
}
PARAMS_OF_KINDS: dict[str, Any] = {
    "ends": PARAMS["ends"],
    "blocks": {
        kind: jax.tree.map(lambda leaf, n=count: leaf[:n], PARAMS["blocks"])
        for kind, count in {"a": 1, "b": 3}.items()
    },
}


def raises(*args: Any, **kwargs: Any) -> Any:
    raise UsersError("no")


def returns(value: Any) -> Any:
    """Makes a function of the model that returns one value."""
    return lambda *args: value


def changes(function: Any, change: Any) -> Any:
    """Makes a function whose result is changed."""
    return lambda *args: change(function(*args))


def with_leaf(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    """Copies nested dicts with another value at a path."""
    if not path:
        return value
    return {**tree, path[0]: with_leaf(tree.get(path[0], {}), path[1:], value)}


def without(tree: Any, *path: str) -> Any:
    """Copies nested dicts without one key."""
    if len(path) == 1:
        return {key: value for key, value in tree.items() if key != path[0]}
    return {**tree, path[0]: without(tree[path[0]], *path[1:])}
