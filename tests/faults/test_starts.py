"""Signals, starts again, and losses that are not finite."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.runs import (
    ENDLESS,
    ONE,
    command,
    complete_steps,
    facts_of,
    figures_of,
    has_rows,
    last_step,
    printed,
    require_every_step_once,
    resumed_after,
    wait_until,
)
from tests.processes import started


def start(flags: str, output: Path, folder: Path) -> tuple[int, str]:
    """Runs to the end; gives the exit code and the output."""
    folder.mkdir()
    with started(command(flags, output), count=1, folder=folder) as (process,):
        code = process.wait(timeout=180)
    return code, printed(folder)


def test_sigterm_saves_and_ends(tmp_path: Path, figure: Callable[[str], None]) -> None:
    output = tmp_path / "run"
    with started(
        command(f"{ONE} --steps {ENDLESS} --save-every {ENDLESS}", output), count=1, folder=tmp_path
    ) as (process,):
        wait_until(has_rows(output, 10), [process], folder=tmp_path)
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, printed(tmp_path)
    seconds = time.monotonic() - begin
    assert complete_steps(output) == [last_step(output)]
    require_every_step_once(output, last=last_step(output))
    figure(f"SIGTERM: saved and ended after {seconds:.1f} s")


def test_two_runs_with_one_seed_and_starts_again(tmp_path: Path) -> None:
    """Bit for bit; then an ended run, other flags, more steps, and --fresh."""
    flags = f"{ONE} --save-every 4 --log jsonl"
    first, second = tmp_path / "first", tmp_path / "second"
    for output in (first, second):
        code, text = start(f"{flags} --steps 8", output, tmp_path / f"{output.name}-0")
        assert code == 0, text
    rows = [figures_of(require_every_step_once(output, last=8)) for output in (first, second)]
    assert rows[0] == rows[1]
    assert facts_of(first, 8)["digest"] == facts_of(second, 8)["digest"]
    code, text = start(f"{flags} --steps 8", first, tmp_path / "ended")
    assert code == 0
    assert "after 8 steps; a larger --steps goes on, --fresh starts anew" in text
    other = f"{flags} --steps 8".replace("--width 16", "--width 32") + " --seed 1"
    code, text = start(other, first, tmp_path / "other")
    assert code == 2
    assert "(--seed: 0 -> 1; --width: 16 -> 32)" in text
    code, text = start(f"{flags} --steps 12", first, tmp_path / "more")
    assert code == 0, text
    assert "--steps: 8 -> 12 (the decay of the learning rate changes with it)" in text
    assert resumed_after(text) == 8
    require_every_step_once(first, last=12)
    code, text = start(f"{flags} --steps 8 --fresh --seed 1", first, tmp_path / "fresh")
    assert code == 0, text
    assert resumed_after(text) == 0
    assert figures_of(require_every_step_once(first, last=8)) != rows[0]
    assert complete_steps(tmp_path / "first.1") == [4, 8, 12]  # moved aside, whole


def test_losses_that_are_not_finite(tmp_path: Path, figure: Callable[[str], None]) -> None:
    """The first update is too large for the second step: it and the next ones are left out."""
    flags = ONE.replace("--learning-rate 0.01", "--learning-rate 1e30")
    flags += " --steps 50 --log jsonl,tensorboard"
    output = tmp_path / "run"
    code, text = start(f"{flags} --max-skips 4", output, tmp_path / "first")
    assert code == 1
    assert "step 2: the loss or a gradient is not finite (loss nan)" in text
    assert "not finite, 4 steps in a row until step 5" in text
    assert complete_steps(output) == [5]
    rows = require_every_step_once(output, last=5)
    assert [row["skipped"] for row in rows[1:]] == [0, 1, 2, 3, 4]
    code, text = start(f"{flags} --max-skips 6", output, tmp_path / "second")
    assert code == 1
    assert "not finite, 6 steps in a row until step 7" in text  # counted across the start
    assert facts_of(output, 5)["digest"][1:] != facts_of(output, 7)["digest"][1:]  # the counters
    figure("Not finite: --max-skips 4 ended at the fourth in a row, 6 at the sixth")
