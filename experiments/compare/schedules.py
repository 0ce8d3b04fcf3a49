"""Trains one small language model with every schedule, in turns, and compares what each takes.

In: flags. Out, in a folder: schedules.csv, steps.csv, table.md, compare.png. See README.md beside
it.
"""

from collections.abc import Sequence
from pathlib import Path

import click
import jax
from rich.console import Console

import dualpipe_jax as dpj
from experiments.compare import measuring, report
from experiments.progress import bar
from experiments.train_lm import data, flags, training
from experiments.train_lm.devices import find_devices
from experiments.train_lm.flags import POSITIVE, Refusal
from experiments.train_lm.model import LanguageModel

# Float32 sums in another order differ by about 1e-7; 20 steps on CPUs kept within 2e-7. The room is
# for accelerators that multiply in less than float32. One layer of four without its gradient made
# 9e-4 in three steps.
LOSS_TOLERANCE = 1e-4


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--ranks",
    type=POSITIVE,
    multiple=True,
    default=(2, 4, 8),
    help="Devices of the pipeline; once for each number to compare.",
)
@click.option(
    "--schedule",
    "names",
    multiple=True,
    show_default="all",
    help=f"One of {', '.join(dpj.schedules.names())}; once for each to compare.",
)
@click.option("--microbatches", type=POSITIVE, default=16, help="Of one step.")
@click.option(
    "--steps", type=click.IntRange(min=2), default=20, help="Of each; the first is not timed."
)
@flags.language_model(context=64, layers=16, width=64)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/compare_schedules"),
    help="The folder for the figures, the table and the picture.",
)
def command(
    *,
    ranks: tuple[int, ...],
    names: tuple[str, ...],
    microbatches: int,
    steps: int,
    batch_size: int,
    context: int,
    layers: int,
    width: int,
    heads: int,
    learning_rate: float,
    seed: int,
    output: Path,
) -> None:
    """Train one language model with every schedule, and compare what each takes.

    All begin with the same parameters and see the same batches; their steps are taken in turns.
    """
    ranks = tuple(sorted(set(ranks)))
    names = tuple(dict.fromkeys(names)) or dpj.schedules.names()
    _require_flags_fit(
        names=names,
        num_ranks=max(ranks),
        microbatches=microbatches,
        batch_size=batch_size,
        layers=layers,
        width=width,
        heads=heads,
    )
    find_devices(max(ranks), flag=f"--ranks {max(ranks)}", fake=max(ranks))
    try:
        text = data.read(None, min_length=context + 1)
        output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise Refusal(str(error)) from error
    # A program found in a cache would have no compile time.
    jax.config.update("jax_enable_compilation_cache", False)

    console = Console(highlight=False)
    model = LanguageModel(layers=layers, width=width, heads=heads)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(seed)))
    optimizer, _ = training.make_optimizer(learning_rate=learning_rate, steps=steps)
    sizes = {"batch_size": batch_size, "context": context, "seed": seed}
    names = (measuring.SEQUENTIAL, *names)
    contenders: list[measuring.Contender] = []
    rows: list[report.Row] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(ranks) * len(names) * (1 + steps), what="")
        for num_ranks in ranks:
            racing = []
            for name in names:
                progress.update(task, what=f"{num_ranks} ranks: compiling {name}")
                racing.append(
                    measuring.compile_contender(
                        name,
                        num_ranks=num_ranks,
                        num_microbatches=microbatches,
                        model=model,
                        params=params,
                        optimizer=optimizer,
                        batch=next(data.batches(text.train, **sizes)),
                    )
                )
                progress.advance(task)
            progress.update(task, what=f"{num_ranks} ranks: training")
            batches = data.batches(text.train, **sizes)
            for _ in measuring.race(racing, batches, num_steps=steps):
                progress.advance(task)
            contenders += racing
            rows += report.summarize(racing, num_layers=layers)
            console.print(report.to_rich(rows[-len(racing) :]))

    report.write_csv(rows, output / "schedules.csv")
    report.write_steps(contenders, output / "steps.csv")
    report.write_markdown(rows, output / "table.md")
    report.plot(rows, output / "compare.png")
    console.print(f"written   {output}: schedules.csv, steps.csv, table.md, compare.png")
    require_same_losses(rows)


def require_same_losses(rows: Sequence[report.Row]) -> None:
    """Raises if a schedule does not learn what the model without a pipeline learns."""
    wrong = [row for row in rows if not row.loss_difference <= LOSS_TOLERANCE]
    if wrong:
        listed = ", ".join(
            f"{row.schedule} on {row.ranks} ranks by {row.loss_difference:.0e}" for row in wrong
        )
        raise click.ClickException(
            f"losses differ from those without a pipeline by more than {LOSS_TOLERANCE:g}: {listed}"
        )


def _require_flags_fit(
    *,
    names: tuple[str, ...],
    num_ranks: int,
    microbatches: int,
    batch_size: int,
    layers: int,
    width: int,
    heads: int,
) -> None:
    """Refuses flags that do not fit each other, all in one line."""
    known = dpj.schedules.names()
    unknown = [name for name in names if name not in known]
    most = max(
        dpj.schedules.make(name, num_ranks=num_ranks, num_microbatches=microbatches).num_stages
        for name in (known if unknown else names)
    )
    problems = {
        f"--schedule {', '.join(unknown)}: must be one of {', '.join(known)}": unknown,
        f"--batch-size {batch_size}: must be divisible by --microbatches {microbatches}": (
            batch_size % microbatches
        ),
        f"--width {width}: must be divisible by --heads {heads}": width % heads,
        f"--layers {layers}: fewer than the {most} stages that a schedule has over {num_ranks} "
        "ranks; every stage needs a layer, so add layers or lower --ranks": layers < most,
    }
    wrong = [problem for problem, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise Refusal("; ".join(wrong))


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="compare_schedules")


if __name__ == "__main__":
    main()
