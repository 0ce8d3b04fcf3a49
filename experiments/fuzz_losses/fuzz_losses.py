"""Puts random losses through `from_loss`: how many are exact, refused, wrong?

In: flags. Out, in a folder: results.jsonl, results.md, refusals.csv, features.csv. See README.md.
"""

import sys
from pathlib import Path

import click
from rich.console import Console

from experiments import documents
from experiments.fuzz_losses import report, results, workers
from experiments.fuzz_losses.grammar import write
from experiments.progress import bar
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE

README = Path(__file__).resolve().parent / "README.md"
DOCS = README.parents[2] / "docs" / "from_loss.md"


@flags.script("fuzz-losses")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="The first program.")
@click.option("--count", type=POSITIVE, default=200, help="The number of programs.")
@click.option("--jobs", type=POSITIVE, default=2, help="Processes.")
@click.option("--show", type=click.IntRange(min=0), help="Show this program and its model only.")
@click.option("--fresh", is_flag=True, help="Run programs again that the folder has results of.")
@click.option("--write-docs", is_flag=True, help="Put the tables into README.md and docs/.")
@flags.output("runs/fuzz_losses", results="results, tables and lists")
def main(
    *,
    seed: int,
    count: int,
    jobs: int,
    show: int | None,
    fresh: bool,
    write_docs: bool,
    output: Path,
) -> None:
    """Put random losses through from_loss, and compare gradients with JAX's own."""
    console = Console(highlight=False)
    if show is not None:
        _show(show)
        return
    flags.make_folder(output)
    path = output / "results.jsonl"
    if fresh:
        path.unlink(missing_ok=True)
    asked = range(seed, seed + count)
    found = {
        i: result
        for i, result in results.read(path).items()
        if i in asked and result.digest == write(i).digest
    }
    with bar(console) as progress:
        task = progress.add_task("", total=count, completed=len(found), label="")
        for result in workers.check_all((i for i in asked if i not in found), jobs):
            found[result.seed] = result
            results.append(path, result)
            if result.outcome not in results.RIGHT:
                text = result.message.strip().splitlines()[-1]
                console.print(f"{result.outcome} {result.seed}: {text}", markup=False)
            progress.update(task, advance=1, label=f"{result.seed}: {result.outcome}")
    outcomes, refusals, features = report.write(list(found.values()), output, console)
    if write_docs:
        documents.write_into(DOCS, outcomes, name="fuzz")
        for name, text in {
            "outcomes": outcomes,
            "refusals": refusals,
            "features": features,
        }.items():
            documents.write_into(README, text, name=name)
    console.print(f"written   {output}: results.jsonl, results.md, refusals.csv, features.csv")
    if any(result.outcome not in results.RIGHT for result in found.values()):
        sys.exit(1)


def _show(seed: int) -> None:
    """Prints a program's source, and its model or refusal."""
    program = write(seed)
    click.echo(program.source)
    workers.set_up_jax()
    from experiments.fuzz_losses import check

    click.echo("-" * 100)
    click.echo(f"layers={program.layers} shared={program.shared}")
    click.echo(str(check.refusal_or_model(program, program.load())))


if __name__ == "__main__":
    main()
