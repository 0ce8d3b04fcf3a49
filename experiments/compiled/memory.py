"""Compares the memory of steps for an absent TPU with their own account, and with `jax.grad`'s.

In: flags. Out, printed and in a folder: a table and an account. See README.md beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, PartitionSpec
from rich.progress import track

import dualpipe_jax as dpj
from experiments import tables
from experiments.benchmarks import variants
from experiments.benchmarks.variants import AXIS, RECIPE, REMATS
from experiments.compiled import flags
from experiments.compiled.compiles import Figures
from experiments.compiled.steps import Step, lay
from experiments.train_lm.flags import POSITIVE, require_multiples, script, several
from experiments.train_lm.model import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Case:
    """Describes a step of train_lm's model: its sizes, and how it runs.

    Attributes:
      topology: As `dpj.preflight` takes it.
      schedule: One of `dpj.schedules.names()`, or `RECIPE` for GPipe as usually written in JAX.
      remat: `"none"` or `"block"`.
      microbatches: The number in a step.
      split_backward: As `dpj.Execution` takes it.
    """

    topology: str
    ranks: int
    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int
    microbatch_size: int
    split_backward: bool = True
    schedule: str = "dualpipe"
    remat: str = "none"
    microbatches: int = 16

    def make(self) -> Step:
        """Makes the step."""
        model = LanguageModel(
            layers=self.layers, width=self.width, heads=self.heads, vocabulary=self.vocabulary
        )
        # That they are TPUs, whichever: the account counts weights as TPUs' contractions read them.
        device = AbstractDevice(device_kind="TPU", num_cores=None, platform="tpu")
        mesh = AbstractMesh((self.ranks,), (AXIS,), abstract_device=device)
        params = jax.eval_shape(model.init, jax.random.key(0))
        rows = self.microbatches * self.microbatch_size
        batch = jax.ShapeDtypeStruct((rows, self.sequence + 1), jnp.int32)
        blocks = {"ends": PartitionSpec(), "blocks": PartitionSpec(AXIS)}
        args = lay((params, batch), (blocks, PartitionSpec()), mesh)
        pipeline: dict[str, Any] = {"num_microbatches": self.microbatches, "remat": self.remat}
        if self.schedule == RECIPE:

            def step(params: Any, batch: jax.Array) -> Any:
                loss = variants.recipe_loss(
                    model.for_pipeline(),
                    mesh=jax.sharding.get_abstract_mesh(),  # that of the topology
                    unrolled=self.layers // self.ranks,
                    **pipeline,
                )
                return jax.value_and_grad(loss)(params, batch)

            return Step(fn=jax.jit(step), args=args, mesh=mesh)
        grad_fn = dpj.value_and_grad(
            model.for_pipeline(),
            mesh=mesh,
            axis=AXIS,
            schedule=self.schedule,
            execution=dpj.Execution(overlap=True, split_backward=self.split_backward),
            **pipeline,
        )
        return Step(fn=jax.jit(grad_fn), args=args, mesh=mesh, memory=grad_fn.memory(*args))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step's memory on one device.

    Attributes:
      case: The step.
      figures: The figures of its program.
    """

    case: Case
    figures: Figures

    @property
    def peak(self) -> int:
        """Bytes beside the arguments; of a step that does not fit, those that it would need."""
        figures = self.figures
        peak = figures.peak if figures.fits else figures.needed
        if peak is None:
            raise click.ClickException(f"{self.case.schedule}: the compiler gives no peak")
        return peak - (figures.arguments or 0) if figures.fits else peak


def _share(row: Row) -> str:
    return "-" if row.figures.terms is None else f"{row.figures.terms / row.peak:.2f}"


COLUMNS: tables.Columns = {
    "step": lambda row: row.case.schedule,
    "remat": lambda row: row.case.remat,
    "microbatches": lambda row: row.case.microbatches,
    "peak, MiB": lambda row: (
        f"{row.peak / 2**20:,.1f}{'' if row.figures.fits else ', does not fit'}"
    ),
    "sum of the terms, MiB": lambda row: tables.number(row.figures.terms, ",.0f", unit=2**20),
    "terms / peak": _share,
}


def cases(sizes: Case, schedules: Sequence[str], remats: Sequence[str]) -> list[Case]:
    """Lists the steps: 4 microbatches a rank; of the first schedule and the recipe 16 as well."""
    few, many = 4 * sizes.ranks, 16 * sizes.ranks
    first, *others = dict.fromkeys(schedules)
    counts = {first: (few, many), **dict.fromkeys(others, (few,)), RECIPE: (few, many)}
    return [
        replace(sizes, schedule=name, remat=remat, microbatches=count)
        for remat in dict.fromkeys(remats)
        for name, numbers in counts.items()
        for count in numbers
    ]


@script("memory")
@click.option("--topology", default="tpu:v5e:2x2")
@click.option("--ranks", type=POSITIVE, default=4)
@click.option("--layers", type=POSITIVE, default=8)
@click.option("--width", type=POSITIVE, default=512)
@click.option("--heads", type=POSITIVE, default=8)
@click.option("--sequence", type=POSITIVE, default=512)
@click.option("--vocabulary", type=POSITIVE, default=1024)
@click.option("--microbatch-size", type=POSITIVE, default=1)
@several(
    "--schedule",
    "schedules",
    dpj.schedules.names(),
    default=("dualpipe", "dualpipev"),
    text="The first with both numbers of microbatches.",
)
@several("--remat", "remats", REMATS, default=REMATS, text="The rematerialisation of blocks.")
@click.option(
    "--split-backward/--no-split-backward",
    default=True,
    help="Whether backwards are split; else full, layer by layer.",
)
@flags.output
@flags.write_readme
def main(
    *,
    schedules: tuple[str, ...],
    remats: tuple[str, ...],
    output: Path,
    write_readme: bool,
    **sizes: Any,
) -> None:
    """Compare the memory of a step with its own account, and with GPipe by `jax.grad`."""
    of_ranks = ("--layers", sizes["layers"], sizes["ranks"])
    require_multiples(of_ranks, why="--ranks, so that every rank has as many")
    compiles = flags.open_compiles(output)
    asked = cases(Case(**sizes), schedules, remats)
    rows = [
        Row(case=case, figures=compiles(case)) for case in track(asked, "compiling", transient=True)
    ]
    table = tables.markdown(COLUMNS, rows, words=("step", "remat"))
    account = f"```\n{rows[0].figures.account}\n```\n"
    flags.publish({"memory": table, "account": account}, output, is_for_readme=write_readme)


if __name__ == "__main__":
    main()
