"""SIGKILL at random moments, also in the middle of a save; then the run equals one without it."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from experiments.train_lm.trainer.log import read_rows
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
    unfinished_steps,
    wait_until,
)
from tests.processes import started

SAVE_EVERY = 5
FLAGS = f"{ONE} --steps {ENDLESS} --save-every {SAVE_EVERY} --log jsonl,tensorboard"
# The moments of 20 rounds: in a save, in a step after the first new one, at any time of the start.
MOMENTS = ["save"] * 10 + ["step"] * 7 + ["start"] * 3
SEED = int(os.environ.get("FAULTS_SEED", "0"))


def test_killed_twenty_times_equals_never(tmp_path: Path, figure: Callable[[str], None]) -> None:
    print(f"FAULTS_SEED={SEED}")
    random_draws = random.Random(SEED)
    moments = random_draws.sample(MOMENTS, len(MOMENTS))
    output = tmp_path / "run"
    lost, torn = [], 0
    begin = time.monotonic()
    for number, moment in enumerate(moments):
        folder = tmp_path / f"round-{number}"
        folder.mkdir()
        newest = max(complete_steps(output), default=0)
        was_torn = bool(unfinished_steps(output))
        with started(command(FLAGS, output), count=1, folder=folder) as (process,):
            kill(process, moment, output, folder, random_draws)
        text = printed(folder)
        if "resumed" in text or moment != "start":
            # From the newest complete one, torn ones beside it or not.
            assert resumed_after(text) == newest, text
            assert not list((output / "broken-checkpoints").glob("*")), text
        torn += bool(unfinished_steps(output))
        if moment != "start":
            lost.append(last_step(output) - max(complete_steps(output), default=0))
        print(f"{moment}, after {newest}: torn {was_torn}, reached {last_step(output)}")
    # A save has ended before the next one begins.
    assert max(lost) <= 2 * SAVE_EVERY + 1, lost
    assert torn >= 5, "hardly a save was hit"
    seconds = time.monotonic() - begin
    figure(
        f"SIGKILL: {len(moments)} rounds in {seconds:.0f} s (FAULTS_SEED={SEED}), {torn} in the "
        f"middle of a save; steps lost: {max(lost)} at most, saved every {SAVE_EVERY}"
    )
    last = stop_after(output, tmp_path / "end", rows=last_step(output) + 3)
    assert unfinished_steps(output) == []
    reference = tmp_path / "reference"
    stop_after(reference, tmp_path / "reference-printed", rows=last + 1)
    rows = require_every_step_once(output, last=last)
    assert figures_of(rows) == figures_of(read_rows(reference / "log.csv")[: last + 1])
    shared = set(complete_steps(output)) & set(complete_steps(reference))
    assert all(facts_of(output, s)["digest"] == facts_of(reference, s)["digest"] for s in shared)


def kill(
    process: subprocess.Popen[str],
    moment: str,
    output: Path,
    folder: Path,
    random_draws: random.Random,
) -> None:
    """Kills the process at a moment of a kind."""
    if moment == "start":
        time.sleep(random_draws.uniform(0.2, 8))
    else:
        wait_until(lambda: "compiled" in printed(folder), [process], folder=folder)
        before = max(complete_steps(output), default=0)
        wait_until(has_rows(output, before + 2), [process], folder=folder)
        if moment == "save":
            wait_until(lambda: unfinished_steps(output), [process], folder=folder)
            time.sleep(random_draws.uniform(0, 0.03))
        else:
            time.sleep(random_draws.uniform(0, 1.5))
    process.kill()
    process.wait(timeout=30)


def stop_after(output: Path, folder: Path, *, rows: int) -> int:
    """Runs until the log has so many rows, then stops it by SIGTERM; gives the last step."""
    folder.mkdir()
    with started(command(FLAGS, output), count=1, folder=folder) as (process,):
        wait_until(has_rows(output, rows), [process], folder=folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, printed(folder)
    last = last_step(output)
    assert f"stopped   by SIGTERM after step {last}, which is saved" in printed(folder)
    assert max(complete_steps(output)) == last
    return last
