"""Trains one small language model with every schedule, in turns, and compares losses and costs.

In: flags. Out, in a folder: schedules.csv, steps.csv, schedules.md, schedules.png. See README.md
beside it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import jax
from rich.console import Console

import dualpipe_jax as dpj
from experiments import tables
from experiments.compare import measuring, report
from experiments.progress import bar
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE, Refusal
from experiments.train_lm.model import LanguageModel
from experiments.train_lm.trainer import data
from experiments.train_lm.trainer.devices import find_devices
from experiments.train_lm.trainer.state import make_optimizer

# Float32 sums in another order differ by about 1e-7; 20 steps on CPUs kept within 2e-7. The room is
# for accelerators that multiply in less than float32. One layer of four without its gradient made
# 9e-4 in three steps.
LOSS_TOLERANCE = 1e-4


@flags.script("compare")
@click.option(
    "--ranks",
    type=POSITIVE,
    multiple=True,
    default=(2, 4, 8),
    help="Devices of the pipeline; once for each number to compare.",
)
@flags.several(
    "--schedule",
    "names",
    dpj.schedules.names(),
    default=dpj.schedules.names(),
    text="To compare.",
)
@click.option("--microbatches", type=POSITIVE, default=16, help="Microbatches of one step.")
@click.option(
    "--steps", type=click.IntRange(min=2), default=20, help="Steps of each; the first is not timed."
)
@flags.language_model(context=64, layers=16, width=64)
@flags.output("runs/compare", results="the figures, the table and the picture")
def main(
    *,
    ranks: tuple[int, ...],
    names: tuple[str, ...],
    microbatches: int,
    steps: int,
    learning_rate: float,
    seed: int,
    output: Path,
    batch_size: int,
    context: int,
    **sizes: int,
) -> None:
    """Train one language model with every schedule, and compare losses and costs.

    All begin with the same parameters and see the same batches; their steps are taken in turns.
    """
    ranks, names = tuple(sorted(set(ranks))), tuple(dict.fromkeys(names))
    most = max(ranks)
    made = {"num_ranks": most, "num_microbatches": microbatches}
    with flags.refusing("--ranks, --microbatches"):
        stages = max(dpj.schedules.make(name, **made).num_stages for name in names)
    flags.refuse(
        {
            **flags.uneven_batch(batch_size, microbatches),
            **flags.uneven_heads(sizes["width"], sizes["heads"]),
            **flags.too_few_layers(sizes["layers"], stages=stages, ranks=most),
        }
    )
    find_devices(most, flag=f"--ranks {most}", fake=most)
    try:
        text = data.read(None, min_length=context + 1)
    except (OSError, ValueError) as error:
        raise Refusal(str(error)) from error
    flags.make_folder(output)
    # A program found in a cache would have no compile time.
    jax.config.update("jax_enable_compilation_cache", False)

    console, model = Console(highlight=False), LanguageModel(**sizes)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    optimizer, _ = make_optimizer(learning_rate=learning_rate, steps=steps)
    windows: Any = {"batch_size": batch_size, "context": context, "seed": seed}
    names = (measuring.SEQUENTIAL, *names)
    contenders: list[measuring.Contender] = []
    rows: list[report.Row] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(ranks) * len(names) * (1 + steps), label="")
        for num_ranks in ranks:
            racing = []
            for name in names:
                progress.update(task, label=f"{num_ranks} ranks: compiling {name}")
                racing.append(
                    measuring.compile_contender(
                        name,
                        num_ranks=num_ranks,
                        num_microbatches=microbatches,
                        model=model,
                        params=params,
                        optimizer=optimizer,
                        batch=next(data.iterate(text.train, **windows)),
                    )
                )
                progress.advance(task)
            progress.update(task, label=f"{num_ranks} ranks: training")
            batches = data.iterate(text.train, **windows)
            for _ in measuring.race(racing, batches, num_steps=steps):
                progress.advance(task)
            contenders += racing
            rows += report.summarize(racing, num_layers=model.layers)
            console.print(report.to_terminal(rows[-len(racing) :]))

    tables.write_csv(rows, output / "schedules.csv")
    report.write_steps(contenders, output / "steps.csv")
    (output / "schedules.md").write_text(report.to_markdown(rows))
    report.plot(rows, output / "schedules.png")
    console.print(f"written   {output}: schedules.csv, steps.csv, schedules.md, schedules.png")
    require_same_losses(rows)


def require_same_losses(rows: Sequence[report.Row]) -> None:
    """Raises if a schedule learns anything else than the model without a pipeline."""
    wrong = [row for row in rows if not row.loss_difference <= LOSS_TOLERANCE]
    if wrong:
        listed = ", ".join(
            f"{row.schedule} on {row.ranks} ranks by {row.loss_difference:.0e}" for row in wrong
        )
        raise click.ClickException(
            f"losses differ from those without a pipeline by more than {LOSS_TOLERANCE:g}: {listed}"
        )


if __name__ == "__main__":
    main()
