"""Runs with different bias rates side by side: their last figures, and one picture of all.

In: the folders of runs. Out: training.png. See README.md beside it.
"""

from pathlib import Path

import click

from experiments.deepseek_mini import report
from experiments.train_lm import flags
from experiments.train_lm.flags import Refusal
from experiments.train_lm.trainer.folder import CONFIG, read_config
from experiments.train_lm.trainer.log import CSV, read_rows


@flags.script("balance")
@click.argument("runs", type=click.Path(exists=True, file_okay=False, path_type=Path), nargs=-1)
@flags.output("runs/deepseek_mini", results="the picture")
def main(*, runs: tuple[Path, ...], output: Path) -> None:
    """Compare runs of deepseek_mini."""
    if not runs:
        raise Refusal("RUNS: name the folders of one run or more")
    flags.make_folder(output)
    rows = {}
    for run in runs:
        config = read_config(run / CONFIG, flag="RUNS")
        rows[f"bias rate {config['bias-rate']:g}"] = read_rows(run / CSV)
    for label, lines in rows.items():
        click.echo(f"{label}: {report.summary(lines)}")
    report.plot(rows, output / "training.png", title="deepseek_mini")
    click.echo(f"written   {output}: training.png")


if __name__ == "__main__":
    main()
