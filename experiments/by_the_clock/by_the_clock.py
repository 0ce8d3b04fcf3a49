"""Times a step of every schedule over processes that sleep, and compares it with its prediction.

In: flags. Out, in a folder: clock.csv, table.md, clock.png. See README.md beside it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click
import numpy as np
from rich.console import Console

import dualpipe_jax as dpj
from experiments import tables
from experiments.by_the_clock import picture, processes, report, tasks
from experiments.progress import bar
from experiments.train_lm import flags
from experiments.train_lm.flags import POSITIVE, PositiveFloat


@flags.script("by_the_clock")
@click.option(
    "--ranks",
    type=click.IntRange(min=2),
    multiple=True,
    default=(2, 4, 8),
    help="Processes of the pipeline; once for each number to measure.",
)
@flags.several(
    "--schedules",
    "names",
    dpj.schedules.names(),
    default=dpj.schedules.names(),
    text="To measure.",
)
@click.option(
    "--csv",
    "paths",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    multiple=True,
    help="An order to measure instead of the named schedules, of as many ranks as --ranks.",
)
@click.option("--repeats", type=POSITIVE, default=3, help="Measured steps of each.")
@click.option(
    "--scale", type=PositiveFloat(), default=1.0, help="By which all sleeps are multiplied."
)
@flags.output("runs/by_the_clock", results="the figures, the table and the picture")
def main(
    *,
    ranks: tuple[int, ...],
    names: tuple[str, ...],
    paths: tuple[Path, ...],
    repeats: int,
    scale: float,
    output: Path,
) -> None:
    """Time a step of every schedule by the clock, and compare it with its prediction.

    Every rank is a process that sleeps for as long as its work is to take; sleeping needs no core.
    """
    flags.refuse(
        {f"--csv {path}: must end with {tasks.CSV}": path.suffix != tasks.CSV for path in paths}
    )
    names = tuple(str(path.resolve()) for path in paths) or names
    ranks, names = tuple(sorted(set(ranks))), tuple(dict.fromkeys(names))
    with flags.refusing(f"--ranks {max(ranks)}"):
        all_tasks = [
            tasks.make_task(names, num_ranks=num_ranks, scale=scale, repeats=repeats)
            for num_ranks in ranks
        ]
    flags.make_folder(output)
    console = Console(highlight=False)
    rows: list[report.Row] = []
    total = sum(len(task.programs) for task in all_tasks) * (1 + len(tasks.COSTS))
    with bar(console) as progress:
        bar_task = progress.add_task("", total=total, label="")
        for task in all_tasks:

            def show(text: str, *, done: int, task: tasks.Task = task) -> None:
                progress.update(bar_task, label=f"{task.num_ranks} ranks: {text}", advance=done)

            try:
                measured = list(measure(task, show))
            except processes.WorkerError as error:
                raise click.ClickException(f"{task.num_ranks} ranks: {error}") from error
            made = make_rows(measured, num_ranks=task.num_ranks, scale=scale)
            rows += made
            for _, _, group in report.groups(made):
                console.print(report.to_terminal(group))
                console.print(report.describe_faster(group), soft_wrap=True)
    # Seconds to the tenth of a millisecond.
    tables.write_csv(rows, output / "clock.csv", form=".4f")
    # With the digits of the CSV, from which the table can be made again.
    rows = tables.read_csv(report.Row, output / "clock.csv")
    (output / "table.md").write_text(report.to_markdown(rows))
    picture.plot(rows, output / "clock.png")
    console.print(f"written   {output}: clock.csv, table.md, clock.png")
    require_possible(rows)


def measure(task: tasks.Task, show: Callable[..., None]) -> Iterator[tasks.Measured]:
    """Runs the workers of a task; gives their measurements, and shows which program is on."""
    with processes.measuring(task) as answers:
        for program in task.programs:
            show(f"compiling {program}", done=0)
            for _ in range(1 + len(task.sleeps)):
                yield next(answers)
                show(str(program), done=1)
        assert next(answers, None) is None, "workers end after the last program, without a failure"


def make_rows(
    measured: Sequence[tasks.Measured], *, num_ranks: int, scale: float
) -> list[report.Row]:
    """Puts the predictions beside the medians of the clock, costs by costs."""
    medians = {
        (each.schedule, each.overlap, each.costs): float(np.median(each.seconds))
        for each in measured
    }
    rows = []
    for name in tasks.COSTS:
        costs = tasks.scaled_costs(name, num_ranks=num_ranks, scale=scale)
        for schedule, overlap in dict.fromkeys((m.schedule, m.overlap) for m in measured):
            program = tasks.Program(schedule=schedule, overlap=overlap)
            simulation = tasks.predict(program, costs, num_ranks=num_ranks)
            rows.append(
                report.Row(
                    ranks=num_ranks,
                    costs=name,
                    schedule=str(tasks.Program(schedule=schedule, overlap=False)),
                    overlap=overlap,
                    full_backward=not simulation.execution.split_backward,
                    clock=medians[schedule, overlap, name],
                    predicted=simulation.makespan,
                    ideal=simulation.dependency_makespan,
                    work=sum(simulation.work) / num_ranks,
                    without_sleeps=medians[schedule, overlap, tasks.NO_SLEEPS],
                )
            )
    return rows


def require_possible(rows: Sequence[report.Row]) -> None:
    """Raises if a step was faster than any that sleeps one action at a time can be."""
    wrong = [
        f"{row.program} on {row.ranks} ranks {row.costs}: {row.clock:.4f} s, "
        f"ideal {row.ideal:.4f} s"
        for row in rows
        if not row.clock >= row.ideal  # not <, so that NaN is wrong
    ]
    if wrong:
        raise click.ClickException(
            f"FASTER THAN THE IDEAL, so a rank's sleeps overlapped, or the replay's order is not "
            f"the program's; nothing measured here counts: {'; '.join(wrong)}"
        )


if __name__ == "__main__":
    main()
