"""Trains a small model of DeepSeek-V3's shape over pipeline, data and experts.

In: flags. Out, in a folder: checkpoints, log.csv, config.toml, training.png. Or compiles a step of
it for TPUs that are not there (`--preflight`). See README.md beside it.
"""

from typing import Any

import click
import jax
from rich.console import Console

import dualpipe_jax as dpj
from experiments.deepseek_mini import preflight, report
from experiments.deepseek_mini.model import DeepSeekMini
from experiments.deepseek_mini.training import EXPERT, make_job
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE, FiniteFloat, PositiveFloat, Refusal
from experiments.train_lm.trainer import run
from experiments.train_lm.trainer.flags import Settings, config_of, training
from experiments.train_lm.trainer.log import Row
from experiments.train_lm.trainer.mesh import DATA, FSDP, PIPE, make_mesh

FOLDER = "runs/deepseek_mini"


@flags.script("deepseek_mini")
@click.option("--schedule", type=click.Choice(dpj.schedules.names()), default="dualpipe")
@flags.layers_per_stage
@click.option("--ranks", type=POSITIVE, default=2, help="Devices of the pipeline.")
@click.option("--expert-devices", type=POSITIVE, default=2, help="Over which experts are spread.")
@click.option(
    "--microbatches", type=POSITIVE, default=4, help="Microbatches of a step, on each shard of it."
)
@click.option("--steps", type=POSITIVE, default=400, help="Updates of the parameters.")
@flags.language_model(context=128, layers=8, width=64)
@click.option(
    "--dense-layers", type=click.IntRange(min=0), default=2, help="How many come before experts do."
)
@click.option("--experts", type=POSITIVE, default=8, help="Routed ones of a layer.")
@click.option("--chosen", type=POSITIVE, default=2, help="Routed ones a token.")
@click.option(
    "--capacity-factor",
    type=PositiveFloat(),
    show_default="no limit, no token dropped",
    help="How many times the mean load an expert has room for.",
)
@click.option(
    "--bias-rate",
    type=FiniteFloat(min=0),
    default=0.01,
    help="By how much a step moves the routers' biases.",
)
@flags.text()
@training(default=FOLDER, results="logs, picture")
@click.option(
    "--preflight",
    "topology",
    metavar="TOPOLOGY",
    help="Train nothing; compile steps of a larger model for TPUs, as tpu:v5e:2x4, and tell "
    "whether compute hides their communication (minutes).",
)
@click.pass_context
def main(ctx: click.Context, *, topology: str | None, **given: Any) -> None:
    """Train a byte-level model of DeepSeek-V3's shape, its experts spread over devices.

    A run with --output goes on after the last checkpoint when the same command is given again.
    """
    if topology is not None:
        try:
            preflight.run(topology, console=Console(highlight=False, soft_wrap=True))
        except ValueError as error:
            raise Refusal(str(error)) from error
        return
    config = config_of(ctx)
    settings = Settings.take(given)
    expert_devices = given["expert_devices"]
    _require_fitting(settings, given)
    ranks, shards = settings.ranks or 1, settings.batch_devices * expert_devices
    layers = given["layers"]
    plan = run.make_schedule(given["schedule"], settings, ranks=ranks, layers=layers)
    count = ranks * shards
    flag = f"--ranks x --expert-devices = {count}"
    if settings.batch_devices > 1:
        flag = f"--ranks x --expert-devices x --data-devices x --fsdp-devices = {count}"
    place = run.find_place(settings, count=count, flag=flag, fake=count)
    folder = run.open_folder(settings, config, place, default=FOLDER)
    mesh = make_mesh(
        place.devices,
        {
            PIPE: ranks,
            DATA: settings.data_devices,
            FSDP: settings.fsdp_devices,
            EXPERT: expert_devices,
        },
        always=(PIPE, EXPERT),
    )
    over = "".join(f" x {name} {size}" for name, size in mesh.shape.items() if name != PIPE)
    console = place.console
    console.print(
        f"text      {place.text.summary}\n"
        f"devices   {place.which}\n"
        f"pipeline  {given['schedule']}, {ranks} x {place.devices[0].platform}{over}, "
        f"{settings.microbatches} microbatches of "
        f"{settings.batch_size // (settings.microbatches * shards)} x {settings.context} bytes on "
        "each"
    )
    sizes = _sizes(given)
    num_params = sum(
        leaf.size for leaf in jax.tree.leaves(jax.eval_shape(sizes.init, jax.random.key(0)))
    )
    title = f"{num_params:,} parameters, {given['schedule']} {ranks} x experts {expert_devices}"
    label = f"bias rate {given['bias_rate']:g}"

    def at_stop(rows: list[Row]) -> None:
        report.plot({label: rows}, folder.path / "training.png", title=title)

    job = make_job(
        sizes,
        mesh,
        plan,
        num_microbatches=settings.microbatches,
        bias_rate=given["bias_rate"],
        context=settings.context,
        batch_size=settings.batch_size,
        balanced=given["layers_per_stage"],
    )
    with run.ending(folder, console) as requests:
        outcome = run.train(
            job, settings, place, folder, config, requests=requests, at_stop=at_stop
        )
        console.print(f"{label}: {report.summary(outcome.rows)}")
        console.print(f"written   {folder.path}: log.csv, training.png")


def _require_fitting(settings: Settings, given: dict[str, Any]) -> None:
    """Refuses sizes that do not fit one another."""
    width, heads, layers = given["width"], given["heads"], given["layers"]
    experts, chosen, expert_devices = given["experts"], given["chosen"], given["expert_devices"]
    parts = settings.microbatches * expert_devices * settings.batch_devices
    of_parts = "--microbatches x --expert-devices ="
    if settings.batch_devices > 1:
        of_parts = "--microbatches x --expert-devices x --data-devices x --fsdp-devices ="
    dense_layers = given["dense_layers"]
    flags.refuse(
        {
            **flags.uneven_batch(settings.batch_size, parts, of_parts),
            f"--width {width}: must be divisible by 4 x --heads {heads}": width % (4 * heads),
            f"--dense-layers {dense_layers}: must be fewer than --layers {layers}": (
                dense_layers >= layers
            ),
            f"--experts {experts}: must be divisible by --expert-devices {expert_devices}": (
                experts % expert_devices
            ),
            f"--chosen {chosen}: must be at most --experts {experts}": chosen > experts,
        }
    )


def _sizes(given: dict[str, Any]) -> DeepSeekMini:
    """Makes the model of the flags."""
    width, heads, dense_layers = given["width"], given["heads"], given["dense_layers"]
    return DeepSeekMini(
        dense_layers=dense_layers,
        expert_layers=given["layers"] - dense_layers,
        width=width,
        heads=heads,
        head_size=width // heads,
        rotary_size=width // heads // 4 * 2,
        latent_size=width // 2,
        query_latent_size=width * 3 // 4,
        hidden=3 * width,
        experts=given["experts"],
        chosen=given["chosen"],
        expert_hidden=width * 3 // 4,
        capacity_factor=given["capacity_factor"],
    )


if __name__ == "__main__":
    main()
