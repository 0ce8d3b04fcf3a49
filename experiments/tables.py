"""Rows of figures -> a CSV and back, a table in Markdown, a table in a terminal.

A row is a frozen dataclass; the columns of a table are functions from a row to a cell, by title.
"""

import csv
import dataclasses
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

Cell = Callable[[Any], Any]
Columns = Mapping[str, Cell]
Row = TypeVar("Row")
_WORDS = {True: "yes", False: "no"}


def yes_or_no(value: bool) -> str:
    """Writes a boolean."""
    return _WORDS[value]


def number(value: float | None, form: str, *, unit: float = 1) -> str:
    """Writes a number in multiples of a unit; "-" for None.

    >>> number(3 * 2**20, ".1f", unit=2**20), number(None, ".1f")
    ('3.0', '-')
    """
    return "-" if value is None else format(value / unit if unit != 1 else value, form)


def write_csv(rows: Sequence[Any], path: Path, *, form: str = "") -> None:
    """Writes a line a row of the same dataclass, floats in this form; nothing for None."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(rows[0]))
        writer.writerows([_to_text(v, form) for v in dataclasses.astuple(row)] for row in rows)


def read_csv(kind: type[Row], path: Path) -> list[Row]:
    """Reads a file of `write_csv`."""
    hints = typing.get_type_hints(kind)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [kind(**{k: _from_text(v, hints[k]) for k, v in line.items()}) for line in lines]


def _to_text(value: Any, form: str) -> Any:
    if isinstance(value, bool):
        return yes_or_no(value)
    return "" if value is None else format(value, form) if isinstance(value, float) else value


def _from_text(text: str, hint: Any) -> Any:
    kinds = typing.get_args(hint) or (hint,)
    if not text and NoneType in kinds:
        return None
    return text == _WORDS[True] if kinds[0] is bool else kinds[0](text)


def markdown(columns: Columns, rows: Sequence[Any], *, words: Collection[str] = ()) -> str:
    """Makes a table, columns of `words` set to the left and all others to the right."""
    rules = ["---" if title in words else "---:" for title in columns]
    lines = [columns, rules, *([str(cell(row)) for cell in columns.values()] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def terminal(
    columns: Columns, rows: Sequence[Any], *, words: Collection[str] = (), title: str
) -> Table:
    """Makes the same for a terminal; a long title takes a line for each of its parts."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, title=title)
    for name in columns:
        parts = name.replace(" / ", "\n/ ").replace(", ", ",\n")
        table.add_column(parts, justify="left" if name in words else "right", no_wrap=True)
    for row in rows:
        # Markdown alone takes a star for emphasis.
        table.add_row(*(str(cell(row)).replace("\\*", "*") for cell in columns.values()))
    return table
