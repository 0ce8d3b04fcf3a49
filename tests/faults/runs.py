"""Starts the training script, watches its files, and reads the rest of a run after a fault."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX.proto import event_pb2

from experiments.train_lm.trainer.log import Row, read_rows

ROOT_TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
MODULE = "experiments.train_lm.train_lm"
# Small, and quick to trace: faults are the trainer's matter, not the schedule's.
MODEL = "--layers 4 --width 16 --heads 2 --context 16 --batch-size 8 --microbatches 2"
TINY = f"{MODEL} --eval-every 20 --eval-batches 2 --learning-rate 0.01"
ONE = f"{TINY} --ranks 2 --schedule 1f1b"
ENDLESS = 100_000  # steps of a run that a signal ends
# Seconds that a start may take, on a machine that is busy otherwise.
PATIENCE = 150.0
# Figures that two runs share to the bit; the others are times.
FIGURES = ("step", "train_loss", "held_out_loss", "learning_rate", "grad_norm", "skipped")


def command(flags: str, output: Path) -> list[str]:
    """Makes the arguments of Python for a run."""
    return ["-m", MODULE, *flags.split(), "--output", str(output)]


def wait_until(
    happened: Callable[[], Any],
    processes: Sequence[subprocess.Popen[str]],
    *,
    folder: Path,
    seconds: float = PATIENCE,
) -> Any:
    """Waits until something has happened, while all processes live; gives the result."""
    end = time.monotonic() + seconds
    while not (result := happened()):
        codes = [process.poll() for process in processes]
        assert codes == [None] * len(processes), (codes, printed(folder))
        assert time.monotonic() < end, printed(folder)
        time.sleep(0.005)
    return result


def has_rows(output: Path, count: int) -> Callable[[], bool]:
    """Makes a condition: the log has so many rows."""
    return lambda: (output / "log.csv").exists() and last_step(output) + 1 >= count


def last_step(output: Path) -> int:
    """Reads the step of the last row of the log; -1 without one."""
    rows = read_rows(output / "log.csv")
    return rows[-1]["step"] if rows else -1


def complete_steps(output: Path) -> list[int]:
    """Lists the steps of the complete checkpoints, ascending."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def unfinished_steps(output: Path) -> list[int]:
    """Lists the steps of saves that are under way, or that a fault has cut short."""
    folder = output / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(int(name.split(".")[0]) for name in names if "orbax-checkpoint-tmp" in name)


def printed(folder: Path) -> str:
    """Reads the output of all processes."""
    paths = sorted(folder.glob("process-*.txt"))
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')}" for path in paths)


def resumed_after(text: str) -> int:
    """Finds the step after which a run says that it has resumed; 0 where it begins."""
    found = re.search(r"resumed   after step (\d+)", text)
    return int(found[1]) if found else 0


def facts_of(output: Path, step: int) -> dict[str, Any]:
    """Reads the facts of a checkpoint."""
    return json.loads((output / "checkpoints" / str(step) / "facts" / "metadata").read_text())


def figures_of(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Keeps the figures that do not depend on the time, to the bit, NaN as a text."""
    return [{name: repr(row.get(name)) for name in FIGURES} for row in rows]


def require_every_step_once(output: Path, *, last: int) -> list[Row]:
    """Requires a row for each step in every log of a run; gives those of the CSV."""
    rows = read_rows(output / "log.csv")
    steps = list(range(last + 1))
    assert [row["step"] for row in rows] == steps
    if (output / "log.jsonl").exists():
        lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == steps
        # Nine digits, as in the CSV, or all.
        losses = np.array([line.get("train_loss", np.nan) for line in lines], np.float32)
        logged = [np.nan if (x := row["train_loss"]) is None else x for row in rows]
        np.testing.assert_array_equal(losses, np.array(logged, np.float32))
    if (output / "tensorboard").exists():
        assert [event.step for event in read_events(output / "tensorboard")] == steps
    return rows


def read_events(folder: Path) -> list[Any]:
    """Reads events as TensorBoard does: at each start it drops those of later steps."""
    found: list[Any] = []
    events: Any = event_pb2
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            event = events.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField("session_log"):
                found = [before for before in found if before.step < event.step]
            elif event.summary.value:
                found.append(event)
    return found
