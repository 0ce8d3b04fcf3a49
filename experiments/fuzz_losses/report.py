"""Results -> tables: outcomes, refusals by class, features; as Markdown, CSV, and in a terminal."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments import tables
from experiments.fuzz_losses import features
from experiments.fuzz_losses.results import OUTCOMES, RIGHT, Result


@dataclass(frozen=True)
class Outcome:
    """How many programs came out so."""

    outcome: str
    programs: int
    share: float


@dataclass(frozen=True)
class Refusal:
    """A class of refusals: how many there are, how many name no line, and one seed."""

    reason: str
    programs: int
    without_line: int
    seed: int


@dataclass(frozen=True)
class Feature:
    """How many programs have a feature, and the shares that are refused and not right."""

    feature: str
    programs: int
    refused: float
    wrong: int


def outcomes(results: Sequence[Result]) -> list[Outcome]:
    """Counts programs by outcome."""
    counts = Counter(result.outcome for result in results)
    always = ("exact", "refused", "wrong")
    return [
        Outcome(name, counts[name], counts[name] / len(results))
        for name in OUTCOMES
        if counts[name] or name in always
    ]


def refusals(results: Sequence[Result]) -> list[Refusal]:
    """Counts refusals by class, the most frequent first."""
    classes = defaultdict(list)
    for result in results:
        if result.outcome == "refused":
            classes[result.reason].append(result)
    rows = [
        Refusal(
            reason,
            len(of_class),
            sum(not result.names_line for result in of_class),
            min(result.seed for result in of_class),
        )
        for reason, of_class in classes.items()
    ]
    return sorted(rows, key=lambda row: (-row.programs, row.reason))


def by_feature(results: Sequence[Result]) -> list[Feature]:
    """Counts programs, and those that are refused, by feature."""
    rows = []
    for name in features.names():
        mine = [result for result in results if name in result.features]
        counts = Counter(result.outcome for result in mine)
        wrong = len(mine) - sum(counts[outcome] for outcome in RIGHT)
        rows.append(Feature(name, len(mine), counts["refused"] / max(len(mine), 1), wrong))
    return rows


def seconds(results: Sequence[Result]) -> str:
    """Writes the seconds of a program, by part."""
    parts: dict[str, float] = defaultdict(float)
    for result in results:
        for name, value in result.seconds.items():
            parts[name] += value
    mean = {name: value / len(results) for name, value in parts.items()}
    split = ", ".join(f"{name} {value:.2f}" for name, value in mean.items())
    return f"{sum(mean.values()):.2f} s a program: {split}"


def write(results: Sequence[Result], folder: Path, console: Console) -> list[str]:
    """Writes all tables to a folder, and to a terminal.

    Returns:
      The tables of outcomes, refusals and features, as Markdown.
    """
    results = sorted(results, key=lambda result: result.seed)
    parts = [
        (
            f"{len(results)} programs",
            outcomes(results),
            {
                "outcome": lambda row: row.outcome,
                "programs": lambda row: row.programs,
                "share": lambda row: f"{100 * row.share:.1f} %",
            },
        ),
        (
            "refusals",
            refusals(results),
            {
                "programs": lambda row: row.programs,
                "names no line": lambda row: row.without_line,
                "seed": lambda row: row.seed,
                "reason": lambda row: row.reason,
            },
        ),
        (
            "features",
            by_feature(results),
            {
                "feature": lambda row: row.feature,
                "programs": lambda row: row.programs,
                "refused": lambda row: f"{100 * row.refused:.0f} %",
                "wrong": lambda row: row.wrong,
            },
        ),
    ]
    words = ("outcome", "reason", "feature")
    texts = []
    for title, rows, columns in parts:
        console.print(tables.terminal(columns, rows, words=words, title=title))
        texts.append(tables.markdown(columns, rows, words=words))
    time = seconds(results)
    console.print(time)
    (folder / "results.md").write_text("\n".join([*texts, f"{time}\n"]))
    for name, (_, rows, _) in zip(("refusals", "features"), parts[1:], strict=True):
        if rows:
            tables.write_csv(rows, folder / f"{name}.csv", form=".4g")
    return texts
