"""Replays -> rows of figures -> a CSV, a table in Markdown, a picture."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import dualpipe_jax as dpj
from experiments import cells
from experiments.compare.costs import Flops

# A hue a family: 1F1B's blue, two directions orange, the V olive; marks tell all apart.
LOOKS = {
    "gpipe": ("#6a6a6a", "x"),
    "1f1b": ("#8cc4ef", "o"),
    "interleaved-1f1b": ("#3d86c6", "s"),
    "zb-h1": ("#0a2c52", "^"),
    "chimera": ("#f2b266", "v"),
    "dualpipe": ("#bd4400", "D"),
    "dualpipev": ("#6b7f2a", "P"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one schedule and size.

    Idle shares are of `ranks * makespan`: the published one (None where none is published), that of
    the replay at F = I = W = 1, at the transformer's costs, and with transfers beside; of the last
    also whether a run of beats overlaps pairs, which part of it is uneven work, and what it were
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

    @classmethod
    def of(
        cls,
        equal: dpj.Simulation,
        model: dpj.Simulation,
        sent: dpj.Simulation,
        full: dpj.Simulation,
    ) -> "Row":
        """Makes the row of four replays of one schedule."""
        bubble, work = equal.published_bubble, 3 * equal.num_microbatches
        return cls(
            ranks=equal.num_ranks,
            microbatches=equal.num_microbatches,
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


def describe(flops: Flops) -> str:
    """Says in a line what was counted."""
    return (
        f"FLOPs of a microbatch: of a layer F={flops.forward:.4g}, I={flops.input_grad:.4g}, "
        f"W={flops.weight_grad:.4g}; of the head {flops.head_forward:.4g} forwards and "
        f"{flops.head_backward:.4g} backwards"
    )


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Writes a line a row; shares with six digits, which is more than they mean."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(Row))
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow(cells.write(value, form=".6g") for value in values)


def read_csv(path: Path) -> list[Row]:
    """Reads what `write_csv` wrote."""
    kinds: dict[str, Any] = {"ranks": int, "microbatches": int, "schedule": str}
    kinds["overlap"] = cells.is_yes
    with path.open(newline="") as file:
        lines: list[dict[str, Any]] = [
            {name: kinds.get(name, float)(value) if value else None for name, value in line.items()}
            for line in csv.DictReader(file)
        ]
    return [Row(**line) for line in lines]


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Writes the table of the README: for each size published, equal, with transfers, and full."""
    multiples = list(dict.fromkeys(row.microbatches // row.ranks for row in rows))
    head = ["ranks", "schedule", "copies"]
    head += [f"N = {'' if m == 1 else m}P" for m in multiples]
    rules = ["---", "---", *["---:"] * (len(head) - 2)]
    lines = [head, rules]
    for ranks, schedule in dict.fromkeys((row.ranks, row.schedule) for row in rows):
        mine = [row for row in rows if (row.ranks, row.schedule) == (ranks, schedule)]
        cells = [str(ranks), schedule, f"{mine[0].parameter_copies:g}"]
        lines.append(cells + [_cell(row) for row in mine])
    path.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))


def _cell(row: Row) -> str:
    published = "-" if row.published is None else f"{100 * row.published:.1f}"
    mark = "*" if row.overlap else ""
    shares = row.equal, row.with_transfers
    model = " / ".join(f"{100 * share:.1f}" for share in shares)
    return f"{published} / {model}{mark} / {100 * row.full_backward:.1f}"


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
    handles, labels = panels[1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path)


def _draw(panel: Axes, rows: Sequence[Row], name: str) -> None:
    multiples = list(dict.fromkeys(row.microbatches // row.ranks for row in rows))
    for schedule in dict.fromkeys(row.schedule for row in rows):
        color, marker = LOOKS[schedule]
        mine = [row for row in rows if row.schedule == schedule]
        panel.plot(
            multiples,
            [getattr(row, name) for row in mine],
            color=color,
            marker=marker,
            markersize=5.5,
            linewidth=1.5,
            label=schedule,
            clip_on=False,
            zorder=4 if schedule == "gpipe" else 3,
        )
        if name == "equal":
            published = [np.nan if row.published is None else row.published for row in mine]
            panel.plot(
                multiples,
                published,
                color=color,
                marker=marker,
                markerfacecolor="white" if marker != "x" else None,
                linestyle=(0, (2, 2)),
                markersize=5.5,
                linewidth=0.9,
                clip_on=False,
                zorder=2,
            )
    panel.set_xscale("log", base=2)
    panel.set_xticks(multiples, [str(m) for m in multiples])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_axisbelow(True)
    panel.grid(color="#e4e4e4", linewidth=0.6)
    panel.tick_params(length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
