"""Compares pipelines across two slices of absent TPUs with data parallelism across them.

In: flags. Out, printed and in a folder: a table. All steps have the same model, chips and tokens.
See README.md beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from rich.progress import track

import dualpipe_jax as dpj
from experiments import tables
from experiments.compiled import flags, models, steps
from experiments.compiled.compiles import ACROSS, Figures
from experiments.compiled.steps import Case, Step
from experiments.train_lm.flags import script, several

TOPOLOGY, CHIPS, LAYERS = "tpu:v5e:2x2*2", 8, 16
_STAGES_A_RANK = {"dualpipev": 2, "interleaved-1f1b": 2}
SCHEDULES = ("dualpipe", "dualpipev", "1f1b", "interleaved-1f1b")
KINDS = ("pipe 2 x data 4", "pipe 4 x data 2", "pipe 4 x expert 2", "data 8", "fsdp 8")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Describes a step without a pipeline: each chip has all layers, and a part of the batch.

    Attributes:
      topology: As `dpj.preflight` takes it.
      width: The size of the residual stream.
      tokens: A microbatch has, on one chip.
      num_microbatches: On one chip; their gradients are added up.
      is_sharded: Whether parameters and gradients are sharded over the chips (FSDP): a layer is
        gathered in every microbatch, and its gradient scattered. Else gradients are summed over the
        chips after the last microbatch.
    """

    topology: str
    width: int
    tokens: int
    num_microbatches: int
    is_sharded: bool

    def make(self) -> Step:
        """Makes the step, of an MLP a layer."""
        family = models.FAMILIES["mlp"]
        mesh = AbstractMesh((CHIPS,), ("data",), axis_types=(AxisType.Auto,))
        blocks = PartitionSpec(None, "data") if self.is_sharded else PartitionSpec()
        ends = PartitionSpec("data") if self.is_sharded else PartitionSpec()
        specs = {"ends": ends, "blocks": blocks}

        def whole(leaf: jax.Array) -> jax.Array:
            return lax.all_gather(leaf, "data", tiled=True) if self.is_sharded else leaf

        def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
            ctx = dpj.Context(microbatch=tokens)
            ends = jax.tree.map(whole, params["ends"])
            with jax.named_scope(steps.EMBED):
                x = models.embed(ends, ctx)

            def block(x: jax.Array, layer: Any) -> Any:
                return family.block(jax.tree.map(whole, layer), x, ctx), None

            x, _ = lax.scan(block, x, params["blocks"])
            with jax.named_scope(steps.HEAD):
                return models.head(ends, x, ctx)

        def step(params: Any, batch: jax.Array) -> Any:
            def microbatch(sums: Any, tokens: jax.Array) -> Any:
                more = jax.value_and_grad(loss_of)(params, tokens)
                return jax.tree.map(jnp.add, sums, more), None

            start = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
            rows = batch.reshape(self.num_microbatches, self.tokens)
            loss, grads = lax.scan(microbatch, start, rows)[0]
            return lax.psum(loss, "data"), grads if self.is_sharded else lax.psum(grads, "data")

        batch = jax.ShapeDtypeStruct((CHIPS * self.num_microbatches * self.tokens,), jnp.int32)
        avals = family.avals(self.width, LAYERS), batch
        args = steps.lay(avals, (specs, PartitionSpec("data")), mesh)
        fn = jax.shard_map(
            step,
            in_specs=(specs, PartitionSpec("data")),
            out_specs=(PartitionSpec(), specs),
            check_vma=False,
        )
        return Step(fn=jax.jit(fn), args=args, mesh=mesh)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A step and its figures."""

    kind: str
    case: Case | Data
    figures: Figures

    @property
    def across(self) -> str:
        """Counts the loop's transfers across slices that are hidden."""
        count = self.figures.count(ACROSS)
        return f"{count.num_hidden} of {count.total}" if count.total else "-"


COLUMNS: tables.Columns = {
    "mesh": lambda row: row.kind,
    "schedule": lambda row: getattr(row.case, "schedule", "-"),
    "memory, MiB": lambda row: tables.number(row.figures.needed, ",.0f", unit=2**20),
    "across slices, hidden": lambda row: row.across,
    "a trip: compute, us": lambda row: tables.number(
        row.figures.compute_seconds, ",.0f", unit=1e-6
    ),
    "exposed, us": lambda row: tables.number(row.figures.exposed_seconds, ",.0f", unit=1e-6),
    "outside the loop, ms": lambda row: tables.number(
        row.figures.outside_seconds, ",.1f", unit=1e-3
    ),
    "exposed, ms": lambda row: tables.number(
        row.figures.outside_exposed_seconds, ",.1f", unit=1e-3
    ),
    "step, ms": lambda row: tables.number(row.figures.predicted_seconds, ",.1f", unit=1e-3),
}


def cases(
    kind: str, *, width: int, tokens: int, schedules: tuple[str, ...]
) -> Iterator[Case | Data]:
    """Yields the steps over a mesh: all have the tokens of 4 microbatches on each of the chips."""
    if not kind.startswith("pipe"):
        yield Data(
            topology=TOPOLOGY,
            width=width,
            tokens=tokens,
            num_microbatches=4,
            is_sharded=kind.startswith("fsdp"),
        )
        return
    words = kind.split()
    for schedule in schedules:
        yield Case(
            topology=TOPOLOGY,
            ranks=int(words[1]),
            beside=int(words[4]),
            family="experts" if "expert" in kind else "mlp",
            width=width,
            layers=LAYERS // int(words[1]) // _STAGES_A_RANK.get(schedule, 1),
            tokens=tokens,
            schedule=schedule,
            overlap=True if schedule.startswith("dualpipe") else None,
        )


@script("slices")
@several("--mesh", "kinds", KINDS, default=KINDS, text="To compile.")
@several("--schedule", "schedules", SCHEDULES, default=SCHEDULES, text="Of the pipelines.")
@click.option("--width", type=click.IntRange(min=models.HEAD_SIZE), default=512)
@click.option("--tokens", type=click.IntRange(min=8), default=2048, help="A microbatch, on a chip.")
@flags.output
@flags.write_readme
def main(
    *,
    kinds: tuple[str, ...],
    schedules: tuple[str, ...],
    width: int,
    tokens: int,
    output: Path,
    write_readme: bool,
) -> None:
    """Compile steps over two slices: pipelines across them, and data parallelism across them."""
    flags.require_whole_heads((width,))
    compiles, rows = flags.open_compiles(output), []
    asked = [
        (kind, case)
        for kind in kinds
        for case in cases(kind, width=width, tokens=tokens, schedules=schedules)
    ]
    for kind, case in track(asked, "compiling", transient=True):
        rows.append(Row(kind=kind, case=case, figures=compiles(case)))
    table = tables.markdown(COLUMNS, rows, words=("mesh", "schedule"))
    flags.publish({"slices": table}, output, is_for_readme=write_readme)


if __name__ == "__main__":
    main()
