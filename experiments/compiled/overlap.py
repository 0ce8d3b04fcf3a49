"""Compiles steps for TPUs that are not there, and asks whether compute hides their communication.

In: flags. Out, in a folder: overlap.csv, tables.md. See README.md beside it.
"""

import os
from dataclasses import replace
from pathlib import Path

# Compilers for absent hardware are no backends: only the CPU's is to be started.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import click
from rich.console import Console

from experiments.compiled import report, sizes, steps
from experiments.compiled.steps import Case
from experiments.train_lm import flags
from experiments.train_lm.flags import Refusal

QUESTIONS = {
    "permutes": "Are the steady loop's permutes hidden?",
    "experts": "Are a mixture of experts' all-to-alls?",
    "efficiency": "What does the steady loop cost beside an unpipelined step?",
    "size": "Does the program grow with the pipeline?",
}


def cases(question: str, *, widths: tuple[int, ...], layers: tuple[int, ...]) -> list[Case]:
    """Lists what is compiled for a question."""
    few, many = layers[0], layers[-1]
    over_4 = Case(topology="tpu:v5e:2x2", ranks=4, width=widths[0], layers=few)
    over_8 = replace(over_4, topology="tpu:v5e:2x4", ranks=8)
    match question:
        case "permutes":
            ours = [
                replace(case, width=width, layers=count)
                for case in (over_4, over_8)
                for width in widths
                for count in dict.fromkeys((few, many))
            ]
            return [*ours, replace(over_4, schedule="1f1b", overlap=None)]
        case "experts":
            ours = replace(over_8, ranks=4, beside=2, family="experts")
            return [ours, replace(ours, schedule="1f1b", overlap=None)]
        case "efficiency":
            kinds = ("transformer", "block"), ("transformer", "none"), ("mlp", "block")
            return [
                replace(over_4, family=family, remat=remat, width=width)
                for family, remat in kinds
                for width in widths
            ]
        case _:
            return [
                replace(over_4, topology="tpu:v5p:2x2x1"),
                replace(over_4, topology="tpu:v5p:4x4x4", ranks=16, beside=4),
            ]


def measure(question: str, case: Case) -> report.Row:
    """Compiles a case; for pipelines of four also the same layers without a pipeline."""
    has_reference = case.ranks == 4 and case.schedule == "dualpipe" and case.beside == 1
    reference = steps.unpipelined(case) if has_reference and question != "size" else None
    return report.Row.of(question, case, steps.pipelined(case), reference)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--question",
    "questions",
    type=click.Choice(list(QUESTIONS)),
    multiple=True,
    help="Once for each; all by default.",
)
@sizes.widths
@sizes.layers(default=(2, 4), fewest=1)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/overlap"),
    help="The folder for the figures and the tables.",
)
def command(
    *, questions: tuple[str, ...], widths: tuple[int, ...], layers: tuple[int, ...], output: Path
) -> None:
    """Compile training steps for TPUs, and read whether compute hides their communication."""
    sizes.require_whole_heads(widths)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--output {output}: {error.strerror}") from error
    console = Console(highlight=False)
    figures = output / "overlap.csv"
    rows = report.read_csv(figures) if figures.exists() else []
    try:
        for question in questions or tuple(QUESTIONS):
            for case in cases(question, widths=widths, layers=layers):
                # Some take minutes: whatever an earlier run has compiled is not compiled again.
                if any(row.question == question and row.case == case for row in rows):
                    continue
                rows.append(measure(question, case))
                report.write_csv(rows, figures)
                console.print(report.describe(rows[-1]))
    except ModuleNotFoundError as error:
        raise Refusal(str(error)) from error
    report.write_markdown(rows, output / "tables.md")
    console.print(f"written   {output}: overlap.csv, tables.md")


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="overlap")


if __name__ == "__main__":
    main()
