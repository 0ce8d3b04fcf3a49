"""`dualpipe-jax preflight`: whether a language model's step fits, and communication is hidden.

JAX and the modules that need it are imported when the command is invoked, Rich for a terminal only.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict
from typing import Any

import click

from dualpipe_jax import schedules
from dualpipe_jax._cli import options, quantities
from dualpipe_jax._cli.refusal import Command, Refusal

_SIZE = click.IntRange(min=1)
_OF_SCHEDULE = ("ranks", "microbatches", "stages_per_rank")
_SIZES_OF_GPT = ("layers", "width", "heads", "context", "vocabulary", "dtype")


@click.command(cls=Command)
@click.option(
    "--topology",
    default="tpu:v5e:2x4",
    show_default=True,
    help="Devices to compile for: tpu:v5e:2x4, tpu:v5p:2x2x1, tpu:v6e:2x4, tpu:v5e:2x4*2 (two "
    "slices), gpu:h100:8, cpu:8.",
)
@click.option(
    "--schedule",
    default="dualpipe",
    show_default=True,
    help=f"One of {', '.join(schedules.names())}.",
)
@options.ranks
@options.microbatches
@options.stages_per_rank
@options.overlap(default=None)
@click.option("--layers", type=_SIZE, default=16, show_default=True, help="Layers of the model.")
@options.layers_per_stage(default="even")
@click.option("--width", type=_SIZE, default=1024, show_default=True)
@click.option("--heads", type=_SIZE, default=8, show_default=True, help="Heads of attention.")
@click.option("--context", type=_SIZE, default=512, show_default=True, help="Tokens of a window.")
@click.option("--vocabulary", type=_SIZE, default=32768, show_default=True)
@click.option(
    "--microbatch", type=_SIZE, default=4, show_default=True, help="Windows of a microbatch."
)
@click.option("--remat", type=click.Choice(["none", "block"]), default="none", show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="The dtype in which layers compute; parameters are float32.",
)
@options.slots_on_device
@click.option(
    "--host-link",
    type=quantities.Rate(),
    help="Bytes a second between a device and its host, each way, such as 32GB/s; by default "
    "that of the device's maker, or 32GB/s for a TPU, whose maker gives none.",
)
@click.option(
    "--dcn",
    type=quantities.Rate(),
    help="Bytes a second of a host's data-centre network, each way, between slices of TPUs, such "
    "as 12.5GB/s; by default the published share of a chip times the chips of a host.",
)
@click.option(
    "--host-memory",
    type=quantities.HostMemory(),
    help="Memory of the host for each device, such as 64GiB; more temporaries there are a fault. "
    "By default there is no limit.",
)
@click.option(
    "--options/--no-options",
    "has_options",
    default=True,
    show_default=True,
    help="Whether to compile with the XLA options that overlap needs.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
)
def preflight(
    topology: str,
    schedule: str,
    output_format: str,
    host_link: float | None,
    dcn: float | None,
    host_memory: float | None,
    has_options: bool,
    **options_of_step: Any,
) -> None:
    """Compile the training step of a GPT for hardware that need not be there.

    Loss, gradients and AdamW's update, with float32 parameters. The report says how much memory a
    device needs, which collectives the steady loop has and whether compute hides them, how long a
    step should take, and for a step in ticks which rank waits when, and why. Nothing runs; times
    are the compiler's and the makers' figures, not measurements. For a step of your own:
    dualpipe_jax.preflight.

    TPUs need pip install 'jax[tpu]', GPUs 'jax[cuda13]'.
    """
    # Compilers for absent hardware are no backends: only that of the CPU is started, with as many
    # devices as a topology of CPUs has.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    platform, _, number = topology.partition(":")
    if platform == "cpu" and number.isdigit():
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", number)
    gpt_step = importlib.import_module("dualpipe_jax._cli.gpt_step")
    compile_ahead = importlib.import_module("dualpipe_jax._preflight").preflight
    try:
        gpt = gpt_step.GPT(**{name: options_of_step.pop(name) for name in _SIZES_OF_GPT})
        of_schedule = {name: options_of_step.pop(name) for name in _OF_SCHEDULE}
        made = options.make_schedule(schedule, **of_schedule)
        step, args = gpt_step.make_step(gpt, schedule=made, **options_of_step)
        report = compile_ahead(
            step,
            args,
            topology,
            compiler_options=None if has_options else {},
            host_link=host_link,
            dcn=dcn,
            host_memory=host_memory,
        )
    except (ValueError, ModuleNotFoundError) as error:
        raise Refusal(" ".join(str(error).split())) from error
    if output_format == "json":
        click.echo(json.dumps({**asdict(report), "faults": report.faults}, indent=2))
    elif sys.stdout.isatty():
        _print_in_color(report)
        _print_reasons(platform if has_options else "cpu")
    else:
        click.echo(str(report))
        _print_reasons(platform if has_options else "cpu")
    if report.faults:
        sys.exit(1)


def _print_reasons(platform: str) -> None:
    explain = importlib.import_module("dualpipe_jax._preflight").explain_options
    for option in explain(platform):
        click.echo(f"\n{option.name}={option.value}\n  {option.reason}", nl=False)
    click.echo()


def _print_in_color(report: Any) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for line in report.summary():
        is_bad = "NOT FIT" in line or line.startswith("FAULT")
        console.print(line, style="red" if is_bad else None, markup=False)
    for head, rows in report.tables():
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0, pad_edge=False)
        for index, title in enumerate(head):
            table.add_column(title, justify="right" if index else "left")
        for row in rows:
            color = {"h": "green", "e": "red"}.get(row[-1][:1])
            table.add_row(*row, style=color if row[-1] else None)
        console.print()
        console.print(table)
    for line in ("", *report.notes()) if report.notes() else ():
        console.print(line, style="dim", markup=False)
