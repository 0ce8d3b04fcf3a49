"""Rows of text -> a table on stdout: Rich's on a terminal, else columns of plain text.

Rich is imported for a terminal only.
"""

import sys
from collections.abc import Sequence

import click


def print_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    notes: Sequence[str] = (),
    left: Sequence[int] = (0,),
    breaks: Sequence[str] = (),
) -> None:
    """Prints a table.

    Args:
      head: The titles.
      rows: A cell for each title.
      notes: Lines below it, after an empty one.
      left: The columns that stand to the left; the others are numbers.
      breaks: Words before which a title is broken on a terminal, to save width.
    """
    if sys.stdout.isatty():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
        for column, title in enumerate(head):
            for word in breaks:
                title = title.replace(f" {word}", f"\n{word}")
            is_left = column in left
            table.add_column(
                title,
                justify="left" if is_left else "right",
                overflow="fold",
                no_wrap=column == 0,
            )
        for row in rows:
            table.add_row(*row)
        console = Console(highlight=False)
        console.print(table)
        for note in ("", *notes) if notes else ():
            console.print(note, style="dim", markup=False)
        return
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        click.echo("  ".join(cells).rstrip())
    for note in ("", *notes) if notes else ():
        click.echo(note)
