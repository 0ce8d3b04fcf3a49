"""Trains the model of train_lm in float32 and in bfloat16 and draws both losses.

Run it with `make precision`. Each run is the main job in a process of its own.
"""

import csv
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

from experiments.train_lm import flags

_ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"float32": "#0b62a4", "bfloat16": "#bd4400"}
WINDOW = 20  # steps over which train losses are averaged in the picture


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a run in nats a byte, the train losses from step 1 on, the others by step."""

    train: np.ndarray
    held_out: dict[int, float]


def train(dtype: str, arguments: list[str], output: Path) -> Losses:
    """Runs the main job, which prints what it does, and reads its log.

    Raises:
      flags.Refusal: If it fails.
    """
    module = [sys.executable, "-m", "experiments.train_lm.train_lm"]
    command = [*module, "--dtype", dtype, "--output", str(output.resolve()), *arguments]
    if subprocess.run(command, check=False, cwd=_ROOT).returncode:
        raise flags.Refusal(f"training in {dtype} failed; what it said is above")
    return read(output / "log.csv")


def read(path: Path) -> Losses:
    """Reads a log."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Losses(
        train=np.array([float(row["train_loss"]) for row in rows if row["train_loss"]]),
        held_out={
            int(row["step"]): float(row["held_out_loss"]) for row in rows if row["held_out_loss"]
        },
    )


def table(runs: dict[str, Losses]) -> str:
    """Writes the held-out losses, and how far apart they are, as Markdown."""
    names = list(runs)
    steps = list(runs[names[0]].held_out)
    rows = [[f"{runs[name].held_out[step]:.3f}" for step in steps] for name in names]
    apart = [
        f"{runs[names[1]].held_out[step] - runs[names[0]].held_out[step]:+.3f}" for step in steps
    ]
    lines = [
        "| step | " + " | ".join(map(str, steps)) + " |",
        "|---|" + "---:|" * len(steps),
        *(f"| {name} | {' | '.join(row)} |" for name, row in zip(names, rows, strict=True)),
        f"| apart | {' | '.join(apart)} |",
    ]
    return "\n".join(lines)


def largest_gap(runs: dict[str, Losses]) -> float:
    """Finds the largest difference of the two train losses at a step, batch for batch."""
    one, other = (losses.train for losses in runs.values())
    return float(np.abs(one - other).max())


def plot(runs: dict[str, Losses], path: Path) -> None:
    """Draws train and held-out losses of both, and under them how far apart they are."""
    figure = Figure(figsize=(8, 6), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    kernel = np.ones(WINDOW) / WINDOW
    for (name, losses), style in zip(runs.items(), ("-", "--"), strict=True):
        smooth = np.convolve(losses.train, kernel, "valid")
        steps = np.arange(len(smooth)) + (WINDOW + 1) / 2
        upper.plot(steps, smooth, style, color=DTYPES[name], linewidth=1, label=f"{name}, train")
        upper.plot(
            *zip(*losses.held_out.items(), strict=True),
            "o" if style == "-" else "x",
            color=DTYPES[name],
            label=f"{name}, held out, {list(losses.held_out.values())[-1]:.3f} at the end",
        )
    one, other = (losses.train for losses in runs.values())
    lower.plot(np.arange(1, len(one) + 1), other - one, color="#555555", linewidth=0.8)
    upper.set_title(
        f"{' and '.join(runs)}: losses, train averaged over {WINDOW} steps", loc="left", fontsize=11
    )
    upper.set_ylabel("loss, nats a byte")
    upper.legend(frameon=False)
    first, second = runs
    lower.set_title(f"{second} minus {first}, train, each step", loc="left", fontsize=9)
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True}
)
@click.option("--steps", type=click.IntRange(min=WINDOW), default=300, show_default=True)
@click.option("--eval-every", type=flags.POSITIVE, default=50, show_default=True)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/precision"),
    show_default=True,
    help="The folder for the picture, and one for each run.",
)
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def command(steps: int, eval_every: int, output: Path, more: tuple[str, ...]) -> None:
    """Train in float32 and in bfloat16, from the same seed; MORE are flags of train_lm."""
    arguments = ["--steps", str(steps), "--eval-every", str(eval_every), *more]
    runs = {dtype: train(dtype, arguments, output / dtype) for dtype in DTYPES}
    plot(runs, output / "precision.png")
    click.echo(table(runs))
    click.echo(f"\ntrain losses of a step are at most {largest_gap(runs):.3f} apart")
    click.echo(f"written {output / 'precision.png'}")


def main(args: list[str] | None = None) -> None:
    """Runs the command; a mistake in the flags is one line and exit code 2."""
    flags.run(command, args, name="precision")


if __name__ == "__main__":
    main()
