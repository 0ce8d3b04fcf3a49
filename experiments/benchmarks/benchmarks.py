"""Measures the cost of a step: this library's, the same without a pipeline, and the usual recipe.

In: flags. Out, in a folder: records.jsonl, table.md, and the workers' stderr; on demand table.md
beside it.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console

import dualpipe_jax as dpj
from experiments import documents
from experiments.benchmarks import racing, report, variants
from experiments.benchmarks.tasks import Compiled, Sizes, Step, Task
from experiments.progress import bar
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE

TABLE = Path(__file__).with_name("table.md")
# Float32 sums in another order: a few 1e-7 of the loss, some 1e-6 of a layer's gradient norm. A
# layer left out, or two gradients exchanged, changes them by far more.
TOLERANCE = 1e-4


@flags.script("benchmarks")
@click.option(
    "--ranks",
    type=POSITIVE,
    multiple=True,
    default=(2, 4, 8),
    help="Fake CPU devices of the pipeline; once for each number to measure.",
)
@flags.several(
    "--remat",
    "remats",
    variants.REMATS,
    default=variants.REMATS,
    text="The rematerialisation of blocks.",
)
@click.option(
    "--variant",
    "names",
    type=click.Choice(variants.NAMES),
    multiple=True,
    show_default="all that differ",
    help="Once for each to measure.",
)
@click.option("--rounds", type=POSITIVE, default=5, help="Measured steps of each.")
@click.option("--layers", type=POSITIVE, default=16, help="Over all stages.")
@click.option("--width", type=POSITIVE, default=256, help="Size of the residual stream.")
@click.option("--heads", type=POSITIVE, default=8, help="Attention heads of each layer.")
@click.option("--sequence", type=POSITIVE, default=128, help="Tokens that are read.")
@click.option("--vocabulary", type=POSITIVE, default=1024, help="Different tokens.")
@click.option("--microbatch-size", type=POSITIVE, default=2, help="Sequences of a microbatch.")
@click.option("--microbatches-per-rank", type=POSITIVE, default=4, help="Microbatches of one step.")
@click.option(
    "--huge-pages/--small-pages",
    default=True,
    help="Whether all variants ask for their memory in huge pages, where the system has some.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of all random draws."
)
@flags.output("runs/benchmarks", results="the records and the table")
@click.option("--write-table", is_flag=True, help="Put the table into table.md beside the script.")
def main(
    *,
    ranks: tuple[int, ...],
    remats: tuple[str, ...],
    names: tuple[str, ...],
    rounds: int,
    microbatches_per_rank: int,
    huge_pages: bool,
    output: Path,
    write_table: bool,
    **options: int,
) -> None:
    """Measure the cost of a training step beside one without a pipeline and the usual JAX recipe.

    Each variant compiles and runs in a process of its own; their steps are taken in turns.
    """
    ranks = tuple(sorted(set(ranks)))
    remats = tuple(dict.fromkeys(remats))
    names = tuple(dict.fromkeys(names))
    sizes = Sizes(**options)
    _require_flags_fit(sizes, names=names or variants.NAMES, ranks=ranks)
    flags.make_folder(output)
    records = (output / "records.jsonl").open("w")
    console = Console(highlight=False)
    rows: list[report.Row] = []
    huge_pages = huge_pages and racing.can_have_huge_pages()
    about = {
        **_about(sizes, rounds=rounds, microbatches_per_rank=microbatches_per_rank),
        "pages": "huge" if huge_pages else "small",
    }
    races = {
        (num_ranks, remat): names
        or variants.different(remat=remat, num_layers=sizes.layers, num_ranks=num_ranks)
        for num_ranks in ranks
        for remat in remats
    }
    with records, bar(console) as progress:
        _write(records, {"what": "run", **about})
        num_all = sum(map(len, races.values())) * (1 + rounds)
        progress_task = progress.add_task("", total=num_all, label="")
        # All workers of a race stay in memory; so one number of ranks and one remat at a time.
        for (num_ranks, remat), racers in races.items():
            progress.update(progress_task, label=f"{num_ranks} ranks, remat {remat}")
            results = [
                racing.Result(
                    task=Task(
                        variant=name,
                        ranks=num_ranks,
                        microbatches=microbatches_per_rank * num_ranks,
                        remat=remat,
                        sizes=sizes,
                    )
                )
                for name in racers
            ]
            for _ in racing.race(
                results,
                num_rounds=rounds,
                huge_pages=huge_pages,
                logs=output,
                record=_recorder(records),
            ):
                progress.advance(progress_task)
            raced = report.summarize(results)
            rows += raced
            console.print(report.to_terminal(raced))

    table = f"{report.to_markdown(rows)}\n{_caption(about)}\n"
    (output / "table.md").write_text(table)
    console.print(f"written   {output}: records.jsonl, table.md", soft_wrap=True)
    require_agreement(rows)
    console.print(f"agreement {describe_agreement(rows)}", soft_wrap=True)
    if write_table:
        documents.write_into(TABLE, table)


def require_agreement(rows: Sequence[report.Row]) -> None:
    """Raises if a variant failed, or computes something else than the limit."""
    failed = [f"{_name(row)} failed, {row.failure}" for row in rows if row.failure is not None]
    wrong = [
        f"{_name(row)} by {row.loss_difference:.0e} and {row.norm_difference:.0e}"
        for row in rows
        if row.loss_difference is not None
        and row.norm_difference is not None
        # Not >, so that NaN is wrong.
        and not (row.loss_difference <= TOLERANCE and row.norm_difference <= TOLERANCE)
    ]
    problems = failed
    if wrong:
        problems.append(
            f"loss or gradient norms differ by more than {TOLERANCE:g}: {', '.join(wrong)}"
        )
    if problems:
        raise click.ClickException("; ".join(problems))


def describe_agreement(rows: Sequence[report.Row]) -> str:
    """Says by how much the variants differ at most."""
    loss = max(row.loss_difference for row in rows if row.loss_difference is not None)
    norm = max(row.norm_difference for row in rows if row.norm_difference is not None)
    return f"losses within {loss:.0e}, gradient norms within {norm:.0e}, relative"


def _name(row: report.Row) -> str:
    return f"{row.variant} on {row.ranks} ranks with remat {row.remat}"


def _require_flags_fit(sizes: Sizes, *, names: Sequence[str], ranks: Sequence[int]) -> None:
    """Refuses flags that do not fit each other, all in one line."""
    schedules = {options["schedule"] for name, options in variants.OURS.items() if name in names}
    with flags.refusing(f"--ranks {max(ranks)}"):
        stages = max(
            dpj.schedules.make(name, num_ranks=max(ranks), num_microbatches=1).num_stages
            for name in schedules or {"gpipe"}
        )
    uneven = [str(num_ranks) for num_ranks in ranks if sizes.layers % num_ranks]
    flags.refuse(
        {
            **flags.uneven_heads(sizes.width, sizes.heads),
            f"--layers {sizes.layers}: must be divisible by --ranks {', '.join(uneven)}; the usual "
            "recipe has stages of one size only": uneven,
            **flags.too_few_layers(sizes.layers, stages=stages, ranks=max(ranks)),
        }
    )


def _recorder(records: TextIO) -> racing.Record:
    def record(task: Task, came: Compiled | Step | str) -> None:
        of_task = {"ranks": task.ranks, "remat": task.remat, "variant": task.variant}
        if isinstance(came, str):
            _write(records, {"what": "failure", **of_task, "message": came})
        else:
            kind = type(came).__name__.lower()
            _write(records, {"what": kind, **of_task, **dataclasses.asdict(came)})

    return record


def _write(records: TextIO, record: dict[str, Any]) -> None:
    records.write(f"{json.dumps(record)}\n")
    records.flush()


def _about(sizes: Sizes, *, rounds: int, microbatches_per_rank: int) -> dict[str, Any]:
    return {
        **dataclasses.asdict(sizes),
        "microbatches_per_rank": microbatches_per_rank,
        "rounds": rounds,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": metadata.version("jax"),
    }


def _caption(about: dict[str, Any]) -> str:
    return (
        "{layers} layers of width {width}, {heads} heads, vocabulary {vocabulary}; microbatches of "
        "{microbatch_size} x {sequence} tokens, {microbatches_per_rank} a rank; measured steps of "
        "each: {rounds}; {pages} pages; {cpus} CPUs ({machine}), JAX {jax}, Python {python}."
    ).format_map(about)


if __name__ == "__main__":
    main()
