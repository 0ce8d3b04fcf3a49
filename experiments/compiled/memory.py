"""Compiles steps for a TPU that need not be there, and compares what they hold with `jax.grad`'s.

Run it with `make memory`. It needs `pip install '.[tpu-aot]'`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec
from rich.progress import track

import dualpipe_jax as dpj
from experiments import documents
from experiments.benchmarks import variants
from experiments.train_lm import flags
from experiments.train_lm.model import LanguageModel

README = Path(__file__).with_name("memory.md")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model, its microbatches, and the pipeline."""

    topology: str
    ranks: int
    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int
    microbatch_size: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step's memory, in bytes on one device beside the arguments.

    `terms` is what the library says itself; None for what is not its own. Where the step does not
    fit, `peak` is what its refusal says is needed.
    """

    name: str
    remat: str
    microbatches: int
    peak: int
    terms: int | None
    fits: bool = True


def measure(
    name: str, sizes: Sizes, *, remat: str, microbatches: int, split_backward: bool = True
) -> tuple[Row, str]:
    """Compiles one step; returns its row, and the library's own account of it.

    Args:
      name: A schedule's, or that of the recipe.
      sizes: The sizes.
      remat: "none" or "block".
      microbatches: How many.
      split_backward: As `dpj.Execution` takes it, where the step is the library's.
    """
    model = LanguageModel(
        layers=sizes.layers, width=sizes.width, heads=sizes.heads, vocabulary=sizes.vocabulary
    )
    # That they are TPUs, whichever: the account counts weights as a TPU's contractions read them.
    device = AbstractDevice(device_kind="TPU", num_cores=None, platform="tpu")
    mesh = AbstractMesh((sizes.ranks,), (variants.AXIS,), abstract_device=device)
    args = _arguments(model, sizes, mesh, microbatches)
    account, terms = "", None
    if name == variants.RECIPE:
        step = _recipe(model, sizes, remat=remat, microbatches=microbatches)
    else:
        grad_fn = dpj.value_and_grad(
            model.for_pipeline(),
            mesh=mesh,
            num_microbatches=microbatches,
            axis=variants.AXIS,
            remat=remat,
            schedule=name,
            execution=dpj.Execution(overlap=True, split_backward=split_backward),
        )
        memory = grad_fn.memory(*args)
        account, terms = str(memory), memory.num_bytes
        step = jax.jit(grad_fn)
    report = dpj.preflight(step, args, sizes.topology, mesh=mesh)
    memory = report.memory
    peak = memory.needed if report.failure else memory.peak
    if peak is None:
        raise click.ClickException(f"{name}: {report.failure or 'the compiler gives no peak'}")
    row = Row(
        name=name,
        remat=remat,
        microbatches=microbatches,
        peak=peak if report.failure else peak - (memory.arguments or 0),
        terms=terms,
        fits=not report.failure,
    )
    return row, account


def _recipe(model: LanguageModel, sizes: Sizes, *, remat: str, microbatches: int) -> Any:
    def step(params: Any, batch: jax.Array) -> Any:
        loss = variants.recipe_loss(
            model.for_pipeline(),
            mesh=jax.sharding.get_abstract_mesh(),  # that of the topology
            num_microbatches=microbatches,
            remat=remat,
            unrolled=sizes.layers // sizes.ranks,
        )
        return jax.value_and_grad(loss)(params, batch)

    return jax.jit(step)


def _arguments(model: LanguageModel, sizes: Sizes, mesh: Any, microbatches: int) -> Any:
    params = jax.eval_shape(model.init, jax.random.key(0))
    rows = microbatches * sizes.microbatch_size

    def on_mesh(leaf: Any, *spec: str) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    batch = jax.ShapeDtypeStruct((rows, sizes.sequence + 1), jnp.int32)
    return {
        "ends": jax.tree.map(on_mesh, params["ends"]),
        "blocks": jax.tree.map(lambda leaf: on_mesh(leaf, variants.AXIS), params["blocks"]),
    }, on_mesh(batch)


def table(rows: list[Row]) -> str:
    """Writes the rows as Markdown."""
    mebi = 2**20
    lines = [
        "| step | remat | microbatches | peak, MiB | sum of the terms, MiB | terms / peak |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        terms = "-" if row.terms is None else f"{row.terms / mebi:,.0f}"
        share = "-" if row.terms is None else f"{row.terms / row.peak:.2f}"
        peak = f"{row.peak / mebi:,.1f}" + ("" if row.fits else ", does not fit")
        lines.append(
            f"| {row.name} | {row.remat} | {row.microbatches} | {peak} | {terms} | {share} |"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--topology", default="tpu:v5e:2x2", show_default=True)
@click.option("--ranks", type=flags.POSITIVE, default=4, show_default=True)
@click.option("--layers", type=flags.POSITIVE, default=8, show_default=True)
@click.option("--width", type=flags.POSITIVE, default=512, show_default=True)
@click.option("--heads", type=flags.POSITIVE, default=8, show_default=True)
@click.option("--sequence", type=flags.POSITIVE, default=512, show_default=True)
@click.option("--vocabulary", type=flags.POSITIVE, default=1024, show_default=True)
@click.option("--microbatch-size", type=flags.POSITIVE, default=1, show_default=True)
@flags.several(
    "--schedule",
    "schedules",
    dpj.schedules.names(),
    default=("dualpipe", "dualpipev"),
    text="The first with both numbers of microbatches.",
)
@flags.several(
    "--remat",
    "remats",
    variants.REMATS,
    default=variants.REMATS,
    text="What a block keeps for its backward.",
)
@click.option(
    "--split-backward/--no-split-backward",
    default=True,
    show_default=True,
    help="Whether input grads and weight grads run apart; else layer by layer.",
)
@click.option("--write-readme", is_flag=True, help="Put the table into the README.")
def command(
    schedules: tuple[str, ...],
    remats: tuple[str, ...],
    split_backward: bool,
    write_readme: bool,
    **options: Any,
) -> None:
    """Compare what a step holds with its own account, and with GPipe by `jax.grad`."""
    sizes = Sizes(**options)
    if sizes.layers % sizes.ranks:
        raise flags.Refusal(
            f"--layers {sizes.layers}: must be a multiple of --ranks {sizes.ranks}, so that every "
            "rank has as many"
        )
    few, many = 4 * sizes.ranks, 16 * sizes.ranks
    first, *others = dict.fromkeys(schedules)
    counts_of = {
        first: (few, many),
        **dict.fromkeys(others, (few,)),
        variants.RECIPE: (few, many),
    }
    cases = [
        (name, remat, count)
        for remat in dict.fromkeys(remats)
        for name, counts in counts_of.items()
        for count in counts
    ]
    rows, account = [], ""
    for name, remat, count in track(cases, "compiling", transient=True):
        row, mine = measure(
            name, sizes, remat=remat, microbatches=count, split_backward=split_backward
        )
        account = account or mine
        rows.append(row)
    click.echo(table(rows))
    click.echo(f"\n{account}")
    if write_readme:
        documents.write_into(README, f"{table(rows)}\n\n```\n{account}\n```")


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="memory")


if __name__ == "__main__":
    main()
