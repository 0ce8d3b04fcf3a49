"""Flags that the questions to compilers share, and the one way in which they report."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from experiments import documents
from experiments.compiled.compiles import Compiles
from experiments.compiled.models import HEAD_SIZE
from experiments.train_lm import flags

README = Path(__file__).with_name("README.md")

widths = click.option(
    "--width",
    "widths",
    type=click.IntRange(min=HEAD_SIZE),
    multiple=True,
    default=(1024, 2048),
    help=f"A multiple of {HEAD_SIZE}. Once for each.",
)
write_readme = click.option("--write-readme", is_flag=True, help="Put the tables into the README.")
output = flags.output("runs/compiled", results="the tables, and the figures of all compiles")


def layers(*, default: tuple[int, ...], fewest: int) -> Callable[..., Any]:
    """Adds the flag of the layers a stage, `fewest` or more."""
    number = click.IntRange(min=fewest)
    text = "A stage; once for each number."
    return click.option("--layers", type=number, multiple=True, default=default, help=text)


def require_whole_heads(widths: Iterable[int]) -> None:
    """Refuses widths of which a block's heads would not be whole."""
    sizes = (("--width", width, HEAD_SIZE) for width in widths)
    flags.require_multiples(*sizes, why="the size of a head")


def open_compiles(output: Path) -> Compiles:
    """Makes the folder, and reads the compiles in it."""
    flags.make_folder(output)
    return Compiles(output / "compiles.jsonl")


def publish(tables: dict[str, str], output: Path, *, is_for_readme: bool) -> None:
    """Prints the tables, writes each to the folder, and on demand into the README."""
    for name, text in tables.items():
        click.echo(f"{text}\n")
        (output / f"{name}.md").write_text(text)
        if is_for_readme:
            documents.write_into(README, text, name=name)
