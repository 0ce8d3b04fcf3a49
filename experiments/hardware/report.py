"""Figures -> report.json and a page of tables, saved after every part."""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import tables
from experiments.hardware import commands, layer, one_rank, programs, schedules
from experiments.hardware.tasks import Figure, Sizes

JSON, PAGE = "report.json", "report.md"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Tells how a task went.

    Attributes:
      name: The task.
      seconds: How long it took; 0 if it was left out.
      failure: Why it failed; "" if it did not.
      is_left_out: Whether no time was left for it, or for all of it.
    """

    name: str
    seconds: float = 0.0
    failure: str = ""
    is_left_out: bool = False


@dataclass(kw_only=True, eq=False)
class Report:
    """All that a run has found so far.

    Attributes:
      machine: The devices and their software, as `worker.describe` gives them.
      sizes: The model and its batches.
      minutes: The time that the run may take.
      figures: The figures, in order.
      outcomes: The tasks, in order.
    """

    machine: dict[str, Any]
    sizes: Sizes
    minutes: float
    figures: list[Figure] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """Lists the failures of tasks, and of programs within them."""
        of_tasks = [f"{each.name}: {each.failure}" for each in self.outcomes if each.failure]
        of_figures = [
            f"{each.table}, {each.row}, {each.column}: {each.note}"
            for each in self.figures
            if each.is_failure
        ]
        return of_tasks + of_figures

    def find(self, table: str, row: str, column: str) -> Figure | None:
        """Finds a figure."""
        named = (each for each in self.figures if (each.table, each.row) == (table, row))
        return next((each for each in named if each.column == column), None)

    def median(self, table: str, row: str, column: str) -> float | None:
        """Finds the median of a figure; None if there is none."""
        found = self.find(table, row, column)
        return None if found is None else found.median

    def rows(self, table: str) -> list[str]:
        """Names the rows of a table."""
        return list(dict.fromkeys(each.row for each in self.figures if each.table == table))

    def costs(self) -> tuple[float, float, float] | None:
        """Gives the seconds of F, I and W of a rank's layers; None if one was not measured.

        Nor if noise is larger than one of them, as on busy CPUs.
        """
        found = [self.median(layer.TABLE, layer.OURS, kind) for kind in "FIW"]
        known = [seconds * self.sizes.layers for seconds in found if seconds and seconds > 0]
        return (known[0], known[1], known[2]) if len(known) == 3 else None

    def save(self, folder: Path) -> None:
        """Writes both files."""
        (folder / JSON).write_text(f"{json.dumps(self.to_dict(), indent=1)}\n")
        (folder / PAGE).write_text(to_page(self))

    def to_dict(self) -> dict[str, Any]:
        """Gives all of it, as JSON takes it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, report: dict[str, Any]) -> "Report":
        """Undoes `to_dict`."""
        attributes: dict[str, Any] = {
            **report,
            "sizes": Sizes(**report["sizes"]),
            "figures": [Figure.from_dict(each) for each in report["figures"]],
            "outcomes": [Outcome(**each) for each in report["outcomes"]],
        }
        return cls(**attributes)


def to_page(report: Report) -> str:
    """Writes the page: devices, versions, tables; failures and parts that were left out."""
    parts = [f"# {report.machine['devices']} x {report.machine['device']}", _about(report)]
    for title, make in (
        ("A layer", _layer),
        ("A step over one rank", _one_rank),
        ("A tick by itself", _tick),
        ("Command buffers beside XLA's default", _commands),
        ("Schedules", _schedules),
    ):
        text = make(report)
        parts += [f"## {title}", text] if text else []
    failures = [f"- {failure}" for failure in report.failures]
    parts += ["## Failures", "\n".join(failures)] if failures else []
    left_out = [each.name for each in report.outcomes if each.is_left_out]
    if left_out:
        words = f"No time was left of {report.minutes:g} minutes for: {', '.join(left_out)}."
        parts += ["## Left out", words]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _about(report: Report) -> str:
    machine, sizes = report.machine, report.sizes
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peak = machine["peak_flops"]
    published = "no published peak" if peak is None else f"peak {peak / 1e12:,.0f} TFLOPs/s"
    spent = sum(each.seconds for each in report.outcomes)
    lines = [
        f"{machine['line']}; {published}.",
        f"{versions}{'' if machine['driver'] is None else '; ' + machine['driver']}.",
        (
            f"Blocks `{sizes.family}`, width {sizes.width}, {sizes.layers} layers a rank, "
            f"microbatches of {sizes.tokens} tokens, {sizes.microbatches} for each rank; bfloat16 "
            "matmuls, float32 parameters and sums of gradients."
        ),
        (
            f"Medians of {sizes.rounds} rounds, in brackets the least and the largest; "
            f"{spent:.0f} s in all."
        ),
    ]
    return "\n".join(lines)


def cell(figure: Figure | None, form: str = ",.2f", *, unit: float = 1) -> str:
    """Writes a figure: its median, and its least and largest sample where there are several.

    >>> cell(Figure(table="", row="", column="", samples=(1e-3, 3e-3, 2e-3)), ".1f", unit=1e-3)
    '2.0 (1.0 to 3.0)'
    """
    if figure is None or figure.median is None:
        return "failed" if figure is not None and figure.is_failure else "-"
    middle, *ends = (
        format(value / unit, form)
        for value in (figure.median, min(figure.samples), max(figure.samples))
    )
    return middle if len(figure.samples) == 1 else f"{middle} ({' to '.join(ends)})"


def _table(columns: Mapping[str, Callable[[str], str]], rows: Sequence[str]) -> str:
    """Makes a table of rows that are named in the first column."""
    return tables.markdown(columns, rows, words=[next(iter(columns))]) if rows else ""


def _layer(report: Report) -> str:
    kinds = ("F", "I", "W", "B", "I + W")
    rows = [row for row in (layer.OURS, layer.VJP) if row in report.rows(layer.TABLE)]

    def text(kind: str) -> Callable[[str], str]:
        return lambda row: cell(report.find(layer.TABLE, row, kind), ",.3f", unit=1e-3)

    made = _table({"": str, **{f"{kind}, ms": text(kind) for kind in kinds}}, rows)
    ratios = [
        f"{kind} {ours / theirs:.2f}"
        for kind in kinds
        if (ours := report.median(layer.TABLE, layer.OURS, kind) or 0) > 0
        and (theirs := report.median(layer.TABLE, layer.VJP, kind) or 0) > 0
    ]
    return f"{made}\n{layer.OURS} / {layer.VJP}: {', '.join(ratios)}" if ratios else made


def _rates(report: Report, *, ranks: int) -> dict[str, Callable[[float], str]]:
    """Gives the columns that follow from the seconds of a step over so many ranks."""
    sizes, peak = report.sizes, report.machine["peak_flops"]
    microbatches = sizes.microbatches * ranks
    tokens = sizes.tokens * microbatches
    flops = programs.flops_per_step(sizes, layers=sizes.layers * ranks, microbatches=microbatches)
    return {
        "tokens/s": lambda seconds: f"{tokens / seconds:,.0f}",
        "tokens/s/device": lambda seconds: f"{tokens / seconds / ranks:,.0f}",
        "TFLOPs/s/device": lambda seconds: f"{flops / seconds / ranks / 1e12:,.1f}",
        "MFU": lambda seconds: f"{flops / seconds / ranks / peak:.1%}" if peak else "-",
    }


def _of_seconds(report: Report, table: str, rate: Callable[[float], str]) -> Callable[[str], str]:
    def text(row: str) -> str:
        seconds = report.median(table, row, "seconds")
        return rate(seconds) if seconds else "-"

    return text


def _one_rank(report: Report) -> str:
    table = one_rank.STEP
    plain = [report.median(table, row, "seconds") for row in (one_rank.UNROLLED, one_rank.LOOPED)]
    least = min((seconds for seconds in plain if seconds), default=None)
    columns: dict[str, Callable[[str], str]] = {
        "program": str,
        "ms": lambda row: cell(report.find(table, row, "seconds"), unit=1e-3),
        "/ gradient accumulation": _of_seconds(
            report, table, lambda seconds: f"{seconds / least:.3f}" if least else "-"
        ),
    }
    rates = _rates(report, ranks=1)
    del rates["tokens/s/device"]
    columns |= {title: _of_seconds(report, table, rate) for title, rate in rates.items()}
    return _table(columns, report.rows(table))


def _commands(report: Report) -> str:
    def text(column: str, unit: float) -> Callable[[str], str]:
        return lambda row: cell(report.find(commands.TABLE, row, column), ",.2f", unit=unit)

    columns: dict[str, Callable[[str], str]] = {
        "command buffers": str,
        "ms": text(commands.STEP, 1e-3),
        "default, ms": text(commands.DEFAULT_STEP, 1e-3),
        "us a tick": text(commands.TICK, 1e-6),
        "default, us a tick": text(commands.DEFAULT_TICK, 1e-6),
    }
    return _table(columns, report.rows(commands.TABLE))


def _tick(report: Report) -> str:
    def text(column: str) -> Callable[[str], str]:
        return lambda row: cell(report.find(one_rank.TICK, row, column), ",.1f", unit=1e-6)

    columns = {"program": str, "us a microbatch": text("microbatch"), "us a tick": text("tick")}
    return _table(columns, report.rows(one_rank.TICK))


def _schedules(report: Report) -> str:
    ranks, sizes = report.machine["devices"], report.sizes

    def text(column: str, form: str, unit: float = 1) -> Callable[[str], str]:
        return lambda row: cell(report.find(schedules.TABLE, row, column), form, unit=unit)

    columns: dict[str, Callable[[str], str]] = {
        "schedule": str,
        "ms": text("seconds", ",.2f", 1e-3),
        **{
            title: _of_seconds(report, schedules.TABLE, rate)
            for title, rate in _rates(report, ranks=ranks).items()
        },
        "peak, GiB": text("peak", ",.2f", 2**30),
        "account, GiB": text("account", ",.2f", 2**30),
        "compiler, GiB": text("compiler", ",.2f", 2**30),
        "idle": text("idle", ".1%"),
        "preflight, ms": text("preflight", ",.2f", 1e-3),
        "simulated, ms": text("simulated", ",.2f", 1e-3),
    }
    rows = report.rows(schedules.TABLE)
    if not rows:
        return ""
    layers, microbatches = sizes.layers * ranks, sizes.microbatches * ranks
    model = (
        f"{layers} layers, {programs.num_parameters(sizes, layers=layers) / 1e6:,.1f} million "
        f"parameters; {ranks} pipeline ranks, {microbatches} microbatches, "
        f"{microbatches * sizes.tokens:,} tokens a step; loss and gradients, no optimizer."
    )
    legend = (
        "Peak: the runtime's; account: `grad_fn.memory` and the arguments; compiler: arguments, "
        "outputs and temporaries. Idle: from a profile, in which XLA uses no command buffers. "
        "Simulated: at the layer's measured F, I and W, without embedding, head and transfers."
    )
    notes = {
        f"`{row}`, {column}: {found.note}."
        for row in rows
        for column in ("execution", "preflight")
        if (found := report.find(schedules.TABLE, row, column)) and found.note
    }
    return "\n\n".join([model, _table(columns, rows).strip(), legend, "\n".join(sorted(notes))])
