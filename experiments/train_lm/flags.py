"""The commands of the experiments: shared flags, and how mistakes in them are refused."""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import click


class Refusal(click.ClickException):
    """Ends the command with one line on stderr and exit code 2."""

    exit_code = 2


class FiniteFloat(click.FloatRange):
    """A number in a range, and not one of those beyond all numbers (inf, nan)."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads the number, or refuses the flag."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class PositiveFloat(FiniteFloat):
    """A finite number above 0."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)


POSITIVE = click.IntRange(min=1)


def language_model(*, context: int, layers: int, width: int) -> Callable[..., Any]:
    """Adds the flags of the model, its batches and its training, with these defaults."""
    return adding(
        click.option("--batch-size", type=POSITIVE, default=16, help="Windows of text a step."),
        click.option(
            "--context", type=POSITIVE, default=context, help="Bytes that a prediction looks at."
        ),
        click.option(
            "--layers", type=POSITIVE, default=layers, help="Layers of the model, over all stages."
        ),
        click.option("--width", type=POSITIVE, default=width, help="Size of the residual stream."),
        click.option("--heads", type=POSITIVE, default=4, help="Attention heads of each layer."),
        click.option(
            "--learning-rate",
            type=PositiveFloat(),
            default=3e-3,
            help="Its peak, after warm-up.",
        ),
        click.option(
            "--seed", type=click.IntRange(0, 2**32 - 1), default=0, help="Seed of all random draws."
        ),
    )


def text() -> Callable[..., Any]:
    """Adds the flags of the text to learn, and of held-out losses."""
    return adding(
        click.option(
            "--data",
            "data_path",
            type=click.Path(exists=True, path_type=Path),
            show_default="the sources of Python's standard library",
            help="A text file, or a folder of them.",
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
    """Refuses flags whose value is no multiple of the required number.

    Args:
      *sizes: Each flag, its value, and the number that has to divide it.
      why: The reason, as the message's end.
    """
    wrong = [f"{flag} {n}: must be a multiple of {count}" for flag, n, count in sizes if n % count]
    refuse({f"{'; '.join(wrong)}, {why}": wrong})


# The `layers_per_stage` of a step, as the flag gives it.
Balanced = Literal["balanced"] | None


def _to_argument(ctx: click.Context, param: click.Parameter, value: str) -> Balanced:
    return "balanced" if value == "balanced" else None


layers_per_stage = click.option(
    "--layers-per-stage",
    type=click.Choice(["even", "balanced"]),
    default="even",
    callback=_to_argument,
    help="How layers are cut into stages: evenly, or so that the step is the fastest by simulation "
    "at the costs that are counted from the model.",
)


def show_layers(sizes: Sequence[int]) -> str:
    """Writes the layers of each stage, to follow other words."""
    return f"; layers per stage: {' '.join(map(str, sizes))}"


def adding(*flags: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a decorator that adds flags to a command, in this order."""

    def add(command: Any) -> Any:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return add


def output(default: str, *, results: str) -> Callable[..., Any]:
    """Adds the flag of the folder for `results`."""
    path = click.Path(file_okay=False, path_type=Path)
    return click.option(
        "--output", type=path, default=Path(default), help=f"The folder for {results}."
    )


def make_folder(path: Path) -> None:
    """Makes the folder of `--output`, or refuses it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"--output {path}: {error.strerror}") from error


@contextlib.contextmanager
def refusing(flag: str) -> Iterator[None]:
    """Makes a ValueError inside the `with` the refusal of a flag."""
    try:
        yield
    except ValueError as error:
        raise Refusal(f"{flag}: {' '.join(str(error).split())}") from error


def refuse(problems: dict[str, Any]) -> None:
    """Refuses flags that do not fit each other: all problems that are true, in one line."""
    wrong = [problem for problem, is_wrong in problems.items() if is_wrong]
    if wrong:
        raise Refusal("; ".join(wrong))


def uneven_batch(batch_size: int, parts: int, of: str = "--microbatches") -> dict[str, Any]:
    """Names the problem of a batch that does not divide into its parts."""
    return {f"--batch-size {batch_size}: must be divisible by {of} {parts}": batch_size % parts}


def uneven_heads(width: int, heads: int) -> dict[str, Any]:
    """Names the problem of a width that does not divide into its heads."""
    return {f"--width {width}: must be divisible by --heads {heads}": width % heads}


def too_few_layers(
    layers: int, *, stages: int, ranks: int, of: str = "that a schedule has"
) -> dict[str, Any]:
    """Names the problem of stages without a layer."""
    text = f"--layers {layers}: fewer than the {stages} stages {of} over {ranks} ranks; "
    return {f"{text}every stage needs a layer, so add layers or lower --ranks": layers < stages}


def script(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes `main(args=None)` of a function that has flags.

    A mistake in the flags is one line and exit code 2.
    """
    settings = {"help_option_names": ["-h", "--help"], "show_default": True}

    def make(function: Callable[..., None]) -> Callable[..., None]:
        command = click.command(name, context_settings=settings)(function)

        @functools.wraps(function)
        def main(args: Sequence[str] | None = None) -> None:
            try:
                command.main(args, prog_name=name, standalone_mode=False)
            except click.ClickException as error:
                click.echo(f"{name}: {error.format_message()}", err=True)
                sys.exit(error.exit_code)
            except click.Abort:
                sys.exit(130)

        return main

    return make
