"""`dualpipe-jax search`: an order that is fast at some costs, within a limit of memory, as CSV."""

import importlib.util
from pathlib import Path
from typing import Any

import click

from dualpipe_jax import schedules
from dualpipe_jax._cli import options
from dualpipe_jax._cli.output import write
from dualpipe_jax._cli.quantities import Size, parse_costs
from dualpipe_jax._cli.refusal import Command, Refusal
from dualpipe_jax._costs import format_bytes
from dualpipe_jax._predict import Costs, simulate
from dualpipe_jax._schedule.execution import Execution


class Counts(click.ParamType):
    """Converts numbers with commas between them."""

    name = "n,n,.."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Reads `5,4,4,4`."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(number) for number in value.split(","))
        except ValueError:
            self.fail(f"{value[:100]!r} is not a list of integers with commas, as 5,4,4,4.")


@click.command(cls=Command)
@click.option(
    "--placement",
    type=click.Choice(["linear", "v", "interleaved", "bidirectional"]),
    default="linear",
    show_default=True,
    help="The ranks of the stages: as in 1f1b, dualpipev, interleaved-1f1b or dualpipe.",
)
@options.ranks
@options.microbatches
@click.option("--stages-per-rank", type=int, help="Of interleaved; by default 2.")
@click.option(
    "--layers-per-stage", type=Counts(), help="In model order; by default all stages are equal."
)
@click.option("--costs", default="F=1,I=1,W=1", show_default=True, help="Of a rank's layers.")
@click.option(
    "--transfer", type=float, default=0.0, show_default=True, help="Of a value to a neighbour."
)
@click.option(
    "--embed", type=float, default=0.0, show_default=True, help="The embedding's forward."
)
@click.option("--head", type=float, default=0.0, show_default=True, help="The head's forward.")
@click.option(
    "--max-activations",
    type=float,
    help="The most that a rank holds between F and W, in shares of its layers. By default as the "
    "fastest named schedule of the placement.",
)
@click.option(
    "--memory",
    help="The same limit in bytes, such as 12GiB, for activations and stashes; by their bytes.",
)
@click.option(
    "--activation-bytes",
    type=Size(),
    help="Bytes of an activation: those that F of a rank's layers keeps of one microbatch.",
)
@click.option(
    "--stash-bytes",
    type=Size(),
    default=0,
    show_default=True,
    help="Bytes of a stash: those that I of a rank's layers keeps of one microbatch, for W.",
)
@click.option(
    "--keep-beats/--no-keep-beats",
    default=True,
    show_default=True,
    help="Whether the steady phase of a named schedule stays, where one that fits has it.",
)
@click.option(
    "--waits",
    type=click.Choice(["program", "values"]),
    default="program",
    show_default=True,
    help="How ranks wait in the time by which the best orders are compared: as the program does, "
    "or for values that they read only.",
)
@click.option("--moves", type=int, default=100_000, show_default=True, help="Moves to try.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random numbers.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file to write; standard output if left out.",
)
def search(
    ranks: int,
    microbatches: int,
    stages_per_rank: int | None,
    layers_per_stage: tuple[int, ...] | None,
    costs: str,
    embed: float,
    head: float,
    activation_bytes: float | None,
    stash_bytes: float,
    transfer: float,
    output: Path | None,
    **more: Any,
) -> None:
    """Search for an order of actions, and write it as CSV, which `Schedule.from_csv` reads.

    A rank's row is annealed as if ranks waited only for values that they read. The same options
    give the same order. How long a step takes goes to standard error.
    """
    try:
        all_costs = Costs(
            **parse_costs(costs),
            embed=embed,
            head=head,
            activation_bytes=activation_bytes,
            stash_bytes=stash_bytes,
        )
        made = schedules.search(
            num_ranks=ranks,
            num_microbatches=microbatches,
            num_stages_per_rank=stages_per_rank,
            layers_per_stage=layers_per_stage,
            costs=all_costs,
            transfer=transfer,
            **more,
        )
    except ValueError as error:
        raise Refusal(" ".join(str(error).split())) from error
    write(made.to_csv().encode(), output)
    simulation = simulate(
        made,
        costs=all_costs,
        transfer=transfer,
        layers_per_stage=layers_per_stage,
        execution=Execution(split_backward=True),
    )
    click.echo(
        f"{made.name}: makespan {simulation.makespan:g}, {simulation.dependency_makespan:g} "
        f"without false waits; a rank holds {_show_slots(made, all_costs)}",
        err=True,
    )
    if importlib.util.find_spec("numba") is None:
        click.echo("pip install dualpipe-jax[search]: a search is much faster with Numba", err=True)


def _show_slots(schedule: schedules.Schedule, costs: Costs) -> str:
    """Writes how many activations and stashes a rank holds, and their bytes if they are known."""
    slots = schedule.compiled().tables.num_slots
    share = schedule.num_ranks / schedule.num_stages
    activations, stashes = slots["weight_residual"], slots["stash"]
    shown = f"{activations} x {share:g} of its layers' activations, {stashes} x {share:g} stashes"
    if costs.activation_bytes is None:
        return shown
    num_bytes = activations * costs.activation_bytes + stashes * costs.stash_bytes
    return f"{shown}, {format_bytes(share * num_bytes)}"
