"""Compiles steps for TPUs that are not there, with full backwards and without; compares the two.

In: flags. Out, printed: tables. See README.md beside it.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Compilers for absent hardware are no backends: only the CPU's is to be started.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import click
from rich.progress import track

import dualpipe_jax as dpj
from experiments import documents
from experiments.compiled import sizes, steps
from experiments.compiled.steps import Case
from experiments.train_lm import flags

README = Path(__file__).parent / "backwards.md"
BLOCKS, REMATS = ("mlp", "transformer"), ("none", "block")
# Schedules in ticks, and how many ranks the times are of, with four microbatches each.
SCHEDULES, RANKS = ("gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "chimera"), (4, 8, 16)
_TRANSFER = 0.1  # of a forward
_NAMES = "block | remat | width | layers"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a tick of 1F1B costs, in cycles as the compiler estimates them, for all of a stage.

    Attributes:
      case: What was compiled.
      forward: F.
      input_grad: I.
      weight_grad: W.
      full_backward: Both as one, in its two halves.
      temporaries: Of the step with I and W apart, in bytes.
      temporaries_full: With both as one.
    """

    case: Case
    forward: float
    input_grad: float
    weight_grad: float
    full_backward: float
    temporaries: int
    temporaries_full: int

    @property
    def share(self) -> float:
        """Cycles of both as one, beside the two apart."""
        return self.full_backward / (self.input_grad + self.weight_grad)

    def change_of_time(self, schedule: str, *, ranks: int) -> float:
        """Simulates how much longer a schedule takes with full backwards, at these costs."""
        made = dpj.schedules.make(schedule, num_ranks=ranks, num_microbatches=4 * ranks)
        costs = dpj.Costs(
            forward=self.forward,
            input_grad=self.input_grad,
            weight_grad=self.weight_grad,
            full_backward=self.full_backward,
            # A deferred W runs again what I does, its forward included.
            recompute=self.input_grad if self.case.remat == "block" else 0.0,
        )
        apart, full = (
            dpj.simulate(
                made,
                costs=costs,
                transfer=_TRANSFER * self.forward,
                execution=dpj.Execution(split_backward=is_split),
            ).makespan
            for is_split in (True, False)
        )
        return full / apart - 1


@dataclass(frozen=True, kw_only=True)
class Beats:
    """What DualPipe's step is with input grads and weight grads apart, and as one outside its run.

    Attributes:
      case: What was compiled.
      cycles: Of a layer and a microbatch in the steady loop, apart and as one.
      temporaries: Of the step, in bytes.
      seconds: That preflight predicts for a step.
    """

    case: Case
    cycles: tuple[float, float]
    temporaries: tuple[int, int]
    seconds: tuple[float, float]


def measure_ticks(case: Case) -> Row:
    """Compiles a case of a schedule without a run of beats twice."""
    apart, full = (steps.pipelined(case, split_backward=is_split) for is_split in (True, False))
    before, after = (
        {action.name: action.cycles for action in report.loop.actions} for report in (apart, full)
    )
    # What stands under no action's name, such as a copy of what is stashed, is not F's.
    other = after["other"] - before["other"]
    return Row(
        case=case,
        forward=before["forward"],
        input_grad=before["input_grad"],
        weight_grad=before["weight_grad"],
        full_backward=after["input_grad"] + after["weight_grad"] + other,
        temporaries=apart.memory.temporaries,
        temporaries_full=full.memory.temporaries,
    )


def measure_beats(case: Case) -> Beats:
    """Compiles a case of a schedule with a run of beats twice."""
    apart, full = (steps.pipelined(case, split_backward=is_split) for is_split in (True, False))

    def cycles(report: Any) -> float:
        return steps.cycles_of_layers(report.loop) / (2 * case.layers)  # two beats a trip

    return Beats(
        case=case,
        cycles=(cycles(apart), cycles(full)),
        temporaries=(apart.memory.temporaries, full.memory.temporaries),
        seconds=(apart.prediction.seconds, full.prediction.seconds),
    )


def cases(
    schedule: str, *, widths: Sequence[int], layers: Sequence[int], tokens: int
) -> list[Case]:
    """Lists what is compiled: all layers at the first width, the fewest at the others."""
    sizes = [(widths[0], count) for count in layers] + [(width, layers[0]) for width in widths[1:]]
    return [
        Case(
            topology="tpu:v5e:2x2",
            ranks=4,
            family=family,
            remat=remat,
            width=width,
            layers=count,
            tokens=tokens,
            schedule=schedule,
        )
        for family, remat, (width, count) in itertools.product(BLOCKS, REMATS, sizes)
    ]


def tables_of_ticks(rows: Sequence[Row]) -> str:
    """Writes what ticks cost, and what steps of such ticks take, as two tables in Markdown."""
    costs = [
        (
            *(f"{value / 1e6:.2f}" for value in (row.forward, row.input_grad, row.weight_grad)),
            f"{row.full_backward / 1e6:.2f}",
            f"{row.share:.2f}",
            f"{row.temporaries / 2**20:,.0f}",
            f"{row.temporaries_full / 2**20:,.0f}",
        )
        for row in rows
    ]
    times = [
        tuple(
            ", ".join(f"{100 * row.change_of_time(name, ranks=ranks):+.0f}" for ranks in RANKS)
            for name in SCHEDULES
        )
        for row in rows
    ]
    head = f"{_NAMES} | F | I | W | as one | as one / I + W | MiB | MiB, as one"
    return "\n\n".join(
        (
            _table(head, rows, costs),
            _table(" | ".join((_NAMES, *(f"`{name}`" for name in SCHEDULES))), rows, times),
        )
    )


def table_of_beats(rows: Sequence[Beats]) -> str:
    """Writes what becomes of DualPipe as a table in Markdown."""
    cells = []
    for row in rows:
        before, after = row.seconds
        cells.append(
            (
                *(f"{cycles:,.0f}" for cycles in row.cycles),
                *(f"{num_bytes / 2**20:,.0f}" for num_bytes in row.temporaries),
                f"{100 * (after / before - 1):+.1f}",
            )
        )
    head = f"{_NAMES} | a layer's cycles | as one | MiB | MiB, as one | step, %"
    return _table(head, rows, cells)


def _table(head: str, rows: Sequence[Row | Beats], cells: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {head} |", "| --- | --- " + "| ---: " * (head.count("|") - 1) + "|"]
    for row, values in zip(rows, cells, strict=True):
        case = row.case
        line: tuple[Any, ...] = (case.family, case.remat, case.width, case.layers, *values)
        lines.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@sizes.widths
@sizes.layers(default=(2, 8), fewest=2)
@click.option("--tokens", type=flags.POSITIVE, default=4096, help="A microbatch.")
@click.option("--write-readme", is_flag=True, help="Put the tables into the README.")
def command(
    *, widths: tuple[int, ...], layers: tuple[int, ...], tokens: int, write_readme: bool
) -> None:
    """Compare full backwards with input grads and weight grads apart, in programs for TPUs."""
    sizes.require_whole_heads(widths)
    ticks = cases("1f1b", widths=widths, layers=layers, tokens=tokens)
    beats = cases("dualpipe", widths=widths, layers=layers[:1], tokens=tokens)
    try:
        texts = {
            "ticks": tables_of_ticks([measure_ticks(c) for c in track(ticks, "1f1b")]),
            "beats": table_of_beats([measure_beats(c) for c in track(beats, "dualpipe")]),
        }
    except ModuleNotFoundError as error:
        raise flags.Refusal(str(error)) from error
    for name, text in texts.items():
        click.echo(f"{text}\n")
        if write_readme:
            documents.write_into(README, text, name=name)


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="full_backward")


if __name__ == "__main__":
    main()
