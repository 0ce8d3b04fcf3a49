"""The clock, small: two ranks run the whole command, and no worker is left whatever happens."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import jax
import matplotlib.image
import numpy as np
import pytest

import dualpipe_jax as dpj
from experiments import tables
from experiments.by_the_clock import processes, report, sleeping, steps, tasks
from experiments.by_the_clock.by_the_clock import main, make_rows, require_possible
from tests.commands import run_script

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "by_the_clock"
TINY = "--ranks 2 --schedules dualpipe --repeats 1 --scale 0.05"


def task_of(*programs: tuple[str, bool]) -> tasks.Task:
    made = [tasks.Program(schedule=name, overlap=overlap) for name, overlap in programs]
    sleeps = {"tiny": dict.fromkeys(tasks.ACTIONS, 0.001)}
    return tasks.Task(num_ranks=2, programs=tuple(made), sleeps=sleeps, repeats=1)


def row(schedule: str = "1f1b", **fields: Any) -> report.Row:
    figures: dict[str, Any] = {
        "ranks": 4,
        "costs": "with remat",
        "overlap": False,
        "full_backward": False,
        "clock": 4.5,
        "predicted": 4.4,
        "ideal": 3.6,
        "work": 3.0,
        "without_sleeps": 0.1,
    }
    return report.Row(schedule=schedule, **{**figures, **fields})


@pytest.mark.slow
def test_it_writes_figures_table_and_picture(tmp_path: Path) -> None:
    said = run_script("by_the_clock.by_the_clock", *TINY.split(), output=tmp_path)
    rows = tables.read_csv(report.Row, tmp_path / "clock.csv")
    assert [(row.costs, row.overlap) for row in rows] == [
        (costs, overlap) for costs in tasks.COSTS for overlap in (False, True)
    ]
    schedule = dpj.schedules.make("dualpipe", num_ranks=2, num_microbatches=8)
    for row in rows:
        costs = tasks.COSTS[row.costs]
        work = 0.05 * 8 * (costs.forward + costs.input_grad + costs.weight_grad)
        assert row.work == pytest.approx(work, abs=1e-4)  # as many digits are written
        simulation = dpj.simulate(
            schedule,
            costs=costs,
            num_layers=4,
            execution=dpj.Execution(overlap=row.overlap, split_backward=not row.full_backward),
            placed_by=costs,
        )
        assert row.predicted == pytest.approx(0.05 * simulation.makespan, abs=1e-4)
        assert row.ideal == pytest.approx(0.05 * simulation.dependency_makespan, abs=1e-4)
        assert f"2 ranks, {row.costs}: clock / work: dualpipe" in said
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(rows)
    picture = matplotlib.image.imread(tmp_path / "clock.png")
    assert picture[..., :3].std() > 0.05  # not blank


@pytest.mark.slow
def test_a_workers_error_is_the_drivers() -> None:
    task = task_of(("zigzag", False))
    with (
        processes.measuring(task) as answers,
        pytest.raises(
            processes.WorkerError, match=r"rank \d: ValueError: schedule='zigzag': must be one of"
        ),
    ):
        next(answers)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Lists the processes that are started."""
    processes_of_test: list[subprocess.Popen[bytes]] = []
    start: Any = subprocess.Popen

    def note(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        processes_of_test.append(start(*args, **options))
        return processes_of_test[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", note)
    return processes_of_test


@pytest.mark.parametrize("mistake", [KeyboardInterrupt, ValueError])
def test_no_worker_is_left_by_an_error_of_the_driver(
    mistake: type[BaseException], started: list[subprocess.Popen[bytes]]
) -> None:
    with pytest.raises(mistake), processes.measuring(task_of(("1f1b", False))):
        raise mistake
    assert [process.returncode for process in started] == [-9, -9]


@pytest.mark.slow
def test_a_killed_worker_is_named(started: list[subprocess.Popen[bytes]]) -> None:
    with processes.measuring(task_of(("1f1b", False), ("gpipe", False))) as answers:
        next(answers)
        started[1].kill()
        with pytest.raises(processes.WorkerError, match="rank 1: ended by signal 9"):
            list(answers)
    assert None not in [process.returncode for process in started]


@pytest.mark.slow
def test_a_worker_ends_when_its_driver_is_gone() -> None:
    task = json.dumps(tasks.to_dict(task_of(("1f1b", False))))
    # Rank 1, which waits for a rank 0 that never comes.
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.by_the_clock.worker", task, "1", "127.0.0.1:1"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.communicate(timeout=60) == (b"", None)
    assert process.returncode == 1


def test_a_wrong_loss_and_a_lost_sleep_are_errors() -> None:
    program = tasks.Program(schedule="1f1b", overlap=False)
    steps.require_right(program, loss=(1.0000001, 1.0), num_sleeps=(48, 48))
    with pytest.raises(RuntimeError, match=r"1f1b: the loss is 1.01, must be 1"):
        steps.require_right(program, loss=(1.01, 1.0), num_sleeps=(48, 48))
    with pytest.raises(RuntimeError, match="the loss is nan"):
        steps.require_right(program, loss=(np.nan, 1.0), num_sleeps=(48, 48))
    with pytest.raises(RuntimeError, match="a rank slept 47 times, must be 48"):
        steps.require_right(program, loss=(1.0, 1.0), num_sleeps=(47, 48))


def test_the_model_has_its_loss_its_gradients_and_its_sleeps() -> None:
    device = sleeping.Device()
    model = sleeping.make_model(device)
    params, batch = sleeping.make_arguments(num_layers=3, num_microbatches=2)
    step = jax.jit(jax.value_and_grad(dpj.sequential(model, num_microbatches=2)))
    loss, grads = jax.block_until_ready(step(params, batch))
    expected = sleeping.loss_of(params, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert device.num_sleeps == 3 * 3 * 2
    # A layer's weights are factors of the loss, so sum(weights * grad) is the loss again.
    products = (np.asarray(grads["blocks"]) * params["blocks"]).sum(axis=1)
    np.testing.assert_allclose(products, expected, rtol=1e-5)


def test_actions_sleep_less_by_the_time_of_their_callbacks(monkeypatch: pytest.MonkeyPatch) -> None:
    device, slept = sleeping.Device(), []
    device.calibrate(1e-3)
    assert 0 < device.callback < 0.1
    monkeypatch.setattr(sleeping.time, "sleep", slept.append)
    for seconds in (1.0, 0.0):
        device.seconds = dict.fromkeys(tasks.ACTIONS, seconds)
        value = np.arange(4, dtype=np.float32)
        assert (jax.jit(device.taking("forward"))(value) == value).all()
    assert slept == [1.0 - device.callback, 0.0]


def test_programs_are_those_that_differ_and_sleeps_are_a_layers() -> None:
    names = dpj.schedules.names()
    task = tasks.make_task(names, num_ranks=8, scale=2.0, repeats=3)
    with_overlap = [program.schedule for program in task.programs if program.overlap]
    assert with_overlap == ["interleaved-paired", "dualpipe", "dualpipev"]
    without = [program.schedule for program in task.programs if not program.overlap]
    assert without == list(names)
    # Two layers a rank, and half of all from 8 ranks on.
    assert task.sleeps["with remat"] == {
        "forward": 0.025,
        "input_grad": 0.052,
        "weight_grad": 0.021,
    }
    assert tasks.Task.from_dict(json.loads(json.dumps(tasks.to_dict(task)))) == task


def test_orders_of_files_are_measured(tmp_path: Path, refusal: Callable[..., str]) -> None:
    path = tmp_path / "found.csv"
    made = dpj.schedules.zb_h1(num_ranks=2, num_microbatches=8)
    path.write_text(made.to_csv())
    (program,) = tasks.make_task([str(path)], num_ranks=2, scale=1.0, repeats=1).programs
    assert str(program) == "found"
    costs = tasks.COSTS["with remat"]
    named = tasks.Program(schedule="zb-h1", overlap=False)
    found, expected = (tasks.predict(each, costs, num_ranks=2) for each in (program, named))
    assert dataclasses.replace(found, schedule="", published_bubble=None) == dataclasses.replace(
        expected, schedule="", published_bubble=None
    )
    arguments = ["--csv", str(path), "--ranks", "4", "--output", str(tmp_path / "out")]
    printed = refusal(main, arguments, name="by_the_clock")
    assert "has 2 ranks and 8 microbatches, must have 4 and 16" in printed


def measured() -> Iterator[tasks.Measured]:
    for overlap, seconds in ((False, [9.0, 5.0, 4.0]), (True, [4.0, 4.0, 4.1])):
        made = tasks.Measured(
            schedule="dualpipe", overlap=overlap, costs=tasks.NO_SLEEPS, seconds=[0.5]
        )
        yield made
        for costs in tasks.COSTS:
            yield dataclasses.replace(made, costs=costs, seconds=seconds)


def test_rows_have_medians_and_predictions() -> None:
    rows = make_rows(list(measured()), num_ranks=4, scale=1.0)
    assert [row.clock for row in rows] == [5.0, 4.0, 5.0, 4.0]
    assert [row.without_sleeps for row in rows] == [0.5] * 4
    assert [row.costs for row in rows[::2]] == list(tasks.COSTS)
    for row in rows:
        # Sums in different orders differ in their last bits.
        assert row.work < row.ideal * (1 + 1e-9) < row.predicted * (1 + 2e-9)
    assert rows[0].work == pytest.approx(16 * (0.05 + 0.104 + 0.042))


def test_the_table_the_line_and_the_figures_are_the_rows(tmp_path: Path) -> None:
    rows = [row(), row("dualpipe"), row("dualpipe", overlap=True, clock=3.3)]
    lines = report.to_markdown(rows).splitlines()
    assert lines[2] == (
        "| 1f1b | no | split | 4 | with remat | 4.500 | 4.400 | 3.600 | 1.023 | 1.250 | 1.500 |"
    )
    assert len({line.count("|") for line in lines}) == 1
    assert (
        report.describe_faster(rows)
        == "4 ranks, with remat: clock / work: 1f1b 1.50, dualpipe (overlap) 1.10"
    )
    tables.write_csv(rows, tmp_path / "clock.csv", form=".4f")
    assert tables.read_csv(report.Row, tmp_path / "clock.csv") == rows


def test_a_step_faster_than_the_ideal_is_an_error() -> None:
    require_possible([row(), row(clock=3.6)])
    with pytest.raises(click.ClickException, match=r"FASTER THAN THE IDEAL.*: gpipe on 4"):
        require_possible([row(), row("gpipe", clock=3.5999)])
    with pytest.raises(click.ClickException, match="on 4 ranks with remat: nan s"):
        require_possible([row(clock=np.nan)])


def test_the_page_has_the_table_of_the_committed_figures() -> None:
    rows = tables.read_csv(report.Row, FOLDER / "clock.csv")
    assert report.to_markdown(rows) in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--ranks 1", "Invalid value for '--ranks': 1 is not in the range x>=2"),
        ("--schedules zigzag", "Invalid value for '--schedules': 'zigzag' is not one of 'gpipe',"),
        ("--repeats 0", "Invalid value for '--repeats': 0 is not in the range x>=1"),
        ("--scale 0", "Invalid value for '--scale': 0.0 is not in the range x>0"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, refusal: Callable[..., str]
) -> None:
    printed = refusal(main, flags.split(), name="by_the_clock")
    assert message in printed
