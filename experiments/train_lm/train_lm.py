"""Trains a small language model on real text with a pipeline schedule, a jitted program a step.

In: flags. Out, in a folder: log.csv, loss.png, timetable.png, sample.txt. See README.md beside it.
"""

import sys
import time
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import dualpipe_jax as dpj

from . import data, flags, training
from .devices import find_devices
from .flags import POSITIVE, Refusal
from .log import COLUMNS, Log, perplexity, plot
from .model import LanguageModel
from .sample import continue_text

AXIS = "pipe"
DEFAULT_RANKS = 4
SAMPLE_BYTES = 500


@flags.script("train_lm")
@click.option("--schedule", type=click.Choice(dpj.schedules.names()), default="dualpipe")
@click.option(
    "--ranks",
    type=POSITIVE,
    show_default=f"all accelerators, or {DEFAULT_RANKS} without one",
    help="Devices of the pipeline; fake CPU devices where there is no accelerator.",
)
@click.option("--microbatches", type=POSITIVE, default=8, help="Microbatches of one step.")
@click.option("--steps", type=POSITIVE, default=500, help="Updates of the parameters.")
@flags.language_model(context=128, layers=8, width=96)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="The dtype of the compute; parameters, their gradients and AdamW stay in float32.",
)
@flags.text_and_results(folder="runs/train_lm", results="the log, the pictures and the sample")
@click.option("--prompt", default="def ", help="The text that the sample at the end continues.")
def main(
    *,
    schedule: str,
    ranks: int | None,
    microbatches: int,
    steps: int,
    batch_size: int,
    context: int,
    learning_rate: float,
    seed: int,
    dtype: str,
    data_path: Path | None,
    output: Path,
    eval_every: int,
    eval_batches: int,
    prompt: str,
    **model_sizes: int,
) -> None:
    """Train a byte-level language model on real text with a pipeline schedule.

    Every step (loss, gradients, update) is one jitted program over all ranks.
    """
    layers, width = model_sizes["layers"], model_sizes["width"]
    flags.refuse(
        {
            **flags.uneven_batch(batch_size, microbatches),
            **flags.uneven_heads(width, model_sizes["heads"]),
            "--prompt: must not be empty": not prompt,
        }
    )
    try:
        text = data.read(data_path, min_length=context + 1)
        output.mkdir(parents=True, exist_ok=True)
        log = Log(output / "log.csv", COLUMNS)
    except (OSError, ValueError) as error:
        raise Refusal(str(error)) from error
    devices, which = find_devices(ranks, flag=f"--ranks {ranks}", fake=DEFAULT_RANKS)
    if ranks is None:
        most = _most_ranks(schedule, limit=len(devices), layers=layers, microbatches=microbatches)
        if most < len(devices):
            which = f"{which}; {most} of them, as {layers} layers make no more stages"
        devices = devices[:most]
    plan = dpj.schedules.make(schedule, num_ranks=len(devices), num_microbatches=microbatches)
    of = f"of {schedule}"
    flags.refuse(flags.too_few_layers(layers, stages=plan.num_stages, ranks=len(devices), of=of))

    console = Console(highlight=False, soft_wrap=True)
    timeline = plan.timeline()
    dpj.plot_timeline(timeline, path=output / "timetable.png")
    console.print(
        f"text      {text.summary}\n"
        f"devices   {which}\n"
        f"pipeline  {schedule}, {len(devices)} x {devices[0].platform}, {microbatches} "
        f"microbatches of {batch_size // microbatches} x {context} bytes, {timeline.num_ticks} "
        "ticks"
    )

    model = LanguageModel(**model_sizes, dtype=jnp.dtype(dtype))
    mesh = jax.make_mesh((len(devices),), (AXIS,), devices=devices)
    pipeline = {"mesh": mesh, "num_microbatches": microbatches, "axis": AXIS}
    optimizer, learning_rate_at = training.make_optimizer(learning_rate=learning_rate, steps=steps)
    sizes = {"batch_size": batch_size, "context": context}
    batches = data.batches(text.train, seed=seed, **sizes)
    held_out = data.spread(text.held_out, num_batches=eval_batches, **sizes)
    learning_rates = np.asarray(learning_rate_at(np.arange(steps))).tolist()
    params = jax.jit(model.init)(jax.random.key(seed))

    with jax.set_mesh(mesh):
        params = jax.device_put(params, dpj.shardings(params, mesh=mesh, axis=AXIS))
        state = (params, jax.jit(optimizer.init)(params))
        num_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        console.print(
            f"model     {num_params:,} parameters, {layers} layers of width {width}, {dtype}"
        )
        with console.status("compiling"):
            start = time.perf_counter()
            step = training.compile_step(
                dpj.value_and_grad(model.for_pipeline(), schedule=plan, **pipeline),
                optimizer,
                state,
                held_out[0],
            )
            evaluate = jax.jit(dpj.evaluate(model.for_pipeline(), **pipeline))
            evaluate = evaluate.lower(params, held_out[0]).compile()
        console.print(f"compiled  in {time.perf_counter() - start:.0f} s")

        def held_out_loss(params: Any) -> float:
            return float(np.mean([float(evaluate(params, batch)) for batch in held_out]))

        try:
            params = training.fit(
                state,
                step=step,
                batches=batches,
                held_out_loss=held_out_loss,
                learning_rates=learning_rates,
                eval_every=eval_every,
                log=log,
                console=console,
            )
        except FloatingPointError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            console.print(f"stopped; log and pictures until then are in {output}")
            sys.exit(130)  # a shell's code for Ctrl-C
        finally:
            title = f"{num_params:,} parameters, {schedule} over {len(devices)} ranks"
            plot(log.rows, output / "loss.png", title=title)

    loss = [row.held_out_loss for row in log.rows if row.held_out_loss is not None][-1]
    console.print(
        f"held out  perplexity {perplexity(loss):.3f} a byte ({loss:.3f} nats), over "
        f"{eval_batches * batch_size} windows of {context} bytes"
    )
    sample = continue_text(
        model,
        jax.device_get(params),
        prompt.encode(),
        num_bytes=SAMPLE_BYTES,
        context=context,
        seed=seed,
    )
    (output / "sample.txt").write_text(sample, encoding="utf-8")
    console.rule("a sample")
    console.print(_printable(sample), markup=False)
    console.rule()
    console.print(f"written   {output}: log.csv, loss.png, timetable.png, sample.txt")


def _most_ranks(schedule: str, *, limit: int, layers: int, microbatches: int) -> int:
    """Finds the most ranks, up to a limit, of whose stages each has a layer; at least 1."""
    for ranks in range(limit, 1, -1):
        made = dpj.schedules.make(schedule, num_ranks=ranks, num_microbatches=microbatches)
        if made.num_stages <= layers:
            return ranks
    return 1


def _printable(text: str) -> str:
    """Replaces characters that a terminal might obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


if __name__ == "__main__":
    main()
