"""Several processes train as one does: the pipeline, the data and the parameters across them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments.train_lm.trainer.log import read_rows
from tests.processes import run

TINY = (
    "-m experiments.train_lm.train_lm --layers 2 --width 16 --heads 2 --context 16 --batch-size 8 "
    "--microbatches 2 --steps 6 --save-every 3 --eval-every 6 --eval-batches 2 "
    "--learning-rate 0.01"
)


def train(flags: str, *, count: int, output: Path) -> list[str]:
    command = [*TINY.split(), "--output", str(output), *flags.split()]
    return run(command, count=count, folder=output.with_name(f"{output.name}-printed"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs one process, uninterrupted."""
    output = tmp_path_factory.mktemp("processes") / "alone"
    train("--ranks 2", count=1, output=output)
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (4, "--ranks 2 --data-devices 2"),
        (2, "--ranks 1 --fsdp-devices 2 --schedule 1f1b"),
    ],
    ids=["pipeline and data over 4", "fsdp over 2"],
)
def test_processes_train_as_one_does(alone: Path, count: int, flags: str, tmp_path: Path) -> None:
    """From a checkpoint that one process has saved; their own is then read by one process."""
    output = tmp_path / "run"
    shutil.copytree(alone, output)
    shutil.rmtree(output / "checkpoints" / "6")
    printed = train(flags, count=count, output=output)
    assert f"in {count} processes" in printed[0]
    assert "resumed   after step 3" in printed[0]
    # Only process 0 prints.
    assert not any(printed[1:])
    want, got = read_rows(alone / "log.csv"), read_rows(output / "log.csv")
    assert [row["step"] for row in got] == list(range(7))
    for name in ("train_loss", "held_out_loss"):
        wanted, found = (
            np.array([row[name] for row in rows if row[name] is not None]) for rows in (want, got)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5)  # float32 in another order
    assert (output / "sample.txt").read_text() == (alone / "sample.txt").read_text()
