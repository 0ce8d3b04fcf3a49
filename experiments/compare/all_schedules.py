"""All schedules in one table, and even splits of a model's layers beside balanced ones.

In: flags, and the figures that by_the_clock measured and compiled read off a compiler. Out: the two
tables in docs/which_schedule.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

import dualpipe_jax as dpj
from experiments import documents, tables
from experiments.by_the_clock import report
from experiments.compare.search import COSTS, TRANSFER
from experiments.compiled import overlap
from experiments.train_lm import flags

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "which_schedule.md"
CLOCK = ROOT / "experiments" / "by_the_clock" / "clock.csv"
COMPILED = ROOT / "experiments" / "compiled" / "overlap.csv"

SIZES = {"num_ranks": 8, "num_microbatches": 32}
# Over eight ranks the clock measures the machine's two cores as much as the schedules.
CLOCK_RANKS, CLOCK_COSTS = 4, "without remat"
FOUR_STAGES = "interleaved-1f1b(num_stages_per_rank=4)"
ATTN = COSTS["attn"]

# DeepSeek-V3's layers, three of them dense at half the cost, and a head worth three with experts.
LAYOUT = ("dense",) * 3 + ("moe",) * 58
UNEVEN = dpj.Costs(
    input_grad=ATTN.input_grad,
    weight_grad=ATTN.weight_grad,
    head=3 * SIZES["num_ranks"] / 59.5,
    layer={"dense": 0.5, "moe": 1.0},
)
SPLIT = (
    "1f1b",
    "zb-h1",
    "interleaved-1f1b",
    "interleaved-zb",
    "interleaved-paired",
    "v-half",
    "dualpipev",
    "dualpipe",
)


def names() -> tuple[str, ...]:
    """Lists the schedules of the table."""
    return (*dpj.schedules.names(), FOUR_STAGES)


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one schedule.

    Attributes:
      schedule: Its name.
      equal: The replay at F = I = W = 1, transfers instant.
      attn: The replay at a transformer's costs.
      beats: The beats of the steady phase, if forwards and grads take equally long.
      clock: The measured step over its work; None if it was not measured.
      compiled: The compiled step of a mixture of experts; None if there is none.
    """

    schedule: str
    equal: dpj.Simulation
    attn: dpj.Simulation
    beats: int
    clock: float | None
    compiled: overlap.Row | None


def make_rows() -> list[Row]:
    """Replays all schedules, and reads their measured and compiled figures."""
    clock = {
        name: min(row.over_work for row in found)
        for name, found in _by_schedule(
            row
            for row in tables.read_csv(report.Row, CLOCK)
            if (row.ranks, row.costs) == (CLOCK_RANKS, CLOCK_COSTS)
        ).items()
    }
    compiled = {
        row.schedule: row
        for row in tables.read_csv(overlap.Row, COMPILED)
        if row.question == "experts"
    }
    rows = []
    for name in names():
        schedule = dpj.schedules.make(name, **SIZES)
        rows.append(
            Row(
                schedule=name,
                equal=dpj.simulate(schedule),
                attn=dpj.simulate(schedule, costs=ATTN, transfer=TRANSFER),
                beats=len(schedule.timeline(overlap=True).beats),
                clock=clock.get(name),
                compiled=compiled.get(name),
            )
        )
    return rows


def _by_schedule(rows: Iterable[report.Row]) -> dict[str, list[report.Row]]:
    found: dict[str, list[report.Row]] = {}
    for row in rows:
        found.setdefault(row.schedule, []).append(row)
    return found


def _over_work(made: dpj.Simulation) -> str:
    """Writes the bubble in % of a rank's work: without false waits, and as the program waits."""
    work = sum(made.work) / made.num_ranks
    return " / ".join(
        f"{100 * (time / work - 1):.1f}" for time in (made.dependency_makespan, made.makespan)
    )


def _beats(row: Row) -> str:
    pairs = row.equal.num_microbatches / row.equal.stage_share
    return f"{row.beats} of {pairs:g}" if row.beats else "-"


def _hidden(row: Row, kind: str) -> str:
    if row.compiled is None:
        return "-"
    return f"{getattr(row.compiled, f'{kind}_hidden')} of {getattr(row.compiled, kind)}"


COLUMNS: dict[str, tables.Cell] = {
    "schedule": lambda row: row.schedule,
    "copies": lambda row: f"{row.equal.parameter_copies:g}",
    "activations": lambda row: f"{row.equal.peak_weight_activations * row.equal.stage_share:g}",
    "bubble, equal costs": lambda row: _over_work(row.equal),
    "bubble, attn costs": lambda row: _over_work(row.attn),
    "by the clock": lambda row: tables.number(row.clock and row.clock - 1, ".1f", unit=0.01),
    "beats": _beats,
    "permutes hidden": lambda row: _hidden(row, "permutes"),
    "all-to-alls hidden": lambda row: _hidden(row, "exchanges"),
}


def make_table(rows: Sequence[Row]) -> str:
    """Makes the table of all schedules."""
    return tables.markdown(COLUMNS, rows, words=("schedule",))


@dataclass(frozen=True, kw_only=True)
class Split:
    """A schedule replayed with an even split of the layers, and with a balanced one."""

    schedule: str
    even: dpj.Simulation
    balanced: dpj.Simulation


def split(name: str) -> Split:
    """Replays a schedule with both splits."""
    schedule = dpj.schedules.make(name, **SIZES)
    even, balanced = (
        dpj.simulate(
            schedule, costs=UNEVEN, transfer=TRANSFER, layout=LAYOUT, layers_per_stage=each
        )
        for each in (None, "balanced")
    )
    return Split(schedule=name, even=even, balanced=balanced)


def _shorter(row: Split, field: str) -> str:
    even, balanced = (getattr(made, field) for made in (row.even, row.balanced))
    return f"{even:.1f} -> {balanced:.1f}, {100 * (1 - balanced / even):.1f} %"


SPLIT_COLUMNS: dict[str, tables.Cell] = {
    "schedule": lambda row: row.schedule,
    "without false waits": lambda row: _shorter(row, "dependency_makespan"),
    "as the program waits": lambda row: _shorter(row, "makespan"),
}


def make_split_table(rows: Sequence[Split]) -> str:
    """Makes the table of even and balanced splits."""
    return tables.markdown(SPLIT_COLUMNS, rows, words=("schedule",))


@flags.script("all_schedules")
@click.option("--write-docs", is_flag=True, help="Put the tables into docs/which_schedule.md.")
def main(write_docs: bool) -> None:
    """Compare all schedules in one table, and even splits of layers with balanced ones."""
    made = {
        "schedules": make_table(make_rows()),
        "splits": make_split_table([split(name) for name in SPLIT]),
    }
    for name, text in made.items():
        click.echo(text)
        if write_docs:
            documents.write_into(DOCS, text, name=name)


if __name__ == "__main__":
    main()
