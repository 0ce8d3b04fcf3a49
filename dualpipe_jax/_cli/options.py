"""The options that several commands share."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from dualpipe_jax import schedules
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.named import options_of
from dualpipe_jax._schedule.stage_sizes import BALANCED

_Command = TypeVar("_Command", bound=Callable[..., Any])
# The options of a replay, and their defaults.
COSTS: dict[str, Any] = {
    "rendezvous": True,
    "costs": "F=1,I=1,W=1",
    "transfer": 0.0,
    "embed": 0.0,
    "head": 0.0,
    "split_backward": True,
}
_OVERLAPS: dict[str, bool | str] = {"yes": True, "no": False, "two-tick": "two-tick"}

ranks = click.option(
    "--ranks", type=int, default=8, show_default=True, help="Devices of the pipeline."
)
microbatches = click.option(
    "--microbatches", type=int, default=20, show_default=True, help="Microbatches of a step."
)


def has_stages_per_rank(name: str) -> bool:
    """Whether a schedule has any number of stages a rank."""
    return "num_stages_per_rank" in options_of(name)


stages_per_rank = click.option(
    "--stages-per-rank",
    type=int,
    help="Stages that each rank holds, by default 2: for "
    f"{', '.join(filter(has_stages_per_rank, GENERATORS))}.",
)


def make_schedule(
    name: str, *, ranks: int, microbatches: int, stages_per_rank: int | None
) -> schedules.Schedule:
    """Makes the schedule that a command's options describe.

    Raises:
        ValueError: As `schedules.make`.
    """
    options = {} if stages_per_rank is None else {"num_stages_per_rank": stages_per_rank}
    return schedules.make(name, num_ranks=ranks, num_microbatches=microbatches, **options)


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


class Slots(click.ParamType):
    """Converts a number, or a size, to the `slots_on_device` of an `Execution`."""

    name = "N|size"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        """Reads either."""
        text = str(value).strip()
        try:
            slots = int(text) if text.isdecimal() else text
            Execution(slots_on_device=slots)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        return slots


slots_on_device = click.option(
    "--slots-on-device",
    type=Slots(),
    help="How many slots, each with the values that a microbatch keeps in a stage, have room on "
    "the device, or bytes for them, such as 12GiB; the others wait on the host. By default all.",
)


class LayersPerStage(click.ParamType):
    """Converts `even`, `balanced` or `9,8,8,7` to the `layers_per_stage` of a step."""

    name = "even|balanced|N,N,.."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Sequence[int] | str | None:
        """Reads one of the three."""
        if value in (None, "even"):
            return None
        if value == BALANCED or not isinstance(value, str):
            return value
        try:
            return tuple(map(int, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not even, balanced, or numbers with commas.", param, ctx)


def layers_per_stage(*, default: str) -> Callable[[_Command], _Command]:
    """Makes the option."""
    return click.option(
        "--layers-per-stage",
        type=LayersPerStage(),
        default=default,
        show_default=True,
        help="How the layers are cut into stages: evenly; balanced, so that the step is the "
        "fastest by simulation; or as many as named, in model order.",
    )


def costs_of_actions(*, only: str = "") -> Callable[[_Command], _Command]:
    """Makes the options of a replay; those of one output format (`only`) have no defaults.

    A command that has them as keywords reads the missing ones by `COSTS`.
    """

    def option(*names: str, help_text: str, **more: Any) -> Callable[[_Command], _Command]:
        name = names[0].partition("/")[0].removeprefix("--").replace("-", "_")
        shown = f"{help_text} For {only}." if only else help_text
        default = None if only else COSTS[name]
        return click.option(*names, default=default, show_default=not only, help=shown, **more)

    made = (
        option(
            "--rendezvous/--no-rendezvous",
            help_text="Whether a sender waits for its receiver, as on TPUs; not on GPUs.",
        ),
        option(
            "--costs",
            help_text="How long actions of a rank's whole share of the layers take; by default 1, "
            "and B (fused I and W) the sum of the two.",
        ),
        option("--transfer", type=float, help_text="How long a value travels to a neighbour."),
        option("--embed", type=float, help_text="How long the embedding's forward takes."),
        option("--head", type=float, help_text="How long the head's forward takes."),
        option(
            "--split-backward/--no-split-backward",
            help_text="Whether input grads and weight grads are split; else they run as full "
            "backwards, layer by layer, where one follows the other outside of the steady phase.",
        ),
    )

    def add(command: _Command) -> _Command:
        for each in reversed(made):
            command = each(command)
        return command

    return add


def show_overlap(execution: Execution) -> str:
    """Writes an overlap as the option reads it.

    >>> show_overlap(Execution(overlap=True)), show_overlap(Execution(overlap="two-tick"))
    ('yes', 'two-tick')
    """
    (name,) = (name for name, value in _OVERLAPS.items() if value == execution.overlap)
    return name
