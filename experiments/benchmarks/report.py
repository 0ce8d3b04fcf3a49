"""Results -> rows of figures -> a table in a terminal, in Markdown, in the README."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from experiments import tables
from experiments.benchmarks.racing import Result
from experiments.benchmarks.tasks import Compiled, Step
from experiments.benchmarks.variants import LIMITS, RECIPES


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one variant; None where one has no meaning, or where it failed.

    Seconds a step and their ratios are medians over the rounds; a ratio is of two steps of the
    same round. The limit is the one of LIMITS that took the least CPU time, the recipe the one of
    RECIPES. Temporary bytes are those of one device, resident bytes those of the process. The
    differences are the largest of any loss and of the gradient norm of ends or any layer, relative
    to the limit's.
    """

    ranks: int
    remat: str
    variant: str
    is_limit: bool = False
    is_recipe: bool = False
    failure: str | None = None
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    temporary_bytes: int | None = None
    resident_bytes: int | None = None
    compile_seconds: float | None = None
    cpu_to_limit: float | None = None
    wall_to_recipe: float | None = None
    cpu_to_recipe: float | None = None
    temporary_to_recipe: float | None = None
    loss_difference: float | None = None
    norm_difference: float | None = None


def summarize(results: Sequence[Result]) -> list[Row]:
    """Makes the rows of those that ran in turns: the same ranks and remat."""
    done = {r.task.variant: r for r in results if r.failure is None}
    limit, recipe = (
        min(
            (done[name] for name in names if name in done),
            key=lambda result: _median(result, _cpu),
            default=None,
        )
        for names in (LIMITS, RECIPES)
    )
    # Where no limit ran, all must still agree with each other.
    reference = limit or next(iter(done.values()), None)
    return [_row(r, limit=limit, recipe=recipe, reference=reference) for r in results]


def _row(
    result: Result, *, limit: Result | None, recipe: Result | None, reference: Result | None
) -> Row:
    task, compiled = result.task, result.compiled
    if result.failure is not None:
        return Row(ranks=task.ranks, remat=task.remat, variant=task.variant, failure=result.failure)
    assert compiled is not None
    assert reference is not None
    residents = [s.resident_bytes for s in result.steps if s.resident_bytes is not None]
    is_pipelined = task.variant not in LIMITS
    against = recipe if is_pipelined else None
    return Row(
        ranks=task.ranks,
        remat=task.remat,
        variant=task.variant,
        is_limit=result is limit,
        is_recipe=result is recipe,
        wall_seconds=_median(result, _wall),
        cpu_seconds=_median(result, _cpu),
        temporary_bytes=compiled.temporary_bytes,
        resident_bytes=max(residents, default=None),
        compile_seconds=compiled.compile_seconds,
        cpu_to_limit=_ratio(result, limit, _cpu),
        wall_to_recipe=_ratio(result, against, _wall),
        cpu_to_recipe=_ratio(result, against, _cpu),
        temporary_to_recipe=None
        if against is None
        else compiled.temporary_bytes / _of(against).temporary_bytes,
        loss_difference=_largest_difference(
            [compiled.loss, *(step.loss for step in result.steps)], _of(reference).loss
        ),
        norm_difference=_largest_difference(compiled.gradient_norms, _of(reference).gradient_norms),
    )


def _of(result: Result) -> Compiled:
    assert result.compiled is not None
    return result.compiled


def _wall(step: Step) -> float:
    return step.wall_seconds


def _cpu(step: Step) -> float:
    return step.cpu_seconds


def _median(result: Result, seconds: Callable[[Step], float]) -> float:
    return float(np.median([seconds(step) for step in result.steps]))


def _ratio(result: Result, other: Result | None, seconds: Callable[[Step], float]) -> float | None:
    if other is None:
        return None
    pairs = zip(result.steps, other.steps, strict=True)
    return float(np.median([seconds(mine) / seconds(theirs) for mine, theirs in pairs]))


def _largest_difference(values: Sequence[float], wanted: float | Sequence[float]) -> float:
    difference = np.abs(np.subtract(values, wanted)) / np.abs(wanted)
    return float(difference.max())  # NaN stays NaN


# The table's columns; a terminal shows those that are not in _LONG.
COLUMNS: dict[str, tables.Cell] = {
    "ranks": lambda row: row.ranks,
    "remat": lambda row: row.remat,
    "variant": lambda row: f"{row.variant} \\*" if row.is_limit or row.is_recipe else row.variant,
    "wall, s": lambda row: "failed" if row.failure else tables.number(row.wall_seconds, ".3f"),
    "CPU, s": lambda row: tables.number(row.cpu_seconds, ".3f"),
    "CPU / limit": lambda row: tables.number(row.cpu_to_limit, ".2f"),
    "wall / recipe": lambda row: tables.number(row.wall_to_recipe, ".2f"),
    "CPU / recipe": lambda row: tables.number(row.cpu_to_recipe, ".2f"),
    "MiB / recipe": lambda row: tables.number(row.temporary_to_recipe, ".2f"),
    "MiB": lambda row: tables.number(row.temporary_bytes, ".1f", unit=2**20),
    "resident, MiB": lambda row: tables.number(row.resident_bytes, ".0f", unit=2**20),
    "compile, s": lambda row: tables.number(row.compile_seconds, ".1f"),
    "loss": lambda row: tables.number(row.loss_difference, ".0e"),
    "norms": lambda row: tables.number(row.norm_difference, ".0e"),
}
_WORDS = ("ranks", "remat", "variant")
_LONG = ("ranks", "remat", "resident, MiB", "loss", "norms")


def to_terminal(rows: Sequence[Row]) -> Table:
    """Makes the table of a terminal, of those that ran in turns."""
    short = {title: cell for title, cell in COLUMNS.items() if title not in _LONG}
    title = f"{rows[0].ranks} ranks, remat {rows[0].remat}"
    return tables.terminal(short, rows, words=_WORDS, title=title)


def to_markdown(rows: Sequence[Row]) -> str:
    """Makes the table of the page."""
    return tables.markdown(COLUMNS, rows, words=_WORDS)
