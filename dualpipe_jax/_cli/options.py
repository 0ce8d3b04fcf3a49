"""The options that all commands about a schedule have."""

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
    "--microbatches", type=int, default=20, show_default=True, help="Of one step."
)


class Overlap(click.ParamType):
    """`yes`, `no` or `two-tick` -> the `overlap` of an `Execution`."""

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
    """Makes the option; without a default, that which is left out is decided by simulation."""
    left_out = "" if default else " Left out, whichever of yes and no is the faster."
    return click.option(
        "--overlap",
        type=Overlap(),
        default=default,
        show_default=default is not None,
        help="yes: there is a run of beats, in which every rank runs a pair. no: every action as "
        "soon as it can. two-tick, for GPUs: what a rank makes is read by another in the second "
        f"tick after.{left_out}",
    )


def show_overlap(execution: Execution) -> str:
    """Names an overlap as the option does.

    >>> show_overlap(Execution(overlap=True)), show_overlap(Execution(overlap="two-tick"))
    ('yes', 'two-tick')
    """
    (name,) = (name for name, value in _OVERLAPS.items() if value == execution.overlap)
    return name
