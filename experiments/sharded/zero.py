"""Counts a training step's bytes on a device, by the leaves that are sharded over the data axis.

The degrees are those of ZeRO (arXiv:1910.02054); the last is also known as FSDP.
"""

from pathlib import Path
from typing import Any

import click
import jax

from experiments import documents, tables
from experiments.sharded.steps import Bytes, Layout, P, Sizes, measure, specs
from experiments.train_lm import flags

DOCS = Path(__file__).resolve().parents[2] / "docs" / "mesh_axes.md"
DEFAULTS = {
    "ranks": 2,
    "shards": 4,
    "microbatches": 8,
    "layers": 8,
    "width": 256,
    "vocabulary": 4096,
    "context": 16,
}
# The same on all shards of the data, and a part on each.
WHOLE = specs(table=P(), out=P(), up=P("pipe"), down=P("pipe"))
PARTS = specs(
    table=P("data"), out=P(None, "data"), up=P("pipe", None, "data"), down=P("pipe", "data")
)
DEGREES = {
    "nothing": Layout(parameters=WHOLE, gradients=WHOLE, state=WHOLE),
    "optimizer state": Layout(parameters=WHOLE, gradients=WHOLE, state=PARTS),
    "and gradients": Layout(parameters=WHOLE, gradients=PARTS, state=PARTS),
    "and parameters": Layout(parameters=PARTS, gradients=PARTS, state=PARTS),
}


def table(rows: dict[str, Bytes]) -> str:
    """Writes the MiB of a device."""

    def mebi(name: str) -> tables.Cell:
        return lambda item: f"{getattr(item[1], name) / 2**20:.1f}"

    columns: dict[str, tables.Cell] = {
        "over the data axis": lambda item: item[0],
        "parameters": mebi("parameters"),
        "gradients": mebi("gradients"),
        "Adam's state": mebi("state"),
        "temporaries": mebi("temporaries"),
        "all": mebi("total"),
    }
    return tables.markdown(columns, list(rows.items()), words=("over the data axis",))


@flags.script("zero")
@Sizes.flags(**DEFAULTS)
@click.option("--write-docs", is_flag=True, help="Put the table into docs/mesh_axes.md.")
def main(write_docs: bool, **options: Any) -> None:
    """Count a device's MiB, by the leaves that are sharded over the data axis."""
    sizes = Sizes(**options)
    flags.require_multiples(
        ("--layers", sizes.layers, sizes.ranks),
        ("--width", sizes.width, sizes.shards),
        ("--vocabulary", sizes.vocabulary, sizes.shards),
        why="for every device to have as much",
    )
    jax.config.update("jax_num_cpu_devices", sizes.ranks * sizes.shards)  # before a backend starts
    text = table({name: measure(sizes, degree) for name, degree in DEGREES.items()})
    click.echo(text)
    if write_docs:
        documents.write_into(DOCS, text, name="zero")


if __name__ == "__main__":
    main()
