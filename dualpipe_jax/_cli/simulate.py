"""`dualpipe-jax simulate`: how long schedules take with given costs, as a table or JSON."""

import json
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import click

from dualpipe_jax import schedules
from dualpipe_jax._cli import options
from dualpipe_jax._cli.quantities import parse_costs
from dualpipe_jax._cli.refusal import Command, Refusal
from dualpipe_jax._cli.table import print_table
from dualpipe_jax._predict import Costs, Simulation
from dualpipe_jax._predict import simulate as run_simulation
from dualpipe_jax._schedule.execution import Execution

_HEAD = (
    "schedule",
    "overlap",
    "makespan",
    "no false waits",
    "idle",
    "bubble",
    "paper",
    "peak live",
    "copies",
    "transfers",
)
# A narrow terminal leaves out the first ones of these.
_OPTIONAL = ("transfers", "copies", "paper", "no false waits", "peak live", "bubble", "overlap")
_NOTES = (
    "no false waits: the makespan if ranks waited only for values that they need",
    "bubble: a rank's mean idle time; paper: the same by the schedule's paper",
    "peak live: activations of a rank between F and I, in stages (x their part of its layers)",
    "copies: of the parameters; transfers: values stored from a neighbour",
)


@click.command(cls=Command)
@click.option(
    "--schedule",
    default="all",
    show_default=True,
    help=f"all, or one of {', '.join(schedules.names())}.",
)
@options.ranks
@options.microbatches
@options.stages_per_rank
@options.overlap(default=None)
@options.costs_of_actions()
@click.option(
    "--layers",
    type=int,
    help="Layers of the model; the first stages get one more. By default all stages are equal.",
)
@options.layers_per_stage(default="even")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
)
def simulate(
    schedule: str,
    ranks: int,
    microbatches: int,
    stages_per_rank: int | None,
    overlap: Any,
    rendezvous: bool,
    costs: str,
    transfer: float,
    embed: float,
    head: float,
    split_backward: bool,
    layers: int | None,
    layers_per_stage: Any,
    output_format: str,
) -> None:
    """Replay schedules with the costs of your model.

    Actions are placed in ticks by these costs, and each rank waits as the compiled program does: at
    the end of a tick for the ranks with which it exchanges values, a sender for its receiver too.
    "no false waits" is the makespan if ranks waited only for values that they read. Costs are in
    any one unit of time; the gradients of embedding and head are counted in proportion.
    """
    simulations, left_out = [], []
    try:
        all_costs = Costs(**parse_costs(costs), embed=embed, head=head)
    except ValueError as error:
        raise Refusal(str(error)) from error
    for name in schedules.names() if schedule == "all" else [schedule]:
        try:
            is_for_others = schedule == "all" and not options.has_stages_per_rank(name)
            made = options.make_schedule(
                name,
                ranks=ranks,
                microbatches=microbatches,
                stages_per_rank=None if is_for_others else stages_per_rank,
            )
            simulations.append(
                run_simulation(
                    made,
                    costs=all_costs,
                    transfer=transfer,
                    num_layers=layers,
                    layers_per_stage=layers_per_stage,
                    execution=Execution(overlap=overlap, split_backward=split_backward),
                    rendezvous=rendezvous,
                )
            )
        except ValueError as error:
            left_out.append((name, " ".join(str(error).split())))
    if not simulations:
        raise Refusal(left_out[0][1])
    if output_format == "json":
        content = ",\n".join("  " + json.dumps(_to_object(s)) for s in simulations)
        click.echo(f"[\n{content}\n]")
    else:
        caption = _caption(
            all_costs, simulations[0], transfer=transfer, split_backward=split_backward
        )
        rows = [_row(simulation) for simulation in simulations]
        print_table(_HEAD, rows, notes=(caption, *_NOTES), left=(0, 1), optional=_OPTIONAL)
    for name, reason in left_out:
        click.echo(f"left out: {name}: {reason}", err=True)


def _caption(costs: Costs, simulation: Simulation, *, transfer: float, split_backward: bool) -> str:
    """Writes the sizes and costs that all rows share."""
    fused = costs.full_backward_share * costs.backward
    full = f", full backwards {fused:g}" if not split_backward else ""
    return (
        f"ranks {simulation.num_ranks}, microbatches {simulation.num_microbatches}; a rank's "
        f"layers cost F={costs.forward:g}, I={costs.input_grad:g}, W={costs.weight_grad:g}; "
        f"transfer {transfer:g}, embed {costs.embed:g}, head {costs.head:g}{full}; "
        f"senders {'wait' if simulation.rendezvous else 'do not wait'} for receivers"
    )


def _to_object(simulation: Simulation) -> dict[str, object]:
    """Makes the JSON object of a simulation, which names sizes as the options do."""
    fields = asdict(simulation)
    sizes = {name: fields.pop(f"num_{name}") for name in ("ranks", "microbatches")}
    return {"schedule": fields.pop("schedule"), **sizes, **fields}


def _row(simulation: Simulation) -> tuple[str, ...]:
    share = Fraction(simulation.stage_share).limit_denominator(10_000)
    published = simulation.published_bubble
    return (
        simulation.schedule,
        options.show_overlap(simulation.execution),
        f"{simulation.makespan:g}",
        f"{simulation.dependency_makespan:g}",
        f"{simulation.idle_share:.1%}",
        f"{simulation.bubble:g}",
        "-" if published is None else f"{published:g}",
        f"{simulation.peak_activations}" + (f" x {share}" if share != 1 else ""),
        f"{simulation.parameter_copies:g}x",
        f"{simulation.num_transfers}",
    )
