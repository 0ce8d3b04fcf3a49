"""Measures the library on the accelerators of this machine, within some minutes.

In: flags. Out, in a folder for the kind of device: report.json and report.md, and the workers'
output. See README.md beside it.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console

import dualpipe_jax as dpj
from experiments.compiled import models
from experiments.hardware import one_rank, programs, schedules
from experiments.hardware.report import JSON, PAGE, Outcome, Report
from experiments.hardware.tasks import Figure, Sizes, Task
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE

_ROOT = Path(__file__).resolve().parents[2]
# In order of importance.
PARTS = ("step", "tick", "layer", "commands", "schedules")
FAMILIES = ("transformer", "mlp", "flash")
# Sizes that fill an accelerator, and sizes with which a CPU shows that all of it runs.
DEFAULTS = {"width": 2048, "tokens": 8192, "microbatches": 8, "rounds": 10}
ON_CPUS = {"width": 128, "tokens": 32, "microbatches": 4, "rounds": 3}
# The schedule that has each set of command buffers, if it is among those that are measured.
DEFAULT = "dualpipe"
# The share of the time that a part may take: a graph that never ends takes no more.
_MOST = {"commands": 0.2}
_PREFLIGHT = (schedules.TABLE, "preflight")


def _size(name: str, text: str) -> Any:
    shown = f"{DEFAULTS[name]}; {ON_CPUS[name]} on CPUs"
    return click.option(f"--{name}", type=POSITIVE, show_default=shown, help=text)


@flags.script("hardware")
@click.option(
    "--minutes", type=flags.PositiveFloat(), default=7.5, help="When the last part must end."
)
@flags.several("--part", "parts", PARTS, default=PARTS, text="The parts to measure.")
@flags.several(
    "--schedule",
    "names",
    dpj.schedules.names(),
    default=(),
    text="The schedules to measure, by default all over several devices, and 1f1b over one.",
)
@click.option(
    "--devices", type=POSITIVE, show_default="all accelerators, or 2 fake ones of the CPU"
)
@click.option("--family", type=click.Choice(FAMILIES), default="transformer", help="The block.")
@click.option("--layers", type=POSITIVE, default=2, help="Layers of a rank, an even number.")
@_size("width", "Size of the residual stream.")
@_size("tokens", "Tokens of a microbatch.")
@_size("microbatches", "Microbatches of a step for each rank.")
@_size("rounds", "Measured steps of each program.")
@flags.output("runs/hardware", results="the report, in a folder for the kind of device")
def main(
    *,
    minutes: float,
    parts: tuple[str, ...],
    names: tuple[str, ...],
    devices: int | None,
    family: str,
    layers: int,
    output: Path,
    **sizes: int | None,
) -> None:
    """Measure layers, ticks, steps and schedules on this machine's accelerators.

    Each part, and each schedule, runs in a process of its own; the report is saved after each.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    _require_fit(family, layers=layers, **given)
    flags.make_folder(output)
    deadline = time.monotonic() + 60 * minutes
    console = Console(highlight=False)
    machine = _ask_machine(output, devices, deadline)
    defaults = ON_CPUS if machine["platform"] == "cpu" else DEFAULTS
    report = Report(
        machine=machine,
        sizes=Sizes(family=family, layers=layers, **{**defaults, **given}),
        minutes=minutes,
    )
    folder = output / re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    flags.make_folder(folder)
    console.print(f"devices   {machine['line']}", soft_wrap=True)
    for fields in plan_parts(machine, parts, names):
        _run(report, fields, folder, deadline)
        outcome = report.outcomes[-1]
        words = outcome.failure or ("left out" if outcome.is_left_out else "done")
        console.print(f"{outcome.name:<28}{outcome.seconds:6.1f} s  {words}", soft_wrap=True)
    console.print((folder / PAGE).read_text(), soft_wrap=True, markup=False)
    console.print(f"written   {folder}: {JSON}, {PAGE}", soft_wrap=True)
    if report.failures:
        raise click.ClickException("; ".join(report.failures))


def plan_parts(
    machine: dict[str, Any], parts: Sequence[str], names: Sequence[str]
) -> Iterator[dict[str, str]]:
    """Yields the parts that fit the machine, as a task's fields, in order of importance."""
    all_names = dpj.schedules.names() if machine["devices"] > 1 else (one_rank.SCHEDULE,)
    chosen = list(dict.fromkeys(names or all_names))
    for part in PARTS:
        if part not in parts:
            continue
        if part == "schedules":
            yield from ({"part": part, "schedule": name} for name in chosen)
        elif part != "commands":
            yield {"part": part}
        elif machine["platform"] == "gpu":
            schedule = DEFAULT if DEFAULT in chosen else chosen[0]
            for name in programs.COMMANDS:
                yield {"part": part, "schedule": schedule, "commands": name}


def _require_fit(family: str, *, layers: int, width: int = 0, tokens: int = 0, **_: int) -> None:
    """Refuses flags that do not fit each other, all in one line."""
    head, window = models.HEAD_SIZE, models.CONTEXT
    flags.refuse(
        {
            f"--layers {layers}: must be even, as a layer is measured by the difference between "
            "all of them and half of them": layers % 2,
            f"--width {width}: must be a multiple of {head}, the size of a head": family != "mlp"
            and width % head,
            f"--tokens {tokens}: must be a multiple of {window}, the window of attention, or less "
            "than it": tokens > window and tokens % window,
        }
    )


def _ask_machine(output: Path, devices: int | None, deadline: float) -> dict[str, Any]:
    """Asks a worker for the devices: they must not be taken by this process."""
    path = output / "machine.jsonl"
    path.unlink(missing_ok=True)
    nothing = Sizes(family="mlp", width=1, layers=2, tokens=1, microbatches=1, rounds=1)
    task = Task(part="machine", devices=devices or 0, sizes=nothing, output=str(path.resolve()))
    failure = _work(task, output / "machine.log", deadline)
    if failure:
        raise flags.Refusal(failure)
    return json.loads(path.read_text())


def _run(report: Report, fields: dict[str, str], folder: Path, deadline: float) -> None:
    """Measures a part, if there is time, and saves the report."""
    answers = [
        each for each in report.figures if (each.table, each.column) == _PREFLIGHT and each.note
    ]
    task = Task(
        **fields,
        devices=report.machine["devices"],
        sizes=report.sizes,
        costs=report.costs(),
        asks_preflight=not answers,  # where it has no times, one answer says why
        output="",
    )
    path = folder / f"{task.name}.jsonl"
    path.unlink(missing_ok=True)
    task = dataclasses.replace(task, output=str(path.resolve()))
    start = time.monotonic()
    failure, is_left_out = "", start >= deadline
    if not is_left_out:
        try:
            end = min(deadline, start + 60 * report.minutes * _MOST.get(task.part, 1))
            failure = _work(task, folder / f"{task.name}.log", end)
        except subprocess.TimeoutExpired:
            is_left_out = True
    lines = path.read_text().splitlines() if path.exists() else []
    report.figures += [Figure.from_dict(json.loads(line)) for line in lines]
    report.outcomes.append(
        Outcome(
            name=task.name,
            seconds=time.monotonic() - start,
            failure=failure,
            is_left_out=is_left_out,
        )
    )
    report.save(folder)


def _work(task: Task, log: Path, deadline: float) -> str:
    """Runs a worker to its end; returns "" or why it failed.

    Raises:
      subprocess.TimeoutExpired: If it was not done in time; it has been ended.
    """
    # Several parts have the same programs.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(log.parent.resolve() / "cache"), **os.environ}
    with log.open("w") as said:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "experiments.hardware.worker",
                json.dumps(dataclasses.asdict(task)),
            ],
            stdout=said,
            stderr=subprocess.STDOUT,
            env=cache,
            cwd=_ROOT,  # which `-m` puts first on the path: this checkout, whoever runs it
        )
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            process.kill()
            process.wait()
    if code == 0:
        return ""
    lines = [line.strip() for line in log.read_text().splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}, nothing said"


if __name__ == "__main__":
    main()
