"""A checkpoint resumes bit for bit, and on any other schedule, ranks and mesh but for rounding."""

from pathlib import Path

import numpy as np
import pytest

from tests.experiments.trainer_jobs import (
    SEQUENTIAL,
    copy_until,
    facts_of,
    make_job,
    make_settings,
    rows_of,
    run_job,
)

LOSSES = ("train_loss", "held_out_loss")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs DualPipe over four ranks, six steps, uninterrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    run_job(make_job("dualpipe", {"pipe": 4}, microbatches=4), make_settings(output))
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "sizes"),
    [
        ("1f1b", {"pipe": 2}),
        ("dualpipev", {"pipe": 8}),
        ("zb-h1", {"pipe": 2, "fsdp": 4}),
        ("interleaved-1f1b", {"pipe": 2, "data": 2, "fsdp": 2}),
        ("gpipe", {"pipe": 1}),
        (SEQUENTIAL, {"pipe": 1}),
    ],
    ids=str,
)
def test_resumes_elsewhere(
    whole: Path, schedule: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    output = copy_until(whole, tmp_path / "run", step=3)
    printed = run_job(make_job(schedule, sizes, microbatches=2), make_settings(output))
    assert f"resumed   after step 3, from {output / 'checkpoints' / '3'}" in printed
    want, got = rows_of(whole), rows_of(output)
    assert [row["step"] for row in got] == list(range(7))
    for name in LOSSES:
        wanted, found = (
            np.array([row[name] for row in rows if row[name] is not None]) for rows in (want, got)
        )
        # float32: sums over microbatches and shards in another order. Losses are about 5.
        np.testing.assert_allclose(found, wanted, rtol=3e-6)
        largest = np.abs(found / wanted - 1).max()
        print(f"{schedule} {sizes}: {name} differs by {largest:.1e}")  # the docs' table
    moved = sum(row["train_loss"] for row in want[1:4]) - sum(row["train_loss"] for row in want[4:])
    assert moved > 0.01  # it learns, so that a state that was not restored would show


@pytest.mark.slow
def test_resumes_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    """Same ranks, same program: not a bit of parameters, moments or log differs."""
    output = copy_until(whole, tmp_path / "run", step=3)
    run_job(make_job("dualpipe", {"pipe": 4}, microbatches=4), make_settings(output))
    for name in (*LOSSES, "grad_norm", "learning_rate"):
        assert [row[name] for row in rows_of(output)] == [row[name] for row in rows_of(whole)]
    for name in ("digest", "data", "step"):
        assert facts_of(output, 6)[name] == facts_of(whole, 6)[name]
    assert facts_of(whole, 3)["digest"] != facts_of(whole, 6)["digest"]
