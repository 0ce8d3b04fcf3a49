"""`dualpipe-jax measured`: the timetable of a step that ran, from a profile of JAX.

It starts without JAX, as the files of a profile are read here.
"""

import csv
import io
from functools import partial
from pathlib import Path

import click

from dualpipe_jax._cli import page, perfetto
from dualpipe_jax._cli.output import find_format, to_file, to_picture, write
from dualpipe_jax._cli.quantities import x_bytes
from dualpipe_jax._cli.refusal import Command, Refusal
from dualpipe_jax._cli.table import print_table
from dualpipe_jax._plot import Bar, make_page, plot_measured
from dualpipe_jax._predict import Costs, TimedAction, timed_actions
from dualpipe_jax._profile import Measured, Step, find_steps, measure

_FORMATS = ("text", "csv", "perfetto", "html", "svg", "png")
_HEAD = ("rank", "F", "I", "W", "idle", "of it send", "idle share")
_NOTES = (
    "milliseconds; F has the embedding, and the head with its gradient, I the embedding's gradient",
    "idle: in no action; send: in transfers that no action hides, and in waits for the other rank",
    "predicted: by simulation at the measured costs, with transfers that take no time",
)
_COLUMNS = ("rank", "action", "part", "stage", "microbatch", "direction", "tick")
_MILLI, _MICRO = 1e3, 1e6


@click.command(cls=Command)
@click.argument("profile", type=click.Path(path_type=Path))
@click.option(
    "--step",
    "number",
    type=int,
    help="Which step of the profile, from 0. By default the last whole one.",
)
@click.option(
    "--devices",
    help="The devices of one pipeline, in order of rank: 0,1,2,3. By default all of the profile.",
)
@x_bytes
@to_file(_FORMATS)
def measured(
    profile: Path,
    number: int | None,
    devices: str | None,
    x_bytes: float | None,
    output_format: str | None,
    output: Path | None,
) -> None:
    """Show which rank ran which action when, in a step that ran.

    PROFILE is the folder that jax.profiler.start_trace was given, or an .xplane.pb file in it. text
    sums up the times of each rank; svg and png draw the timetable; csv has a line for each part of
    an action; perfetto is a trace for ui.perfetto.dev, with the predicted timetable below; html is
    a file for a browser, to zoom and hover, with the predicted timetable below.
    """
    output_format = find_format(output_format, output, _FORMATS)
    if x_bytes is not None and output_format != "html":
        raise Refusal(f"--x-bytes: only for --format html, not for {output_format}")
    try:
        steps = find_steps(profile)
        number = _choose(steps, number)
        found = measure(steps[number], _read_devices(devices))
    except ValueError as error:
        raise Refusal(" ".join(str(error).split())) from error
    except OSError as error:
        raise Refusal(f"{profile}: {error.strerror}") from error
    title = f"{_summarize(found)}, step {number} of {len(steps)}"
    if output_format == "text" and output is None:
        _print(found, title)
        return
    match output_format:
        case "text":
            raise Refusal(f"--output {output}: text is for standard output; use another --format")
        case "csv":
            content = _to_csv(found).encode()
        case "perfetto":
            content = _to_perfetto(found, title).encode()
        case "html":
            content = _to_page(found, title, x_bytes).encode()
        case _:
            bars, timeline = _bars(found), found.plan.schedule.timeline()
            draw = partial(plot_measured, bars, timeline, title=title)
            content = to_picture(draw, output_format)
    write(content, output)


def _choose(steps: list[Step], number: int | None) -> int:
    """Chooses a step: the last whole one, if no number is given."""
    if number is None:
        whole = [place for place, step in enumerate(steps) if step.is_whole]
        return whole[-1] if whole else len(steps) - 1
    if not 0 <= number < len(steps):
        raise ValueError(f"--step {number}: must be 0 to {len(steps) - 1}, the profile's steps")
    return number


def _read_devices(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--devices {text!r}: must be numbers with commas: 0,1,2,3") from error


def _summarize(found: Measured) -> str:
    schedule = found.plan.schedule
    return (
        f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches, "
        f"{found.makespan * _MILLI:.4g} ms, {found.idle_share:.1%} idle"
    )


def _print(found: Measured, title: str) -> None:
    predicted = found.predicted
    rows = []
    for rank, times in enumerate(found.ranks):
        acts = times.forward, times.input_grad, times.weight_grad, times.idle, times.send
        cells = (f"{seconds * _MILLI:.3f}" for seconds in acts)
        rows.append((str(rank), *cells, f"{times.idle / found.makespan:.1%}"))
    notes = (
        f"{title}; {found.plan.placement.execution}",
        f"predicted: {predicted.makespan * _MILLI:.4g} ms, {predicted.idle_share:.1%} idle",
        f"mean costs in microseconds: {_write_costs(found.costs)}",
        *_NOTES,
    )
    print_table(_HEAD, rows, notes=notes)


def _write_costs(costs: Costs) -> str:
    """Writes costs as the options of `timeline` and `simulate`."""
    by_kind = {"F": costs.forward, "I": costs.input_grad, "W": costs.weight_grad}
    actions = ",".join(f"{kind}={seconds * _MICRO:.6g}" for kind, seconds in by_kind.items())
    ends = {"embed": costs.embed, "head": costs.head}
    return " ".join(
        [f"--costs {actions}", *(f"--{name} {cost * _MICRO:.6g}" for name, cost in ends.items())]
    )


def _to_csv(found: Measured) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow((*_COLUMNS, "start_us", "duration_us"))
    for each in found.segments:
        places = (each.stage, each.microbatch, each.direction, each.tick)
        times = (f"{seconds * _MICRO:.3f}" for seconds in (each.start, each.seconds))
        known = ("" if place is None else place for place in places)
        writer.writerow((each.rank, each.kind, each.part, *known, *times))
    return file.getvalue()


def _to_perfetto(found: Measured, title: str) -> str:
    return perfetto.write(
        [
            perfetto.measured(f"measured: {title}", found),
            perfetto.predicted(_name_predicted(found), _replay(found), unit=_MICRO),
        ]
    )


def _to_page(found: Measured, title: str, x_bytes: float | None) -> str:
    actions, program = _replay(found), found.plan.schedule.program
    below = f"{_name_predicted(found)}, at the measured costs, with transfers that take no time"
    return make_page(
        [
            page.measured("measured", found, actions),
            page.predicted(below, actions, num_ranks=program.num_ranks, unit=_MILLI),
        ],
        title=title,
        notes=f"{found.plan.placement.execution}; mean costs in microseconds: "
        f"{_write_costs(found.costs)}",
        unit="ms",
        starts=[route[0] for route in program.routes],
        has_ticks=False,
        x_bytes=x_bytes,
    )


def _name_predicted(found: Measured) -> str:
    predicted = found.predicted
    return f"predicted: {predicted.makespan * _MILLI:.4g} ms, {predicted.idle_share:.1%} idle"


def _replay(found: Measured) -> list[TimedAction]:
    """Replays the step at its measured costs."""
    placement = found.plan.placement
    return timed_actions(
        found.plan.schedule,
        found.predicted.execution,
        costs=found.costs,
        layers=placement.layers,
        placed_by=placement.costs,
    )


def _bars(found: Measured) -> list[Bar]:
    """Makes the boxes of the picture."""
    return [
        Bar(
            each.rank,
            each.kind,
            each.direction or 0,
            each.microbatch,
            each.start * _MILLI,
            each.end * _MILLI,
        )
        for each in found.joined
    ]
