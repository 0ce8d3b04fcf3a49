"""docs/errors.md: the words of each heading begin a message that a small call raises.

Nothing here compiles: the checks stand before a step runs.
"""

import importlib.util
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax import P

import dualpipe_jax as dpj
from dualpipe_jax._cli import main
from experiments.train_lm.trainer import folder
from tests.test_errors import BATCH, MESH, MISTAKES, MODEL, PARAMS, D, model, trace, with_

PAGE = Path(__file__).resolve().parents[1] / "docs" / "errors.md"
# A heading may have the first words of several messages.
WORDS = [
    words
    for heading in re.findall(r"^### (.*)", PAGE.read_text(), flags=re.M)
    for words in re.findall(r"`([^`]+)`", heading)
]
STEP = dpj.value_and_grad(MODEL, mesh=MESH, num_microbatches=2)


def of_mistake(mistake: str) -> Any:
    """Makes a wrong call of tests/test_errors.py."""
    return trace(**MISTAKES[mistake][0])


def rows_over_data() -> None:
    mesh = jax.make_mesh((2, 2), ("pipe", "data"), devices=jax.devices()[:4])
    batch = jax.device_put(BATCH, jax.NamedSharding(mesh, P("data")))
    dpj.value_and_grad(MODEL, mesh=mesh, num_microbatches=2)(PARAMS, batch)


def params_in_the_hosts_memory() -> None:
    on_host = jax.NamedSharding(MESH, P(), memory_kind="pinned_host")
    STEP(jax.device_put(PARAMS, on_host), BATCH)


def unlike_stages() -> None:
    params = {**PARAMS, "blocks": {"a": PARAMS["blocks"], "b": PARAMS["blocks"]}}
    blocks, layout = {"a": MODEL.block, "b": MODEL.block}, tuple("aabb")
    trace(model(block=blocks, layout=layout), params, execution=dpj.Execution(unroll=True))


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.BatchNorm(use_running_average=False)(x)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + nn.Dropout(0.5, deterministic=False)(nn.Dense(D)(x))


def linen(block: nn.Module, *, constants: bool = True) -> Any:
    """Initialises a model of these blocks, and traces it."""
    parts = {"embed": nn.Dense(D), "head": nn.Dense(1), "loss": lambda y, rows: y.mean()}
    made, rows = dpj.linen.model(block=block, **parts), jnp.ones((4, D))

    def run(key: jax.Array) -> Any:
        init = made.init_variables if constants else made.init
        variables = init(key, rows, num_layers=2)
        if not constants:
            return variables
        params = variables.pop("params")
        return dpj.sequential(made.with_constants(variables), num_microbatches=2)(params, rows)

    return jax.eval_shape(run, jax.random.key(0))


class Net(nnx.Module):
    def __init__(self, layers: Any):
        self.layers = layers


def of_nnx(layers: Any) -> Any:
    """Traces a model of these layers."""
    module = Net(layers)
    made = dpj.nnx.model(
        module,
        blocks="layers",
        embed=lambda net, ctx: ctx.microbatch,
        head=lambda net, x, ctx: x.mean(),
    )
    loss_fn = dpj.sequential(made, num_microbatches=2)
    return jax.eval_shape(loss_fn, made.params(module), jnp.ones((4, D), jnp.float32))


def clipped_per_layer() -> None:
    tx = dpj.optimizers.per_layer(optax.clip_by_global_norm(1.0))
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)


def without_a_compiler() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        dpj.preflight(STEP, (PARAMS, BATCH), topology="tpu:v5e:2x4", mesh=MESH)


def command(*arguments: str) -> None:
    main.main(arguments, standalone_mode=False)


def other_flags() -> None:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / folder.CONFIG).write_text("layers = 8\n")
        folder.open_folder(Path(name), default=Path(name), fresh=False, config={"layers": 6})


# Each: the first words of a message, as a heading has them; a call that raises it.
CALLS: dict[str, Callable[[], Any]] = {
    # mesh and batch
    "...: needs ... devices, but ... has ...": lambda: dpj.make_mesh(pipe=16),
    "axis=...: ... is not an axis of the mesh": lambda: of_mistake("unknown axis"),
    "batch: its leading dim, ..., is not divisible by num_microbatches=...": lambda: of_mistake(
        "batch indivisible"
    ),
    "batch: its rows are sharded over mesh axes that the step does not know": rows_over_data,
    "params and batch: must be on the ... devices of the mesh, or uncommitted": lambda: STEP(
        jax.device_put(PARAMS, jax.devices()[1]), BATCH
    ),
    # model functions
    "dualpipe_jax: model.head raised this, given": lambda: trace(
        params=with_("ends", out=jnp.ones(3))
    ),
    "model.block: changes the structure of x from ... to ...": lambda: of_mistake(
        "aux loss without block_has_aux"
    ),
    "model.block: changes the shape or dtype of x": lambda: of_mistake(
        "block changes shapes and dtypes"
    ),
    "model.head: must return a loss that is a floating-point scalar": lambda: of_mistake(
        "loss a vector"
    ),
    "model.head: must return a scalar loss": lambda: of_mistake("metrics without has_aux"),
    "rng=None: one of the model's functions uses ctx.rng": lambda: of_mistake(
        "random numbers without a key"
    ),
    "rng: must be one key, as jax.random.key(0) gives": lambda: trace(rng=0),
    "model: its functions may name mesh axes only if manual_axes has them": lambda: of_mistake(
        "collective over an axis left to the partitioner"
    ),
    "model: embed, block and head must not read or write mutable arrays": lambda: of_mistake(
        "block with a mutable array"
    ),
    "jax.grad of a pipelined step": lambda: jax.grad(lambda params: STEP(params, BATCH)[0])(PARAMS),
    # parameters
    'params: must be {"ends": the parameters outside the layers, "blocks": those of the layers, '
    "stacked}": lambda: trace(params={"params": PARAMS}),
    'params["blocks"]: every leaf must have the layers as its leading dim': lambda: of_mistake(
        "leading dims differ"
    ),
    'params["blocks"]: has ... layers, fewer than the ... stages': lambda: of_mistake(
        "too few layers"
    ),
    "params: must be on the devices; copy it there in the step": params_in_the_hosts_memory,
    # options of a step
    "schedule=...: must be one of ...": lambda: of_mistake("unknown schedule"),
    "layers_per_stage=...: must sum to the number of layers, ...": lambda: trace(
        layers_per_stage=(1, 2)
    ),
    'remat=...: must be "none", "block"': lambda: of_mistake("remat a bool"),
    "execution=Execution(unroll=True): all stages must have the same kinds of layers": (
        unlike_stages
    ),
    "slots_on_device=...: must be at least ...": lambda: trace(
        execution=dpj.Execution(slots_on_device=1)
    ),
    # Flax
    "init: the modules have variables that are no parameters": lambda: linen(
        Normalised(), constants=False
    ),
    "block: ... writes to a collection of variables in a call": lambda: linen(Normalised()),
    "...: changes its variables in a call": lambda: of_nnx(
        nnx.List([nnx.BatchNorm(D, rngs=nnx.Rngs(0)) for _ in range(2)])
    ),
    "block: ... needs a key that it is not given": lambda: linen(Dropped()),
    "...: draws from the random streams ..., but is given no key": lambda: of_nnx(
        nnx.List(
            [
                nnx.Sequential(nnx.Linear(D, D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
                for rngs in (nnx.Rngs(0), nnx.Rngs(1))
            ]
        )
    ),
    "blocks=...: must be a list of modules": lambda: of_nnx(nnx.Linear(D, D + 1, rngs=nnx.Rngs(0))),
    # optimizers
    "tx: must transform each parameter separately": clipped_per_layer,
    # command line and scripts
    "topology=...: must be one of ...": lambda: command("preflight", "--topology", "tpu:v9:2x2"),
    "topology=...: needs a compiler that is not installed: pip install": without_a_compiler,
    "--memory ...: nothing fits; the least is ...": lambda: command(
        "choose", "--ranks", "2", "--microbatches", "2", "--layers", "4", "--memory", "1MiB"
    ),
    "--output ...: the run there was started otherwise": other_flags,
}


def test_each_entry_has_its_call() -> None:
    assert list(CALLS) == WORDS


@pytest.mark.parametrize("words", CALLS)
def test_words_begin_the_message(words: str) -> None:
    with pytest.raises(
        (ValueError, TypeError, ModuleNotFoundError, click.ClickException)
    ) as raised:
        CALLS[words]()
    messages = [str(raised.value), *getattr(raised.value, "__notes__", ())]
    pattern = ".*".join(map(re.escape, words.split("...")))
    assert any(re.match(pattern, message, re.DOTALL) for message in messages), messages
