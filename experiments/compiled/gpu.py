"""Compiles two steps for eight H100s that need not be there, and counts what compute hides.

In: flags. Out, printed: a line for each step and kind of collective. See README.md beside it.
"""

import os
from dataclasses import dataclass
from typing import Any

# Nothing runs: the GPU's compiler alone is asked, and JAX's own backend is the CPU's.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import click
from rich.console import Console

import dualpipe_jax as dpj
from experiments.compiled import gpu_steps as steps
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE, Refusal

TOPOLOGY = "gpu:h100:8"
KINDS = ("collective-permute", "all-to-all")


@dataclass(frozen=True, kw_only=True)
class Count:
    """Counts collectives of a kind in a trip of the steady loop.

    Attributes:
      total: All of them.
      num_async: Those that start and end apart.
      num_hidden: Those with a matmul between start and end.
    """

    total: int
    num_async: int
    num_hidden: int


def count(report: Any, kind: str) -> Count:
    """Counts the collectives of a kind in the steady loop of a report of `preflight`.

    Raises:
      ValueError: If the program has no steady loop.
    """
    if report.loop is None or report.loop.kind != "steady":
        raise ValueError(f"report: must be of a program with a steady loop, but is {report}")
    mine = [each for each in report.loop.collectives if each.kind == kind]
    return Count(
        total=sum(each.count for each in mine),
        num_async=sum(each.count for each in mine if each.is_async),
        num_hidden=sum(each.count for each in mine if each.is_async and each.flops > 0),
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--layers", type=POSITIVE, default=2, help="Of a stage.")
@click.option("--width", type=POSITIVE, default=1024)
@click.option(
    "--options/--no-options", "has_options", default=True, help="dpj.compiler_options, or none."
)
@click.option("--verbose", is_flag=True, help="The whole reports.")
def command(*, layers: int, width: int, has_options: bool, verbose: bool) -> None:
    """Count the collectives that compute hides, in programs for eight H100s."""
    console = Console(highlight=False, soft_wrap=True)
    made = {
        "dense": steps.dense(layers_per_stage=layers, width=width),
        "experts": steps.experts(layers_per_stage=layers, width=width),
    }
    options = dpj.compiler_options("gpu") if has_options else {}
    for name, step in made.items():
        try:
            report = dpj.preflight(
                step.fn, step.args, TOPOLOGY, compiler_options=options, mesh=step.mesh
            )
        except ModuleNotFoundError as error:
            raise Refusal(str(error)) from error
        if verbose:
            console.print(str(report))
        for kind in KINDS:
            counted = count(report, kind)
            if counted.total:
                console.print(
                    f"{name:8} {kind:18}  {counted.total:3} a trip  {counted.num_async:3} async  "
                    f"{counted.num_hidden:3} with a matmul between start and end"
                )


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="overlap")


if __name__ == "__main__":
    main()
