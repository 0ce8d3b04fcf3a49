"""Trains a small language model on real text with a pipeline schedule, a jitted program a step.

In: flags. Out, in a folder: checkpoints, log.csv, config.toml, loss.png, timetable.png, sample.txt.
See README.md beside it.
"""

from dataclasses import replace
from typing import Any

import click
import jax
import jax.numpy as jnp

import dualpipe_jax as dpj

from . import flags
from .flags import POSITIVE, FiniteFloat
from .model import LanguageModel
from .sample import continue_text
from .trainer import processes, run
from .trainer.flags import Settings, config_of, training
from .trainer.log import Row, perplexity, plot
from .trainer.mesh import DATA, FSDP, PIPE, batch_axes, make_mesh, unsharded, with_fsdp

DEFAULT_RANKS = 4
SAMPLE_BYTES = 500
FOLDER = "runs/train_lm"


@flags.script("train_lm")
@click.option("--schedule", type=click.Choice(dpj.schedules.names()), default="dualpipe")
@click.option(
    "--stages-per-rank",
    type=POSITIVE,
    help="Stages that each rank holds, by default 2, for the interleaved schedules.",
)
@flags.layers_per_stage
@click.option(
    "--ranks",
    type=POSITIVE,
    show_default=f"all accelerators, or {DEFAULT_RANKS} without one",
    help="Devices of the pipeline; fake CPU devices where there is no accelerator.",
)
@click.option(
    "--microbatches", type=POSITIVE, default=8, help="Microbatches of a step, on each shard of it."
)
@click.option("--steps", type=POSITIVE, default=500, help="Updates of the parameters.")
@flags.language_model(context=128, layers=8, width=96)
@click.option(
    "--dropout",
    type=FiniteFloat(min=0, max=1, max_open=True),
    default=0.0,
    help="Share of a layer's outputs that is dropped in training.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="The dtype of the compute; parameters, their gradients and AdamW stay in float32.",
)
@flags.text()
@training(default=FOLDER, results="logs, pictures, sample")
@click.option("--prompt", default="def ", help="The text that the sample at the end continues.")
@click.pass_context
def main(ctx: click.Context, **given: Any) -> None:
    """Train a byte-level language model on real text with a pipeline schedule.

    Every step (loss, gradients, update) is one jitted program over all ranks. A run with --output
    goes on after the last checkpoint when the same command is given again.
    """
    config = config_of(ctx)
    settings = Settings.take(given)
    layers, width, heads = given["layers"], given["width"], given["heads"]
    shards = settings.batch_devices
    parts, of_parts = settings.microbatches, "--microbatches"
    if shards > 1:
        parts, of_parts = parts * shards, "--microbatches x --data-devices x --fsdp-devices ="
    flags.refuse(
        {
            **flags.uneven_batch(settings.batch_size, parts, of_parts),
            **flags.uneven_heads(width, heads),
            "--prompt: must not be empty": not given["prompt"],
            "--prompt: must be text in UTF-8": not _is_utf8(given["prompt"]),
        }
    )
    schedule, per_rank = given["schedule"], given["stages_per_rank"]
    options = {} if per_rank is None else {"num_stages_per_rank": per_rank}
    place, ranks = _find_ranks(settings, schedule=schedule, layers=layers, options=options)
    devices = place.devices
    plan = run.make_schedule(schedule, settings, ranks=ranks, layers=layers, **options)
    folder = run.open_folder(settings, config, place, default=FOLDER)
    console = place.console
    timeline = plan.timeline()
    sizes = {PIPE: ranks, DATA: settings.data_devices, FSDP: settings.fsdp_devices}
    mesh = make_mesh(devices, sizes)
    over = "".join(f" x {name} {size}" for name, size in mesh.shape.items() if name != PIPE)
    console.print(
        f"text      {place.text.summary}\n"
        f"devices   {place.which}\n"
        f"pipeline  {plan.name}, {ranks} x {devices[0].platform}{over}, "
        f"{settings.microbatches} microbatches of {settings.batch_size // parts} x "
        f"{settings.context} bytes, {timeline.num_ticks} ticks"
    )
    model = LanguageModel(
        layers=layers,
        width=width,
        heads=heads,
        dtype=jnp.dtype(given["dtype"]),
        dropout=given["dropout"],
    )
    num_params = sum(leaf.size for leaf in jax.tree.leaves(_shapes(model)))
    title = f"{num_params:,} parameters, {plan.name} over {ranks} ranks"

    def at_stop(rows: list[Row]) -> None:
        plot(rows, folder.path / "loss.png", title=title)

    if processes.is_first():
        dpj.plot_timeline(timeline, path=folder.path / "timetable.png")
    job, pipeline = _make_job(
        model, plan, mesh, settings, name=given["dtype"], balanced=given["layers_per_stage"]
    )
    with run.ending(folder, console) as requests:
        outcome = run.train(
            job, settings, place, folder, config, requests=requests, at_stop=at_stop
        )
        loss = [row["held_out_loss"] for row in outcome.rows if row.get("held_out_loss")][-1]
        console.print(
            f"held out  perplexity {perplexity(loss):.3f} a byte ({loss:.3f} nats), over "
            f"{settings.eval_batches * settings.batch_size} windows of {settings.context} bytes"
        )
        one_microbatch = pipeline | {"num_microbatches": 1}
        with jax.set_mesh(mesh):
            sample = continue_text(
                dpj.apply(model.for_pipeline(), output=model.output, **one_microbatch),
                outcome.params,
                given["prompt"].encode(),
                num_bytes=SAMPLE_BYTES,
                context=settings.context,
                rows=shards,
                seed=settings.seed,
            )
        if processes.is_first():
            (folder.path / "sample.txt").write_text(sample, encoding="utf-8")
        console.rule("a sample")
        console.print(_printable(sample))
        console.rule()
        console.print(f"written   {folder.path}: log.csv, loss.png, timetable.png, sample.txt")


def _find_ranks(
    settings: Settings, *, schedule: str, layers: int, options: dict[str, int]
) -> tuple[run.Place, int]:
    """Finds the devices, and the ranks of the pipeline: all of them, as far as layers suffice."""
    shards = settings.batch_devices
    count = None if settings.ranks is None else settings.ranks * shards
    flag = f"--ranks {settings.ranks}" if shards == 1 else f"--ranks x devices of data = {count}"
    place = run.find_place(settings, count=count, flag=flag, fake=DEFAULT_RANKS * shards)
    if settings.ranks is not None:
        return place, settings.ranks
    limit = len(place.devices) // shards
    sizes = {"layers": layers, "microbatches": settings.microbatches}
    with flags.refusing(f"--schedule {schedule}"):
        ranks = _most_ranks(schedule, limit=limit, **sizes, **options)
    which = place.which
    if ranks * shards < len(place.devices):
        which = f"{which}; {ranks * shards} of them, as {layers} layers make no more stages"
    return replace(place, devices=place.devices[: ranks * shards], which=which), ranks


def _make_job(
    model: LanguageModel,
    plan: Any,
    mesh: Any,
    settings: Settings,
    *,
    name: str,
    balanced: flags.Balanced,
) -> tuple[run.Job, dict[str, Any]]:
    """Makes the job, and how the pipeline runs."""
    shapes = _shapes(model)
    specs = with_fsdp(unsharded(shapes), shapes, mesh)
    pipeline: dict[str, Any] = {
        "mesh": mesh,
        "num_microbatches": settings.microbatches,
        "axis": PIPE,
        "batch_axes": batch_axes(mesh),
        "param_specs": specs,
        "layers_per_stage": balanced,
    }
    value_and_grad = dpj.value_and_grad(model.for_pipeline(), schedule=plan, **pipeline)
    has_rng = model.dropout > 0
    stages = ""
    if balanced:
        batch = jax.ShapeDtypeStruct((settings.batch_size, settings.context + 1), jnp.int32)
        key = jax.random.key(0) if has_rng else None
        stages = flags.show_layers(value_and_grad.memory(shapes, batch, rng=key).layers_per_stage)

    def grad_fn(params: Any, batch: jax.Array, key: jax.Array) -> Any:
        loss, grads = value_and_grad(params, batch, rng=key if has_rng else None)
        return (loss, {}), grads

    job = run.Job(
        mesh=mesh,
        init=model.init,
        param_specs=specs,
        grad_fn=grad_fn,
        held_out_loss=dpj.evaluate(model.for_pipeline(), **pipeline),
        describe=f"{model.layers} layers of width {model.width}, {name}{stages}",
        flops_per_token=model.flops_per_token(settings.context),
    )
    return job, pipeline


def _shapes(model: LanguageModel) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def _most_ranks(
    schedule: str, *, limit: int, layers: int, microbatches: int, **options: int
) -> int:
    """Finds the most ranks, up to a limit, of whose stages each has a layer; at least 1."""
    for ranks in range(limit, 1, -1):
        made = dpj.schedules.make(
            schedule, num_ranks=ranks, num_microbatches=microbatches, **options
        )
        if made.num_stages <= layers:
            return ranks
    return 1


def _is_utf8(text: str) -> bool:
    """Whether a text has bytes in UTF-8: a shell may pass any bytes, some as half characters."""
    return all(not 0xD800 <= ord(character) < 0xE000 for character in text)


def _printable(text: str) -> str:
    """Replaces characters that a terminal might obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    main()
