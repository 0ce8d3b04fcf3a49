"""Replays every schedule over sizes, at equal costs and at a transformer's, and compares idle time.

In: flags. Out, in a folder: idle.csv, table.md, idle.png. See README.md beside it.
"""

from pathlib import Path

import click
from rich.console import Console

import dualpipe_jax as dpj
from experiments.compare import costs
from experiments.compare import idle_report as report
from experiments.progress import bar
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE, Refusal


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--ranks", type=POSITIVE, multiple=True, default=(4, 8, 16, 32), help="Once for each number."
)
@click.option(
    "--microbatches",
    "multiples",
    type=POSITIVE,
    multiple=True,
    default=(1, 2, 4, 8),
    help="Of a step, for each rank; once for each number.",
)
@click.option("--layers", type=POSITIVE, default=64, help="Of the transformer.")
@click.option("--width", type=POSITIVE, default=4096)
@click.option("--context", type=POSITIVE, default=4096, help="Tokens of a microbatch.")
@click.option("--heads", type=POSITIVE, default=32)
@click.option("--vocabulary", type=POSITIVE, default=32_000)
@click.option(
    "--transfer",
    type=click.FloatRange(min=0),
    default=0.14,
    help="Of a value to a neighbour, in forwards of a layer.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/idle_time"),
    help="The folder for the figures, the table and the picture.",
)
def command(
    *,
    ranks: tuple[int, ...],
    multiples: tuple[int, ...],
    layers: int,
    width: int,
    context: int,
    heads: int,
    vocabulary: int,
    transfer: float,
    output: Path,
) -> None:
    """Compare how much of a step's time the schedules idle."""
    ranks, multiples = tuple(sorted(set(ranks))), tuple(sorted(set(multiples)))
    if width % heads:
        raise Refusal(f"--width {width}: must be divisible by --heads {heads}")
    most = 2 * max(ranks)
    if layers < most:
        raise Refusal(
            f"--layers {layers}: fewer than the {most} stages that a schedule has over "
            f"{max(ranks)} ranks; every stage needs a layer, so add layers or lower --ranks"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--output {output}: {error.strerror}") from error

    console = Console(highlight=False)
    sizes = costs.Sizes(
        layers=layers, width=width, context=context, heads=heads, vocabulary=vocabulary
    )
    flops = costs.count(sizes)
    console.print(report.describe(flops))
    names = dpj.schedules.names()
    rows: list[report.Row] = []
    with bar(console) as progress:
        task = progress.add_task("", total=len(ranks) * len(multiples) * len(names), what="")
        for num_ranks in ranks:
            for multiple in multiples:
                for name in names:
                    progress.update(task, what=f"{num_ranks} ranks: {name}")
                    rows.append(
                        replay(
                            name,
                            num_ranks=num_ranks,
                            num_microbatches=multiple * num_ranks,
                            flops=flops,
                            num_layers=layers,
                            transfer=transfer,
                        )
                    )
                    progress.advance(task)
    report.write_csv(rows, output / "idle.csv")
    report.write_markdown(rows, output / "table.md")
    report.plot(rows, output / "idle.png")
    console.print(f"written   {output}: idle.csv, table.md, idle.png")


def replay(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    flops: costs.Flops,
    num_layers: int,
    transfer: float,
) -> report.Row:
    """Replays one schedule: at equal costs, at the transformer's, with transfers, and full."""
    schedule = dpj.schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    equal = dpj.simulate(schedule)
    of_model = flops.costs(num_layers=num_layers, num_ranks=num_ranks)
    model = dpj.simulate(schedule, costs=of_model, num_layers=num_layers)
    sent, full = (
        dpj.simulate(
            schedule,
            costs=of_model,
            num_layers=num_layers,
            transfer=transfer,
            execution=dpj.Execution(split_backward=is_split),
        )
        for is_split in (True, False)
    )
    return report.Row.of(equal, model, sent, full)


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="idle_time")


if __name__ == "__main__":
    main()
