"""Flags for the sizes of the blocks in `models`, of commands that compile steps of them."""

from collections.abc import Callable, Iterable
from typing import Any

import click

from experiments.compiled.models import HEAD_SIZE
from experiments.train_lm import flags

widths = click.option(
    "--width",
    "widths",
    type=click.IntRange(min=HEAD_SIZE),
    multiple=True,
    default=(1024, 2048),
    help=f"A multiple of {HEAD_SIZE}. Once for each.",
)


def layers(*, default: tuple[int, ...], fewest: int) -> Callable[..., Any]:
    """Adds the flag of the layers a stage, `fewest` or more."""
    return click.option(
        "--layers",
        type=click.IntRange(min=fewest),
        multiple=True,
        default=default,
        help="A stage; once for each number.",
    )


def require_whole_heads(widths: Iterable[int]) -> None:
    """Refuses widths of which a block's heads would not be whole."""
    sizes = (("--width", width, HEAD_SIZE) for width in widths)
    flags.require_multiples(*sizes, why="the size of a head")
