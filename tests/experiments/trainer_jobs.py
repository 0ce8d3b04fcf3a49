"""A small model as a job of the trainer, run in this process over its fake devices."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import dualpipe_jax as dpj
from experiments.train_lm.trainer import data
from experiments.train_lm.trainer.flags import Settings
from experiments.train_lm.trainer.folder import Folder, open_folder
from experiments.train_lm.trainer.log import Row, read_rows
from experiments.train_lm.trainer.mesh import PIPE, batch_axes, make_mesh, unsharded, with_fsdp
from experiments.train_lm.trainer.run import Job, Place, train
from experiments.train_lm.trainer.signals import Requests

LAYERS, WIDTH, CONTEXT, ROWS = 16, 8, 8, 16
SEQUENTIAL = "sequential"


def init(key: jax.Array) -> dict[str, Any]:
    """Makes the parameters of an embedding and of layers of one matrix each, in float32."""
    keys = jax.random.split(key)
    kernel = 0.3 * jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH), jnp.float32)
    return {
        "ends": {"embedding": 0.1 * jax.random.normal(keys[1], (256, WIDTH), jnp.float32)},
        "blocks": {"kernel": kernel, "bias": jnp.zeros((LAYERS, WIDTH), jnp.float32)},
    }


def _head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    logits = x @ ends["embedding"].T
    return optax.softmax_cross_entropy_with_integer_labels(logits, ctx.microbatch[:, 1:]).mean()


MODEL = dpj.Model(
    embed=lambda ends, ctx: ends["embedding"].at[ctx.microbatch[:, :-1]].get(out_sharding=jax.P()),
    block=lambda p, x, ctx: x + jnp.tanh(x @ p["kernel"] + p["bias"]),
    head=_head,
)


def make_job(schedule: str, sizes: dict[str, int], *, microbatches: int) -> Job:
    """Makes the job over a mesh of these sizes; `SEQUENTIAL` is the model without a pipeline."""
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(jax.devices()[:count], sizes)
    shapes = jax.eval_shape(init, jax.random.key(0))
    specs = with_fsdp(unsharded(shapes), shapes, mesh)
    evaluate: Any
    if schedule == SEQUENTIAL:
        evaluate = dpj.sequential(MODEL, num_microbatches=microbatches)
        value_and_grad = jax.value_and_grad(evaluate)
    else:
        where: Any = {
            "mesh": mesh,
            "num_microbatches": microbatches,
            "axis": PIPE,
            "batch_axes": batch_axes(mesh),
            "param_specs": specs,
        }
        evaluate = dpj.evaluate(MODEL, **where)
        value_and_grad = dpj.value_and_grad(MODEL, schedule=schedule, **where)

    def grad_fn(params: Any, batch: jax.Array, key: jax.Array) -> Any:
        loss, grads = value_and_grad(params, batch)
        return (loss, {}), grads

    return Job(
        mesh=mesh,
        init=init,
        param_specs=specs,
        grad_fn=grad_fn,
        held_out_loss=evaluate,
        describe="small",
        flops_per_token=1.0,
    )


def make_settings(output: Path, **changed: Any) -> Settings:
    """Makes the settings of a run of six steps, saved after three."""
    given: dict[str, Any] = {
        "ranks": None,
        "data_devices": 1,
        "fsdp_devices": 1,
        "microbatches": 4,
        "steps": 6,
        "batch_size": ROWS,
        "context": CONTEXT,
        "learning_rate": 0.01,
        "seed": 0,
        "data_path": Path(__file__),
        "output": output,
        "fresh": False,
        "save_every": 3,
        "keep": 3,
        "on_save_error": "stop",
        "max_skips": 3,
        "eval_every": 6,
        "eval_batches": 2,
        "log": (),
        "profile": None,
        "coordinator": None,
        "num_processes": None,
        "process_id": None,
        "heartbeat": 60,
        "stopped_code": 0,
    }
    return Settings(**(given | changed))


def run_job(job: Job, settings: Settings) -> str:
    """Trains, and gives all that was printed."""
    assert settings.output is not None
    printed = io.StringIO()
    console = Console(file=printed, width=300)
    text = data.read(settings.data_path, min_length=settings.context + 1)
    place = Place(console=console, devices=list(job.mesh.devices.flat), which="", text=text)
    config = {"seed": settings.seed, "steps": settings.steps}
    folder = open_folder(
        settings.output,
        default=settings.output,
        fresh=settings.fresh,
        config={**config, "text": text.fingerprint},
    )
    train(
        job,
        settings,
        place,
        Folder(folder.path, folder.earlier),
        config,
        requests=Requests(console.print),
        at_stop=lambda _: None,
    )
    return printed.getvalue()


def copy_until(run: Path, target: Path, *, step: int) -> Path:
    """Copies a run, as if it had been killed after the checkpoint of a step."""
    shutil.copytree(run, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name) > step:
            shutil.rmtree(path)
    return target


def rows_of(run: Path) -> list[Row]:
    """Reads the log of a run."""
    return read_rows(run / "log.csv")


def facts_of(run: Path, step: int) -> dict[str, Any]:
    """Reads the facts of a checkpoint."""
    return json.loads((run / "checkpoints" / str(step) / "facts" / "metadata").read_text())
