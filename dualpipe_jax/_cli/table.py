"""Prints tables, text and calls within the width of a terminal, without a broken word.

Where stdout is no terminal, lines are as long as they are. Rich is imported for a terminal only.
"""

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import partial

import click

_wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    notes: Sequence[str] = (),
    left: Sequence[int] = (0,),
    optional: Sequence[str] = (),
    last_below: bool = False,
) -> None:
    """Prints a table.

    Args:
      head: The titles.
      rows: A cell for each title.
      notes: Lines below it, after an empty one.
      left: The columns that are set to the left; the others are numbers.
      optional: The titles of the columns that a narrow terminal leaves out, the first one first.
      last_below: Whether the last column may go below its row if it does not fit beside it.
    """
    if not sys.stdout.isatty():
        lines = _format([[title] for title in head], rows, left, gap="  ")
        for line in (*lines, *_after_empty(notes)):
            click.echo(line)
        return
    width = _terminal_width()
    for columns, titles in _narrower(head, rows, optional, last_below):
        cells = [[row[column] for column in columns] for row in rows]
        to_left = [place for place, column in enumerate(columns) if column in left]
        lines = _format(titles, cells, to_left, gap=" ")
        if max(map(len, lines)) <= width:
            break
    num_titles = len(lines) - len(rows)
    for line in lines[:num_titles]:
        _print_styled(line, "bold")
    for line, row in zip(lines[num_titles:], rows, strict=True):
        _print_styled(line)
        if last_below and len(head) - 1 not in columns:
            print_text(row[-1], after=" " * 8, style="dim")
    missing = [title for title in optional if head.index(title) not in columns]
    if missing:
        notes = (*notes, f"left out in so narrow a terminal: {', '.join(missing)}")
    for note in _after_empty(notes):
        print_text(note, style="dim")


def print_text(text: str, *, after: str = "", style: str = "") -> None:
    """Prints text after another one, its continuation lines indented below it."""
    if not sys.stdout.isatty():
        click.echo(after + text)
        return
    indent = " " * len(after)
    lines = _wrap(text, _terminal_width(), initial_indent=after, subsequent_indent=indent)
    for line in lines or [""]:
        _print_styled(line, style)


def print_call(function: str, arguments: Sequence[str]) -> None:
    """Prints a call to paste; where it does not fit on a line of the terminal, an argument a line.

    Arguments that are calls are broken likewise.
    """
    line = f"{function}({', '.join(arguments)})"
    if sys.stdout.isatty() and len(line) > _terminal_width():
        lines = [f"{function}("]
        for argument in arguments:
            inner, parenthesis, rest = argument.partition("(")
            if parenthesis and len(argument) + len("    ,") > _terminal_width():
                parts = (f"        {part}," for part in rest.removesuffix(")").split(", "))
                lines += [f"    {inner}(", *parts, "    ),"]
            else:
                lines.append(f"    {argument},")
        line = "\n".join((*lines, ")"))
    click.echo(line)


def _narrower(
    head: Sequence[str], rows: Sequence[Sequence[str]], optional: Sequence[str], last_below: bool
) -> Iterator[tuple[list[int], list[list[str]]]]:
    """Yields the columns and the lines of their titles, the wider tables first."""

    def broken(column: int) -> list[str]:
        words = head[column].split()
        return _wrap(head[column], max(map(len, [*words, *(row[column] for row in rows)]))) or [""]

    columns = list(range(len(head)))
    yield columns, [[title] for title in head]
    if last_below:
        columns = columns[:-1]
        yield columns, [[head[column]] for column in columns]
    yield columns, [broken(column) for column in columns]
    for title in optional:
        columns = [column for column in columns if head[column] != title]
        yield columns, [broken(column) for column in columns]


def _format(
    titles: Sequence[Sequence[str]],
    rows: Sequence[Sequence[str]],
    left: Sequence[int],
    *,
    gap: str,
) -> list[str]:
    """Gives the lines of the titles, then one for each row."""
    height = max(map(len, titles))
    head = zip(*([""] * (height - len(title)) + [*title] for title in titles), strict=True)
    lines = [*head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    formatted = []
    for line in lines:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        formatted.append(gap.join(cells).rstrip())
    return formatted


def _after_empty(notes: Sequence[str]) -> Sequence[str]:
    return ("", *notes) if notes else ()


def _terminal_width() -> int:
    return shutil.get_terminal_size().columns


def _print_styled(line: str, style: str = "") -> None:
    from rich.console import Console

    Console(highlight=False).print(line, style=style, markup=False, soft_wrap=True)
