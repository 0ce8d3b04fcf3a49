"""Replays every schedule over sizes, at equal costs and at a transformer's, and compares idle time.

In: flags. Out, in a folder: idle.csv, idle.md, idle.png. See README.md beside it.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console

import dualpipe_jax as dpj
from experiments import tables
from experiments.compare import costs
from experiments.progress import bar
from experiments.train_lm import flags, pictures
from experiments.train_lm.flags import POSITIVE

# A hue a family: 1F1B's blue, two directions orange, the V olive; marks distinguish all.
LOOKS = {
    "gpipe": ("#6a6a6a", "x"),
    "1f1b": ("#8cc4ef", "o"),
    "interleaved-1f1b": ("#3d86c6", "s"),
    "interleaved-zb": ("#1f5e96", "d"),
    "interleaved-paired": ("#7d5ba6", "X"),
    "zb-h1": ("#0a2c52", "^"),
    "chimera": ("#f2b266", "v"),
    "dualpipe": ("#bd4400", "D"),
    "dualpipev": ("#6b7f2a", "P"),
    "v-half": ("#a9b96f", "*"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one schedule and size.

    Idle shares are of `ranks * makespan`: the published one (None where none is published), that of
    the replay at F = I = W = 1, at the transformer's costs, and with transfers beside; of the last
    also whether a steady phase overlaps pairs, which part of it is uneven work, and the share
    without false waits; and that with full backwards.
    Activations, those that W reads, are in shares of a rank's layers, as parameter copies are.
    """

    ranks: int
    microbatches: int
    schedule: str
    published: float | None
    equal: float
    transformer: float
    with_transfers: float
    overlap: bool
    uneven: float
    without_false_waits: float
    full_backward: float
    parameter_copies: float
    peak_activations: float

    @property
    def cell(self) -> str:
        """Published, equal, with transfers, and full, in %."""
        shares = self.published, self.equal, self.with_transfers, self.full_backward
        texts = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        texts[2] += "*" if self.overlap else ""
        return " / ".join(texts)


def replay(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    flops: costs.Flops,
    num_layers: int,
    transfer: float,
) -> Row:
    """Replays one schedule: at equal costs, at the transformer's, with transfers, and full."""
    schedule = dpj.schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    equal = dpj.simulate(schedule)
    of_model = flops.costs(num_layers=num_layers, num_ranks=num_ranks)
    model = dpj.simulate(schedule, costs=of_model, num_layers=num_layers)
    sent, full = (
        dpj.simulate(
            schedule,
            costs=of_model,
            num_layers=num_layers,
            transfer=transfer,
            execution=dpj.Execution(split_backward=is_split),
        )
        for is_split in (True, False)
    )
    bubble, work = equal.published_bubble, 3 * num_microbatches
    return Row(
        ranks=num_ranks,
        microbatches=num_microbatches,
        schedule=equal.schedule,
        published=None if bubble is None else bubble / (bubble + work),
        equal=equal.idle_share,
        transformer=model.idle_share,
        with_transfers=sent.idle_share,
        overlap=sent.execution.overlap is True,
        uneven=(max(sent.work) - float(np.mean(sent.work))) / sent.makespan,
        without_false_waits=1 - float(np.mean(sent.work)) / sent.dependency_makespan,
        full_backward=full.idle_share,
        parameter_copies=equal.parameter_copies,
        peak_activations=equal.peak_weight_activations * equal.stage_share,
    )


def make_table(rows: Sequence[Row]) -> str:
    """Writes a line for each number of ranks and schedule, and a column for each multiple."""
    lines: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        lines.setdefault((row.ranks, row.schedule), []).append(row)
    columns: dict[str, tables.Cell] = {
        "ranks": lambda line: line[0].ranks,
        "schedule": lambda line: line[0].schedule,
        "copies": lambda line: f"{line[0].parameter_copies:g}",
    }
    for i, multiple in enumerate(_multiples(rows)):
        title = f"N = {'' if multiple == 1 else multiple}P"
        columns[title] = lambda line, i=i: line[i].cell
    return tables.markdown(columns, list(lines.values()), words=("ranks", "schedule"))


def _multiples(rows: Sequence[Row]) -> list[int]:
    return list(dict.fromkeys(row.microbatches // row.ranks for row in rows))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draws a line a schedule over microbatches: a column a number of ranks, a row a cost."""
    all_ranks = sorted({row.ranks for row in rows})
    figure = Figure(figsize=(3.1 * len(all_ranks) + 0.7, 6.6), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(all_ranks), sharex=True, sharey="row", squeeze=False)
    for column, ranks in enumerate(all_ranks):
        of_ranks = [row for row in rows if row.ranks == ranks]
        for panel, name in zip(panels[:, column], ("equal", "with_transfers"), strict=True):
            _draw(panel, of_ranks, name)
        panels[0, column].set_title(f"{ranks} ranks", loc="left", fontsize=11)
        panels[1, column].set_xlabel("microbatches / ranks")
    for row in panels:
        row[0].set_ylim(0, 1.04 * max(panel.dataLim.ymax for panel in row))
    panels[0, 0].set_ylabel("idle, F = I = W\n(hollow, dashed: published)")
    panels[1, 0].set_ylabel("idle, transformer's FLOPs,\nhead and transfers")
    pictures.legend_below(figure, panels[1, 0], columns=5)
    figure.savefig(path)


def _draw(panel: Axes, rows: Sequence[Row], name: str) -> None:
    multiples = _multiples(rows)
    for schedule in dict.fromkeys(row.schedule for row in rows):
        color, marker = LOOKS[schedule]
        mine = [row for row in rows if row.schedule == schedule]
        look: dict[str, Any] = {
            "color": color,
            "marker": marker,
            "markersize": 5.5,
            "clip_on": False,
        }
        zorder = 4 if schedule == "gpipe" else 3
        values = [getattr(row, name) for row in mine]
        panel.plot(multiples, values, linewidth=1.5, label=schedule, zorder=zorder, **look)
        if name == "equal":
            published = [np.nan if row.published is None else row.published for row in mine]
            look["markerfacecolor"] = "white" if marker != "x" else None
            panel.plot(multiples, published, linestyle=(0, (2, 2)), linewidth=0.9, zorder=2, **look)
    panel.set_xscale("log", base=2)
    panel.set_xticks(multiples, [str(m) for m in multiples])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    pictures.frame(panel, hidden=("top", "right", "left"))


@flags.script("idle")
@click.option(
    "--ranks", type=POSITIVE, multiple=True, default=(4, 8, 16, 32), help="Once for each number."
)
@click.option(
    "--microbatches",
    "multiples",
    type=POSITIVE,
    multiple=True,
    default=(1, 2, 4, 8),
    help="Microbatches of a step, for each rank; once for each number.",
)
@click.option("--layers", type=POSITIVE, default=64, help="Layers of the transformer.")
@click.option("--width", type=POSITIVE, default=4096)
@click.option("--context", type=POSITIVE, default=4096, help="Tokens of a microbatch.")
@click.option("--heads", type=POSITIVE, default=32)
@click.option("--vocabulary", type=POSITIVE, default=32_000)
@click.option(
    "--transfer",
    type=click.FloatRange(min=0),
    default=0.14,
    help="Time of a value to a neighbour, in forwards of a layer.",
)
@flags.output("runs/idle", results="the figures, the table and the picture")
def main(
    *,
    ranks: tuple[int, ...],
    multiples: tuple[int, ...],
    transfer: float,
    output: Path,
    **options: int,
) -> None:
    """Compare the idle share of a step's time under all schedules."""
    ranks, multiples = tuple(sorted(set(ranks))), tuple(sorted(set(multiples)))
    sizes = costs.Sizes(**options)
    flags.refuse(
        {
            f"--transfer {transfer}: must be a finite number": not math.isfinite(transfer),
            **flags.uneven_heads(sizes.width, sizes.heads),
            **flags.too_few_layers(sizes.layers, stages=2 * max(ranks), ranks=max(ranks)),
        }
    )
    most = max(ranks)
    with flags.refusing("--ranks, --microbatches"):  # by the schedule with the most actions
        dpj.schedules.make(
            "interleaved-1f1b", num_ranks=most, num_microbatches=most * max(multiples)
        )
    flags.make_folder(output)
    console, flops = Console(highlight=False), costs.count(sizes)
    console.print(str(flops))
    rows: list[Row] = []
    asked = list(itertools.product(ranks, multiples, dpj.schedules.names()))
    with bar(console) as progress:
        task = progress.add_task("", total=len(asked), label="")
        for num_ranks, multiple, name in asked:
            progress.update(task, label=f"{num_ranks} ranks: {name}")
            rows.append(
                replay(
                    name,
                    num_ranks=num_ranks,
                    num_microbatches=multiple * num_ranks,
                    flops=flops,
                    num_layers=sizes.layers,
                    transfer=transfer,
                )
            )
            progress.advance(task)
    # Six digits, which are more than the shares mean.
    tables.write_csv(rows, output / "idle.csv", form=".6g")
    (output / "idle.md").write_text(make_table(rows))
    plot(rows, output / "idle.png")
    console.print(f"written   {output}: idle.csv, idle.md, idle.png")


if __name__ == "__main__":
    main()
