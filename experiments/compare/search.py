"""Searches for orders beside named schedules: times of steps, with either waits, and of searches.

In: flags. Out, in a folder: search.csv, search.md. See docs/schedule_search.md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import dualpipe_jax as dpj
from experiments import tables
from experiments.progress import bar
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE

# A transformer's, of whose forward attention is a seventh, and the same under rematerialisation.
COSTS = {
    "attn": dpj.Costs(input_grad=1.14, weight_grad=0.857),
    "remat": dpj.Costs(input_grad=2.08, weight_grad=0.923),
}
TRANSFER = 0.1
# 61 layers, of which three cost half, and a head of three, over 16 stages.
_LAYERS = (5, 4, 4, 4, 4, 4, 4, 3, 4, 4, 4, 4, 4, 4, 4, 1)
_LAYOUT = ("dense",) * 3 + ("moe",) * 58
_HEAD = 3 * 8 / 59.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """Holds the arguments of a search, and the fastest named schedule that they allow.

    Attributes:
      named: That schedule's name.
      placement: As `schedules.search` takes it.
      limit: `max_activations`.
      sizes: Ranks and microbatches.
      layers: `layers_per_stage`, with unlike layers and a head; None without either.
      keep_beats: Whether the steady phase of a named schedule of the placement stays.
      more: By which the number of moves is multiplied.
    """

    named: str
    placement: Any
    limit: float
    sizes: tuple[int, int] = (8, 32)
    layers: tuple[int, ...] | None = None
    keep_beats: bool = True
    more: int = 1


CASES = (
    Case(named="v-half", placement="v", limit=5, more=4),
    Case(named="dualpipe", placement="bidirectional", limit=9),
    Case(named="dualpipev", placement="v", limit=8.5, more=4),
    Case(named="interleaved-1f1b", placement="interleaved", limit=11.5, keep_beats=False),
    Case(named="zb-h1", placement="linear", limit=4, sizes=(4, 8)),
    Case(
        named="interleaved-1f1b",
        placement="interleaved",
        limit=14.2,
        layers=_LAYERS,
        keep_beats=False,
        more=4,
    ),
    Case(named="dualpipev", placement="v", limit=16.5, sizes=(16, 64)),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one case and costs.

    Attributes:
      placement, named, costs, ranks, microbatches, limit: The case.
      uneven: Whether its stages have unlike layers.
      named_values, found_values: The makespan of the named and of the found order if ranks wait
        only for values that they read.
      named_program, found_program: The same with the program's own waits.
      named_beats, found_beats: Their beats.
      seconds: Of the search.
    """

    placement: str
    named: str
    costs: str
    ranks: int
    microbatches: int
    limit: float
    uneven: bool
    named_values: float
    found_values: float
    named_program: float
    found_program: float
    named_beats: int
    found_beats: int
    seconds: float


def run(case: Case, name: str, *, moves: int) -> Row:
    """Searches for an order of a case, and replays both."""
    ranks, microbatches = case.sizes
    costs = COSTS[name]
    if case.layers:
        fields = {kind: getattr(costs, kind) for kind in ("input_grad", "weight_grad")}
        costs = dpj.Costs(**fields, head=_HEAD, layer={"dense": 0.5, "moe": 1.0})
    sizes = {"num_ranks": ranks, "num_microbatches": microbatches}
    layers: dict[str, Any] = {
        "layers_per_stage": case.layers,
        "layout": _LAYOUT if case.layers else None,
    }
    since = time.perf_counter()
    found = dpj.schedules.search(
        **sizes,
        costs=costs,
        transfer=TRANSFER,
        placement=case.placement,
        **layers,
        max_activations=case.limit,
        keep_beats=case.keep_beats,
        waits="values",
        moves=case.more * moves,
    )
    seconds = time.perf_counter() - since
    both = dpj.schedules.make(case.named, **sizes), found
    replays = [dpj.simulate(each, costs=costs, transfer=TRANSFER, **layers) for each in both]
    beats = [_num_beats(each) for each in both]
    return Row(
        placement=case.placement,
        named=case.named,
        costs=name,
        ranks=ranks,
        microbatches=microbatches,
        limit=case.limit,
        uneven=case.layers is not None,
        named_values=replays[0].dependency_makespan,
        found_values=replays[1].dependency_makespan,
        named_program=replays[0].makespan,
        found_program=replays[1].makespan,
        named_beats=beats[0],
        found_beats=beats[1],
        seconds=seconds,
    )


def _num_beats(schedule: dpj.Schedule) -> int:
    steady = schedule.compiled(overlap=True).tables.steady
    return steady.num_beats if steady else 0


COLUMNS: dict[str, tables.Cell] = {
    "placement": lambda row: row.placement + (", uneven" if row.uneven else ""),
    "P, N": lambda row: f"{row.ranks}, {row.microbatches}",
    "limit": lambda row: f"{row.limit:g}",
    "costs": lambda row: row.costs,
    "named": lambda row: row.named,
    "values: named": lambda row: f"{row.named_values:.2f}",
    "found": lambda row: f"{row.found_values:.2f}",
    "shorter": lambda row: f"{100 * (1 - row.found_values / row.named_values):.1f} %",
    "program: named": lambda row: f"{row.named_program:.2f}",
    "found's": lambda row: f"{row.found_program:.2f}",
    "beats": lambda row: f"{row.named_beats} -> {row.found_beats}",
    "search, s": lambda row: f"{row.seconds:.0f}",
}
_WORDS = ("placement", "costs", "named")


def make_table(rows: Sequence[Row]) -> str:
    """Makes the table of docs/schedule_search.md."""
    return tables.markdown(COLUMNS, rows, words=_WORDS)


@flags.script("search")
@click.option(
    "--moves",
    type=click.IntRange(1, 10**8),
    default=100_000,
    help="Moves of a search; of some, more.",
)
@click.option("--only", type=POSITIVE, multiple=True, help="The number of a case, from 1.")
@flags.output("runs/search", results="the figures and the table")
def main(*, moves: int, only: tuple[int, ...], output: Path) -> None:
    """Compare found orders with the named schedules of their placement."""
    flags.refuse({f"--only: must be at most {len(CASES)}": max(only, default=1) > len(CASES)})
    flags.make_folder(output)
    console, rows = Console(highlight=False), list[Row]()
    cases = [CASES[number - 1] for number in only] or list(CASES)
    with bar(console) as progress:
        task = progress.add_task("", total=len(cases) * len(COSTS), label="")
        for case in cases:
            for name in COSTS:
                progress.update(task, label=f"{case.placement}, {name}")
                rows.append(run(case, name, moves=moves))
                progress.advance(task)
    tables.write_csv(rows, output / "search.csv", form=".6g")
    (output / "schedule_search.md").write_text(make_table(rows))
    console.print(f"written   {output}: search.csv, search.md")


if __name__ == "__main__":
    main()
