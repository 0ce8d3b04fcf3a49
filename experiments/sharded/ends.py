"""Counts the cost of embedding and head in a pipeline: bytes on every rank, and idle time."""

import itertools
from pathlib import Path
from typing import Any

import click
import jax

import dualpipe_jax as dpj
from experiments import documents, tables
from experiments.sharded.steps import Bytes, Layout, P, Sizes, measure, specs
from experiments.train_lm import flags

README = Path(__file__).with_name("README.md")
DEFAULTS = {
    "ranks": 8,
    "microbatches": 32,
    "layers": 128,
    "width": 512,
    "vocabulary": 2**17,
    "context": 64,
}
SCHEDULES, HEADS, FEWER = ("1f1b", "dualpipe", "dualpipev"), (1, 2, 4), (0, 1, 2, 4)


def _layout(table: P, out: P) -> Layout:
    made = specs(table=table, out=out, up=P("pipe"), down=P("pipe"))
    return Layout(parameters=made, gradients=made, state=made)


LAYOUTS = {
    "on every rank": _layout(P(), P()),
    "over the ranks": _layout(P("pipe"), P(None, "pipe")),
}


def bytes_table(rows: dict[str, Bytes]) -> str:
    """Writes the MiB of a device: parameters and Adam's state, and temporaries."""

    def mebi(*names: str) -> tables.Cell:
        return lambda item: f"{sum(getattr(item[1], name) for name in names) / 2**20:,.0f}"

    columns: dict[str, tables.Cell] = {
        "embedding and head": lambda item: item[0],
        "state, MiB": mebi("parameters", "state"),
        "temporaries, MiB": mebi("temporaries"),
        "both, MiB": mebi("total"),
    }
    return tables.markdown(columns, list(rows.items()), words=("embedding and head",))


def layers_per_stage(num_layers: int, num_stages: int, fewer: int) -> list[int]:
    """Takes layers from the last stage, and gives them to those after the first in turn.

    >>> layers_per_stage(16, 4, 2)
    [4, 5, 5, 2]
    """
    sizes = [num_layers // num_stages] * num_stages
    sizes[-1] -= fewer
    for i in range(fewer):
        sizes[1 + i % (num_stages - 2)] += 1
    return sizes


def idle_share(sizes: Sizes, schedule: str, *, head_layers: float, fewer: int) -> float | None:
    """Simulates the idle share; None where the last stage has too few layers.

    `head_layers` is the cost of the head's forward, in forwards of a layer.
    """
    made = dpj.schedules.make(schedule, num_ranks=sizes.ranks, num_microbatches=sizes.microbatches)
    spread = layers_per_stage(sizes.layers, made.num_stages, fewer)
    if spread[-1] <= 0:
        return None
    costs = dpj.Costs(head=head_layers * sizes.ranks / sizes.layers)
    return dpj.simulate(made, costs=costs, layers_per_stage=spread).idle_share


def idle_table(sizes: Sizes) -> str:
    """Writes the idle shares by schedule, cost of the head, and layers that leave its stage."""

    def share(fewer: int) -> tables.Cell:
        return lambda case: tables.number(
            idle_share(sizes, case[0], head_layers=case[1], fewer=fewer), ".1%"
        )

    columns: dict[str, tables.Cell] = {
        "schedule": lambda case: case[0],
        "head, in layers": lambda case: case[1],
        **{f"{fewer} fewer": share(fewer) for fewer in FEWER},
    }
    cases = list(itertools.product(SCHEDULES, HEADS))
    return tables.markdown(columns, cases, words=("schedule",))


@flags.script("ends")
@Sizes.flags(**DEFAULTS)
@click.option("--write-readme", is_flag=True, help="Put the tables into the README.")
def main(write_readme: bool, **options: Any) -> None:
    """Count the cost of embedding and head: bytes on a device, and idle time."""
    sizes = Sizes(**options)
    flags.refuse({f"--ranks {sizes.ranks}: must be at least 3": sizes.ranks < 3})
    flags.require_multiples(
        ("--layers", sizes.layers, 2 * sizes.ranks),
        ("--vocabulary", sizes.vocabulary, sizes.ranks),
        why="for every stage and rank to have as many",
    )
    jax.config.update("jax_num_cpu_devices", sizes.ranks)  # read when the backend starts
    rows = {name: measure(sizes, layout) for name, layout in LAYOUTS.items()}
    for name, text in {"ends": bytes_table(rows), "heads": idle_table(sizes)}.items():
        click.echo(text)
        if write_readme:
            documents.write_into(README, text, name=name)


if __name__ == "__main__":
    main()
