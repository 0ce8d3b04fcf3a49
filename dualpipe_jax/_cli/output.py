"""The options `--format` and `--output` of commands that write text, data, pictures or pages."""

import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from dualpipe_jax._cli.refusal import Refusal
from dualpipe_jax._plot import save

_SUFFIXES = {
    "text": ".txt",
    "csv": ".csv",
    "json": ".json",
    "perfetto": ".perfetto.json",
    "html": ".html",
    "svg": ".svg",
    "png": ".png",
}


def to_file(formats: Sequence[str]) -> Callable[[Any], Any]:
    """Makes the options, which the command gets as `output_format` and `output`."""

    def add(command: Any) -> Any:
        command = click.option(
            "--output",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The file to write; standard output if left out.",
        )(command)
        return click.option(
            "--format",
            "output_format",
            type=click.Choice(formats),
            help="By default the suffix of --output (.perfetto.json for perfetto), else text.",
        )(command)

    return add


def find_format(given: str | None, output: Path | None, formats: Sequence[str]) -> str:
    """Chooses the format: the one given, or by the file's suffix, or text.

    Raises:
      Refusal: If no format has the suffix, or a png would go to a terminal.
    """
    name = output.name.lower() if output else ""
    # A longer suffix comes before its own end: .perfetto.json before .json.
    by_length = sorted(formats, key=lambda name: -len(_SUFFIXES[name]))
    by_suffix = next((form for form in by_length if name.endswith(_SUFFIXES[form])), None)
    if given is None and by_suffix is None and output is not None and output.suffix:
        known = ", ".join(_SUFFIXES[form] for form in formats if form != "text")
        raise Refusal(f"--output {output}: no format has that suffix; use {known}, or --format")
    chosen = given or by_suffix or "text"
    if chosen == "png" and output is None and sys.stdout.isatty():
        raise Refusal("a png is not for a terminal: name a file with --output")
    return chosen


def to_picture(draw: Callable[[], Any], image_format: str) -> bytes:
    """Draws a figure, and gives the content of its file.

    Raises:
      Refusal: If Matplotlib is not installed.
    """
    file = io.BytesIO()
    try:
        save(draw(), file, image_format=image_format)
    except ModuleNotFoundError as error:
        raise Refusal(str(error)) from error
    return file.getvalue()


def write(content: bytes, output: Path | None) -> None:
    """Writes to the file, or to standard output.

    Raises:
      Refusal: If it cannot be written.
    """
    try:
        if output is None:
            click.echo(content, nl=False)
        else:
            output.write_bytes(content)
    except OSError as error:
        where = "standard output" if output is None else f"--output {output}"
        raise Refusal(f"{where}: {error.strerror}") from error
