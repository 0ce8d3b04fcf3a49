"""The options that several commands share."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from dualpipe_jax._schedule.execution import Execution

_Command = TypeVar("_Command", bound=Callable[..., Any])
_OVERLAPS: dict[str, bool | str] = {"yes": True, "no": False, "two-tick": "two-tick"}

ranks = click.option(
    "--ranks", type=int, default=8, show_default=True, help="Devices of the pipeline."
)
microbatches = click.option(
    "--microbatches", type=int, default=20, show_default=True, help="Microbatches of a step."
)


class Overlap(click.ParamType):
    """Converts `yes`, `no` or `two-tick` to the `overlap` of an `Execution`."""

    name = "yes|no|two-tick"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> bool | str:
        """Reads one of the three."""
        if value in _OVERLAPS.values():
            return value
        if value not in _OVERLAPS:
            self.fail(f"{value!r} is not one of {', '.join(map(repr, _OVERLAPS))}.", param, ctx)
        return _OVERLAPS[value]


def overlap(*, default: str | None) -> Callable[[_Command], _Command]:
    """Makes the option; without a default, a simulation decides where it is left out."""
    left_out = "" if default else " By default the faster of yes and no."
    return click.option(
        "--overlap",
        type=Overlap(),
        default=default,
        show_default=default is not None,
        help="yes: there is a steady phase, in which every rank runs a pair. no: every action runs "
        "as soon as it can. two-tick, for GPUs: a rank reads a neighbour's value in the second "
        f"tick after it is made.{left_out}",
    )


def show_overlap(execution: Execution) -> str:
    """Writes an overlap as the option reads it.

    >>> show_overlap(Execution(overlap=True)), show_overlap(Execution(overlap="two-tick"))
    ('yes', 'two-tick')
    """
    (name,) = (name for name, value in _OVERLAPS.items() if value == execution.overlap)
    return name
