"""Losses that are not finite: updates are left out, and too many in a row end the run."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.runs import (
    ONE,
    command,
    complete_steps,
    printed,
    require_every_step_once,
    resumed_after,
)
from tests.processes import started


def end(flags: str, output: Path, folder: Path) -> tuple[int, str]:
    """Runs to the end; gives the exit code and the output."""
    folder.mkdir()
    with started(command(flags, output), count=1, folder=folder) as (process,):
        return process.wait(timeout=150), printed(folder)


def test_too_many_in_a_row_end_the_run(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """A learning rate that no model stands; the state before the first skip is saved."""
    output = tmp_path / "run"
    flags = f"{ONE} --steps 30 --save-every 50 --learning-rate 1e30"
    code, text = end(f"{flags} --max-skips 3", output, tmp_path / "first")
    assert code == 1, text
    found = re.search(r"not finite, 3 steps in a row until step (\d+)", text)
    assert found, text
    last = int(found[1])
    assert "Traceback" not in text
    assert complete_steps(output) == [last]
    rows = require_every_step_once(output, last=last)
    assert [row["skipped"] for row in rows[-4:]] == [0, 1, 2, 3]
    assert not np.isfinite([row["train_loss"] for row in rows[-3:]]).any()
    assert text.count("the update is left out") == 3

    # Allowed more, it goes on from the saved state, which is as it was; and ends in the same way.
    code, text = end(f"{flags} --max-skips 5", output, tmp_path / "second")
    assert code == 1
    assert resumed_after(text) == last
    assert f"5 steps in a row until step {last + 2}" in text
    figure(f"Not finite: the run ended after 3 skips in a row, its state saved as step {last}")
