"""The comparison of schedules, small: its figures are right, its losses agree, it refuses mistakes.

That every schedule's gradients are right is tested elsewhere; here two of them race.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import click
import jax
import matplotlib.image
import numpy as np
import pytest

import dualpipe_jax as dpj
from experiments.compare import measuring, report
from experiments.compare.schedules import main, require_same_losses
from tests.commands import run_script

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("dualpipe", "1f1b")
TINY = (
    "--ranks 2 --steps 3 --microbatches 4 --batch-size 8 --context 16 --layers 2 --width 16 "
    "--heads 2 --schedule dualpipe --schedule 1f1b"
)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the script as a user does, with fake devices of its own."""
    folder = tmp_path_factory.mktemp("compare")
    run_script("compare.schedules", *TINY.split(), output=folder)
    return folder


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_all_learn_the_same(output: Path) -> None:
    losses: dict[str, list[float]] = {}
    for row in rows_of(output / "steps.csv"):
        losses.setdefault(row["schedule"], []).append(float(row["loss"]))
    assert list(losses) == ["sequential", *NAMES]
    plain = losses.pop("sequential")
    assert len(plain) == 3
    # Three steps learn something, or all would agree whatever their gradients are.
    assert plain[0] == pytest.approx(np.log(256), abs=0.2)
    assert plain[-1] < plain[0] - 0.02
    for name, of_schedule in losses.items():
        # Float32 sums in another order; some 1e-7 a step.
        np.testing.assert_allclose(of_schedule, plain, rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_figures_are_the_schedules(output: Path) -> None:
    sequential, *rows = rows_of(output / "schedules.csv")
    assert (sequential["schedule"], sequential["ticks"]) == ("sequential", "")
    assert float(sequential["wall_ratio"]) == float(sequential["cpu_ratio"]) == 1
    assert [row["schedule"] for row in rows] == list(NAMES)
    for row in rows:
        schedule = dpj.schedules.make(row["schedule"], num_ranks=2, num_microbatches=4)
        timeline = schedule.timeline()
        assert int(row["ticks"]) == timeline.num_ticks
        idle = sum(action is None for tick in timeline.actions for action in tick)
        assert float(row["idle_share"]) == pytest.approx(idle / (2 * timeline.num_ticks))
        for kind, number in timeline.num_slots.items():
            assert int(row[f"{kind}_slots"]) == number
        assert float(row["layers_per_stage"]) == 2 / schedule.num_stages
        # Half the layers a device, and activations of a microbatch or two instead of all.
        assert int(row["temporary_bytes"]) < int(sequential["temporary_bytes"])
        assert int(row["argument_bytes"]) < int(sequential["argument_bytes"])
        for figure in ("compile_seconds", "wall_seconds", "cpu_seconds", "wall_ratio", "cpu_ratio"):
            assert float(row[figure]) > 0
        assert float(row["loss_difference"]) < 1e-5


@pytest.mark.slow
def test_the_first_step_is_not_timed(output: Path) -> None:
    steps = [row for row in rows_of(output / "steps.csv") if row["schedule"] == "dualpipe"]
    assert [row["step"] for row in steps] == ["1", "2", "3"]
    assert [bool(row["wall_seconds"]) for row in steps] == [False, True, True]
    (row,) = (r for r in rows_of(output / "schedules.csv") if r["schedule"] == "dualpipe")
    timed = [float(step["wall_seconds"]) for step in steps[1:]]
    assert float(row["wall_seconds"]) == pytest.approx(np.median(timed))


@pytest.mark.slow
def test_the_table_and_the_picture_are_written(output: Path) -> None:
    head, rule, *lines = (output / "schedules.md").read_text().splitlines()
    assert all(line.count("|") == head.count("|") == rule.count("|") for line in lines)
    assert [line.split(" | ")[1] for line in lines] == ["sequential", *NAMES]
    assert "| 2 | dualpipe | 1 | 12 | 0.0% | 2/3/3/1 |" in lines[1]
    picture = matplotlib.image.imread(output / "schedules.png")
    assert picture[..., :3].std() > 0.05  # not blank


def contender(name: str, losses: list[float]) -> measuring.Contender:
    """Makes one that has run, of a program that computes nothing."""
    return measuring.Contender(
        name=name,
        num_ranks=2,
        schedule=None,
        step=jax.jit(lambda: 0).lower().compile(),
        compile_seconds=1.0,
        state=(None, ()),
        losses=losses,
        wall_seconds=[1.0] * (len(losses) - 1),
        cpu_seconds=[1.0] * (len(losses) - 1),
    )


@pytest.mark.parametrize("wrong", [2.001, np.nan])
def test_losses_that_differ_are_an_error(wrong: float) -> None:
    plain, same = contender("sequential", [4.0, 2.0]), contender("1f1b", [4.0, 2.0000001])
    rows = report.summarize([plain, same], num_layers=4)
    assert rows[1].loss_difference == pytest.approx(5e-8)
    require_same_losses(rows)
    rows = report.summarize([plain, same, contender("gpipe", [4.0, wrong])], num_layers=4)
    with pytest.raises(click.ClickException, match=r"by more than 0.0001: gpipe on 2 ranks by"):
        require_same_losses(rows)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--microbatches 3", "--batch-size 16: must be divisible by --microbatches 3"),
        ("--heads 5", "--width 64: must be divisible by --heads 5"),
        ("--schedule zigzag", "Invalid value for '--schedule': 'zigzag' is not one of"),
        ("--layers 12", "--layers 12: fewer than the 16 stages that a schedule has over 8 ranks"),
        ("--ranks 99 --schedule 1f1b --layers 99", "--ranks 99: more than the devices here"),
        ("--ranks 0", "Invalid value for '--ranks': 0 is not in the range x>=1"),
        ("--steps 1", "Invalid value for '--steps': 1 is not in the range x>=2"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(
    flags: str, message: str, refusal: Callable[..., str]
) -> None:
    printed = refusal(main, flags.split(), name="compare")
    assert message in printed


def test_several_bad_flags_are_all_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--microbatches", "3", "--heads", "5", "--layers", "12"])
    printed = capsys.readouterr().err
    for flag in ("--microbatches 3", "--heads 5", "--layers 12"):
        assert flag in printed
