"""`dualpipe-jax timeline`: shows a schedule as text, data, a picture or a page.

Rich and Matplotlib are imported by the outputs that need them.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dualpipe_jax import schedules
from dualpipe_jax._cli import options, page, perfetto
from dualpipe_jax._cli.output import find_format, to_file, to_picture, write
from dualpipe_jax._cli.quantities import parse_costs, x_bytes
from dualpipe_jax._cli.refusal import Command, Refusal
from dualpipe_jax._plot import (
    FACES,
    INKS,
    WORDS,
    count,
    make_page,
    pair_spans,
    plot_timeline,
    summarize,
)
from dualpipe_jax._predict import Costs, Simulation, TimedAction, simulate, timed_actions
from dualpipe_jax._schedule import layer_order
from dualpipe_jax._schedule.execution import Execution

_FORMATS = ("text", "csv", "json", "svg", "png", "perfetto", "html")
_BY_CLOCK = ("perfetto", "html")  # the formats with the replay
# A piece of a line of text and its Rich style, "" for none.
Piece = tuple[str, str]


@click.command(cls=Command)
@click.option(
    "--schedule",
    default="dualpipe",
    show_default=True,
    help=f"One of {', '.join(schedules.names())}.",
)
@options.ranks
@options.microbatches
@options.stages_per_rank
@options.overlap(default="no")
@click.option(
    "--layers",
    type=click.IntRange(min=1, max=64),
    help="Layers of a stage: the text adds their order inside a tick and a beat.",
)
@options.costs_of_actions(only=" and ".join(_BY_CLOCK))
@x_bytes
@to_file(_FORMATS)
def timeline(
    schedule: str,
    ranks: int,
    microbatches: int,
    stages_per_rank: int | None,
    overlap: Any,
    layers: int | None,
    x_bytes: float | None,
    output_format: str | None,
    output: Path | None,
    **of_costs: Any,
) -> None:
    """Show the action of each rank in each tick.

    A forward (F), an input grad (I) and a weight grad (W) of one stage take a tick each. csv is
    PyTorch's pipelining grammar, the order of each rank without the ticks. perfetto is a trace for
    ui.perfetto.dev, by the clock: the actions as `simulate` replays them, at costs in microseconds.
    html is a file for a browser, to zoom and hover, by the same clock, at costs in any unit.
    """
    try:
        made = options.make_schedule(
            schedule, ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank
        )
        shown = made.timeline(overlap=overlap)
    except ValueError as error:
        raise Refusal(" ".join(str(error).split())) from error
    output_format = find_format(output_format, output, _FORMATS)
    given = {name: of_costs[name] for name in options.COSTS if of_costs[name] is not None}
    if given and output_format not in _BY_CLOCK:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        only = " and ".join(_BY_CLOCK)
        raise Refusal(f"{named}: only for --format {only}, not for {output_format}")
    if x_bytes is not None and output_format != "html":
        raise Refusal(f"--x-bytes: only for --format html, not for {output_format}")
    if layers is not None and output_format != "text":
        raise Refusal(f"--layers {layers}: is shown as text, not as {output_format}")
    orders = [] if layers is None else _order_lines(shown, layers)
    match output_format:
        case "text" if output is None and sys.stdout.isatty():
            _print_in_color(shown)
            click.echo("".join(orders), nl=False)
            return
        case "text":
            lines = (
                "".join(text for text, _ in line).rstrip() + "\n"
                for line in _text_lines(shown, width=None)
            )
            content = "".join((*lines, *orders)).encode()
        case "csv":
            content = made.to_csv().encode()
        case "json":
            content = _to_json(shown).encode()
        case "perfetto":
            _, actions = _replay(made, overlap, **{**options.COSTS, **given})
            process = perfetto.predicted(f"predicted: {made.name}", actions)
            content = perfetto.write([process]).encode()
        case "html":
            content = _to_page(made, overlap, x_bytes, {**options.COSTS, **given}).encode()
        case _:
            content = to_picture(lambda: plot_timeline(shown), output_format)
    write(content, output)


def _to_json(timeline: schedules.Timeline) -> str:
    """Writes the JSON object, with a line for each tick."""
    program = timeline.program
    head = {
        "schedule": program.name,
        "ranks": timeline.num_ranks,
        "microbatches": program.num_microbatches,
        "overlap": timeline.overlap,
        "num_ticks": timeline.num_ticks,
        "num_slots": timeline.num_slots,
    }
    ticks = ",\n".join("    " + json.dumps(row) for row in timeline.actions)
    return json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "actions": [\n{ticks}\n  ]\n}}\n'


def _replay(
    schedule: schedules.Schedule,
    overlap: Any,
    *,
    costs: str,
    transfer: float,
    embed: float,
    head: float,
    rendezvous: bool,
    split_backward: bool,
) -> tuple[Simulation, list[TimedAction]]:
    """Replays the schedule."""
    try:
        all_costs = Costs(**parse_costs(costs), embed=embed, head=head)
        simulation = simulate(
            schedule,
            costs=all_costs,
            transfer=transfer,
            execution=Execution(overlap=overlap, split_backward=split_backward),
            rendezvous=rendezvous,
        )
    except ValueError as error:
        raise Refusal(" ".join(str(error).split())) from error
    actions = timed_actions(
        schedule,
        simulation.execution,
        costs=all_costs,
        transfer=transfer,
        rendezvous=rendezvous,
    )
    return simulation, actions


def _to_page(
    schedule: schedules.Schedule, overlap: Any, x_bytes: float | None, of_costs: dict[str, Any]
) -> str:
    """Writes the replay as a page."""
    simulation, actions = _replay(schedule, overlap, **of_costs)
    numbers = ", ".join(f"{name} {of_costs[name]:g}" for name in ("transfer", "embed", "head"))
    senders = "wait" if simulation.rendezvous else "do not wait"
    return make_page(
        [page.predicted("predicted", actions, num_ranks=schedule.num_ranks)],
        title=f"{schedule.name}: {count(schedule.num_ranks, 'rank')}, "
        f"{count(schedule.num_microbatches, 'microbatch', 'es')}, "
        f"makespan {simulation.makespan:.6g}, {simulation.idle_share:.1%} idle",
        notes=f"predicted: replayed at costs {of_costs['costs']}, {numbers}; "
        f"senders {senders} for receivers; {simulation.execution}",
        unit="",
        starts=[route[0] for route in schedule.program.routes],
        has_ticks=True,
        x_bytes=x_bytes,
    )


def _order_lines(timeline: schedules.Timeline, num_layers: int) -> list[str]:
    """Writes the order of a stage's layers inside a tick, and inside a beat if there are any."""
    orders = layer_order.orders_of(num_layers, has_beats=len(timeline.beats) > 0)
    width = max(map(len, orders))
    lines = (f"  {name:{width}}  {layer_order.write(order)}\n" for name, order in orders.items())
    return [f"\nOrder of {num_layers} unrolled layers of a stage:\n", *lines]


def _print_in_color(timeline: schedules.Timeline) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in _text_lines(timeline, width=shutil.get_terminal_size().columns):
        console.print(Text.assemble(*line), soft_wrap=True)


def _text_lines(timeline: schedules.Timeline, *, width: int | None) -> Iterator[list[Piece]]:
    """Yields the lines of the text form: a row a rank, a cell a tick, then the legend.

    A timetable wider than `width` columns is folded into blocks, each under its own ticks.
    """
    num_ticks, num_ranks = timeline.num_ticks, timeline.num_ranks
    cells = _text_cells(timeline)
    cell_width = max(len(text) for row in cells for text, _ in row) + 1
    labels = [f"rank {rank} " for rank in range(num_ranks)]
    label_width = len(labels[-1])
    block = num_ticks
    if width is not None:
        block = min(num_ticks, max(1, (width - label_width) // cell_width))
    ruler_step = 5 if block >= 10 else 1
    joins = [[" "] * num_ticks for _ in range(num_ranks)]
    for rank, first, last in pair_spans(timeline):
        joins[rank][first + 1 : last + 1] = "|" + "+" * (last - first - 1)
    for start in range(0, num_ticks, block):
        ticks = range(start, min(start + block, num_ticks))
        marks = [str(tick) if tick % ruler_step == 0 else "" for tick in ticks]
        yield [("tick".ljust(label_width), "dim")] + [
            (" " + mark.ljust(cell_width - 1), "dim") for mark in marks
        ]
        for rank, label in enumerate(labels):
            line = [(label.ljust(label_width), "")]
            for tick in ticks:
                text, style = cells[rank][tick]
                line += [(joins[rank][tick], ""), (text.ljust(cell_width - 1), style)]
            yield line
        yield [("", "")]
    yield from _text_legend(timeline)


def _text_cells(timeline: schedules.Timeline) -> list[list[Piece]]:
    """Gives each rank's cells: F3 in direction 0, f3 in direction 1, a dot for an idle tick."""
    pieces = [(".", "dim")] * 2
    for kind, faces in FACES.items():
        pieces += [
            (letter, f"{ink} on {face}")
            for letter, ink, face in zip((kind, kind.lower()), INKS, faces, strict=True)
        ]
    look = (timeline.opcode * 2 + timeline.direction.clip(0) % 2).T.tolist()
    cells = []
    for looks, numbers in zip(look, timeline.microbatch.T.tolist(), strict=True):
        row = []
        for index, number in zip(looks, numbers, strict=True):
            letter, style = pieces[index]
            row.append((letter if number < 0 else f"{letter}{number}", style))
        cells.append(row)
    return cells


def _text_legend(timeline: schedules.Timeline) -> Iterator[list[Piece]]:
    legend: list[Piece] = []
    for kind, word in WORDS.items():
        legend += [(kind, f"{INKS[0]} on {FACES[kind][0]}"), (f" {word}   ", "")]
    legend += [(".", "dim"), (" idle", "")]
    if (timeline.pair >= 0).any():
        legend.append(("   F|I+W a pair: F beside I and W", ""))
    yield legend
    if len(timeline.program.routes) > 1:
        first, second = (route[0] for route in timeline.program.routes[:2])
        example: list[Piece] = [(k.lower(), f"{INKS[1]} on {FACES[k][1]}") for k in WORDS]
        yield [
            (f"upper case: direction 0, enters at rank {first}   ", ""),
            *example,
            (f" lower case: direction 1, enters at rank {second}", ""),
        ]
    slots = ", ".join(f"{number} {buffer}" for buffer, number in timeline.num_slots.items())
    yield [(f"{summarize(timeline)}; slots: {slots}", "")]
