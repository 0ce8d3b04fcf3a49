"""What the commands of the experiments share: flags of the language model, and how they refuse."""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click


class Refusal(click.ClickException):
    """Ends the command with one line on stderr and exit code 2."""

    exit_code = 2


class PositiveFloat(click.FloatRange):
    """A number above 0, and not one of those beyond all numbers (inf, nan)."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads the number, or refuses the flag."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


POSITIVE = click.IntRange(min=1)


def language_model(*, context: int, layers: int, width: int) -> Callable[..., Any]:
    """Adds the flags of the model, its batches and its training, with these defaults."""
    return _adding(
        click.option("--batch-size", type=POSITIVE, default=16, help="Windows of text a step."),
        click.option(
            "--context", type=POSITIVE, default=context, help="Bytes that a prediction looks at."
        ),
        click.option("--layers", type=POSITIVE, default=layers, help="Over all stages."),
        click.option("--width", type=POSITIVE, default=width, help="Of the residual stream."),
        click.option("--heads", type=POSITIVE, default=4, help="Of the attention in each layer."),
        click.option(
            "--learning-rate",
            type=PositiveFloat(),
            default=3e-3,
            help="At its peak, after warm-up.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Of all random draws."
        ),
    )


def text_and_results(*, output: str, results: str) -> Callable[..., Any]:
    """Adds the flags of the text to learn, of the folder for `results`, and of held-out losses."""
    return _adding(
        click.option(
            "--data",
            "data_path",
            type=click.Path(exists=True, path_type=Path),
            show_default="the sources of Python's standard library",
            help="A text file, or a folder of them.",
        ),
        click.option(
            "--output",
            type=click.Path(file_okay=False, path_type=Path),
            default=Path(output),
            help=f"The folder for {results}.",
        ),
        click.option(
            "--eval-every", type=POSITIVE, default=50, help="Steps between held-out losses."
        ),
        click.option(
            "--eval-batches", type=POSITIVE, default=8, help="Batches for a held-out loss."
        ),
    )


def several(
    flag: str, name: str, choices: Sequence[str], *, default: Sequence[str], text: str
) -> Callable[..., Any]:
    """Adds a flag that takes one of the choices, and may be given once for each; `text` helps."""
    return click.option(
        flag,
        name,
        type=click.Choice(choices),
        multiple=True,
        default=default,
        show_default=True,
        help=f"{text} Once for each.",
    )


def require_multiples(*sizes: tuple[str, int, int], why: str) -> None:
    """Refuses flags whose value is no multiple of what it has to be.

    Args:
      *sizes: Each flag, its value, and what it has to be a multiple of.
      why: What that is for, as the message's end.
    """
    wrong = [
        f"{name} {value}: must be a multiple of {count}"
        for name, value, count in sizes
        if value % count
    ]
    if wrong:
        raise Refusal(f"{'; '.join(wrong)}, {why}")


def _adding(*flags: Callable[..., Any]) -> Callable[..., Any]:
    def add(command: Any) -> Any:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return add


def run(command: click.Command, args: list[str] | None, *, name: str) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    try:
        command.main(args, prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"{name}: {error.format_message()}", err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
