"""Trains a small model of DeepSeek-V3's shape over pipeline and experts, with and without balance.

In: flags. Out, in a folder: log.csv, training.png. Or compiles a step of it for TPUs that are not
there (`--preflight`). See README.md beside it.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import jax
from rich.console import Console

import dualpipe_jax as dpj
from experiments.deepseek_mini import preflight, report, training
from experiments.deepseek_mini.model import DeepSeekMini
from experiments.progress import bar
from experiments.train_lm import data, flags
from experiments.train_lm.devices import find_devices
from experiments.train_lm.flags import POSITIVE, PositiveFloat, Refusal
from experiments.train_lm.log import Log
from experiments.train_lm.training import make_optimizer


@flags.script("deepseek_mini")
@click.option("--schedule", type=click.Choice(dpj.schedules.names()), default="dualpipe")
@click.option("--ranks", type=POSITIVE, default=2, help="Devices of the pipeline.")
@click.option("--expert-devices", type=POSITIVE, default=2, help="Over which experts are spread.")
@click.option(
    "--microbatches", type=POSITIVE, default=4, help="Microbatches of a step, on each of these."
)
@click.option("--steps", type=POSITIVE, default=400, help="Updates of the parameters, in each run.")
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
    "bias_rates",
    type=click.FloatRange(min=0),
    multiple=True,
    default=(0.01, 0.0),
    help="By how much a step moves the routers' biases; once for each run.",
)
@flags.text_and_results(folder="runs/deepseek_mini", results="the log and the picture")
@click.option(
    "--preflight",
    "topology",
    metavar="TOPOLOGY",
    help="Train nothing; compile steps of a larger model for TPUs, as tpu:v5e:2x4, and tell "
    "whether compute hides their communication (minutes).",
)
def main(
    *,
    schedule: str,
    ranks: int,
    expert_devices: int,
    microbatches: int,
    steps: int,
    batch_size: int,
    context: int,
    layers: int,
    width: int,
    heads: int,
    learning_rate: float,
    seed: int,
    dense_layers: int,
    experts: int,
    chosen: int,
    capacity_factor: float | None,
    bias_rates: tuple[float, ...],
    data_path: Path | None,
    output: Path,
    eval_every: int,
    eval_batches: int,
    topology: str | None,
) -> None:
    """Train a byte-level model of DeepSeek-V3's shape, its experts spread over devices."""
    if topology is not None:
        try:
            preflight.run(topology, console=Console(highlight=False, soft_wrap=True))
        except ValueError as error:
            raise Refusal(str(error)) from error
        return
    of_parts, parts = "--microbatches x --expert-devices =", microbatches * expert_devices
    flags.refuse(
        {
            **flags.uneven_batch(batch_size, parts, of_parts),
            f"--width {width}: must be divisible by 4 x --heads {heads}": width % (4 * heads),
            f"--dense-layers {dense_layers}: must be fewer than --layers {layers}": (
                dense_layers >= layers
            ),
            f"--experts {experts}: must be divisible by --expert-devices {expert_devices}": (
                experts % expert_devices
            ),
            f"--chosen {chosen}: must be at most --experts {experts}": chosen > experts,
            f"--bias-rate {bias_rates}: must be different for each run": (
                len(set(bias_rates)) < len(bias_rates)
            ),
        }
    )
    try:
        text = data.read(data_path, min_length=context + 1)
        output.mkdir(parents=True, exist_ok=True)
        log = Log(output / "log.csv", report.COLUMNS)
    except (OSError, ValueError) as error:
        raise Refusal(str(error)) from error
    plan = dpj.schedules.make(schedule, num_ranks=ranks, num_microbatches=microbatches)
    of = f"of {schedule}"
    flags.refuse(flags.too_few_layers(layers, stages=plan.num_stages, ranks=ranks, of=of))
    count = ranks * expert_devices
    flag = f"--ranks x --expert-devices = {count}"
    devices, which = find_devices(count, flag=flag, fake=count)
    mesh = jax.make_mesh((ranks, expert_devices), (training.PIPE, training.EXPERT), devices=devices)
    pipeline = training.Pipeline(mesh=mesh, num_microbatches=microbatches)
    sizes = DeepSeekMini(
        dense_layers=dense_layers,
        expert_layers=layers - dense_layers,
        width=width,
        heads=heads,
        head_size=width // heads,
        rotary_size=width // heads // 4 * 2,
        latent_size=width // 2,
        query_latent_size=width * 3 // 4,
        hidden=3 * width,
        experts=experts,
        chosen=chosen,
        expert_hidden=width * 3 // 4,
        capacity_factor=capacity_factor,
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"text      {text.summary}\n"
        f"devices   {which}\n"
        f"pipeline  {schedule}, {ranks} ranks x {expert_devices} devices of experts "
        f"({devices[0].platform}), {microbatches} microbatches of "
        f"{batch_size // (microbatches * expert_devices)} x {context} bytes on each"
    )
    optimizer, _ = make_optimizer(learning_rate=learning_rate, steps=steps)
    windows: Any = {"batch_size": batch_size, "context": context}
    held_out = data.spread(text.held_out, num_batches=eval_batches, **windows)
    params = jax.device_get(jax.jit(sizes.init)(jax.random.key(seed)))
    num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
    console.print(f"model     {num_params:,} parameters, layers: {', '.join(sizes.layout)}")

    with jax.set_mesh(mesh):
        held_out = [pipeline.place_batch(batch) for batch in held_out]

        def start() -> training.State:
            placed = pipeline.place(sizes, params)
            return placed, jax.jit(optimizer.init)(placed)

        state = start()
        with console.status("compiling"):
            began = time.perf_counter()
            step = training.compile_step(pipeline, sizes, plan, optimizer, state, held_out[0])
            evaluate = training.compile_held_out(pipeline, sizes, state[0], held_out)
        console.print(f"compiled  in {time.perf_counter() - began:.0f} s")
        try:
            with bar(console) as progress:
                for rate in bias_rates:
                    batches = data.batches(text.train, seed=seed, **windows)
                    training.fit(
                        start(),
                        rate=rate,
                        steps=steps,
                        step=step,
                        batches=map(pipeline.place_batch, batches),
                        held_out=evaluate,
                        eval_every=eval_every,
                        log=log,
                        progress=progress,
                    )
        except FloatingPointError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            console.print(f"stopped; the log until then is in {output}")
            sys.exit(130)  # a shell's code for Ctrl-C
        finally:
            if log.rows:
                title = f"{num_params:,} parameters, {schedule} {ranks} x experts {expert_devices}"
                report.plot(log.rows, output / "training.png", title=title)
    for rate in bias_rates:
        console.print(report.summary(log.rows, rate))
    console.print(f"written   {output}: log.csv, training.png")


if __name__ == "__main__":
    main()
