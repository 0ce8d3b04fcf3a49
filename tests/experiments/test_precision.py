"""The experiment on precision: two small runs, their table and their picture."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments.precision import precision

TINY = (
    "--ranks 2 --layers 2 --width 16 --heads 2 --context 16 --batch-size 8 --microbatches 4 "
    "--eval-batches 2 --learning-rate 0.01 --schedule 1f1b"
)


@pytest.mark.slow
def test_both_learn_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(
        ["--steps", "20", "--eval-every", "10", "--output", str(tmp_path), *TINY.split()]
    )
    runs = {name: precision.read(tmp_path / name / "log.csv") for name in precision.DTYPES}
    single, half = runs.values()
    for losses in runs.values():
        assert len(losses.train) == 20
        assert list(losses.held_out) == [0, 10, 20]
        assert losses.held_out[20] < losses.held_out[0] - 0.5
    # Not the same numbers, but close: bfloat16 rounds to 1 in 256.
    assert 0 < np.abs(single.train - half.train).max() < 0.05
    printed = capsys.readouterr().out
    assert precision.table(runs) in printed
    assert f"| float32 | {single.held_out[0]:.3f} |" in printed
    assert f"at most {precision.largest_gap(runs):.3f} apart" in printed
    assert matplotlib.image.imread(tmp_path / "precision.png")[..., :3].std() > 0.05


def test_table_and_gap() -> None:
    runs = {
        "float32": precision.Losses(train=np.array([3.0, 2.0]), held_out={0: 5.5, 2: 2.25}),
        "bfloat16": precision.Losses(train=np.array([3.0, 2.125]), held_out={0: 5.5, 2: 2.0}),
    }
    assert precision.table(runs).splitlines() == [
        "| step | 0 | 2 |",
        "|---|---:|---:|",
        "| float32 | 5.500 | 2.250 |",
        "| bfloat16 | 5.500 | 2.000 |",
        "| apart | +0.000 | -0.250 |",
    ]
    assert precision.largest_gap(runs) == 0.125


@pytest.mark.slow
def test_mistake_is_told_by_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        precision.main(["--output", str(tmp_path), "--heads", "5"])
    assert exit_.value.code == 2
    error = capfd.readouterr().err
    assert "--width 96: must be divisible by --heads 5" in error
    assert "precision: training in float32 failed" in error
