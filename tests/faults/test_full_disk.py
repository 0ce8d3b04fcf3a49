"""A full disk: the error names path and bytes, the last good checkpoint stays, the run goes on."""

import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.runs import (
    ENDLESS,
    ONE,
    command,
    complete_steps,
    has_rows,
    last_step,
    printed,
    require_every_step_once,
    resumed_after,
    wait_until,
)
from tests.processes import started

FLAGS = f"{ONE} --steps {ENDLESS} --save-every 5 --log jsonl,tensorboard"
TMPFS, LIMIT = "a small tmpfs", "RLIMIT_FSIZE"


class Disk:
    """A disk that can be full: a tmpfs, or files that may not grow where none can be mounted."""

    def __init__(self, folder: Path, *, kind: str):
        self.folder = folder
        self.kind = kind
        folder.mkdir()
        if kind == TMPFS:
            mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
            try:
                subprocess.run(mount, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError):
                self.kind = LIMIT

    def fill(self, process: subprocess.Popen[str]) -> None:
        if self.kind == LIMIT:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**15, resource.RLIM_INFINITY))
            return
        with (self.folder / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def empty(self, process: subprocess.Popen[str]) -> None:
        if self.kind == LIMIT:
            infinity = resource.RLIM_INFINITY
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (infinity, infinity))
        else:
            (self.folder / "filler").unlink()


@contextmanager
def disk(folder: Path, kind: str) -> Iterator[Disk]:
    made = Disk(folder, kind=kind)
    try:
        yield made
    finally:
        if made.kind == TMPFS:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kind", [TMPFS, LIMIT])
def test_a_full_disk(kind: str, tmp_path: Path, figure: Callable[[str], None]) -> None:
    with disk(tmp_path / "disk", kind) as small:
        output = small.folder / "run"
        goes_on(output, small, tmp_path / "continue")
        newest = stops(output, small, tmp_path / "stop")
        # Started again when there is room.
        folder = tmp_path / "again"
        folder.mkdir()
        rows = last_step(output) + 4  # more than the rows that were left
        with started(command(FLAGS, output), count=1, folder=folder) as (process,):
            wait_until(has_rows(output, rows), [process], folder=folder)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, printed(folder)
        assert resumed_after(printed(folder)) == newest
        require_every_step_once(output, last=last_step(output))
        figure(f"A full disk ({small.kind}): went on, and stopped, as --on-save-error says")


def goes_on(output: Path, small: Disk, folder: Path) -> None:
    """The run takes steps while the disk is full, and saves when there is room again."""
    folder.mkdir()
    flags = f"{FLAGS} --on-save-error continue"
    with started(command(flags, output), count=1, folder=folder) as (process,):
        wait_until(lambda: complete_steps(output), [process], folder=folder)
        small.fill(process)
        wait_until(lambda: "training goes on" in printed(folder), [process], folder=folder)
        wait_until(lambda: "cannot be saved" in printed(folder), [process], folder=folder)
        newest = max(complete_steps(output))
        small.empty(process)
        wait_until(lambda: max(complete_steps(output)) > newest, [process], folder=folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, printed(folder)
    require_named(printed(folder), output)
    require_every_step_once(output, last=last_step(output))


def stops(output: Path, small: Disk, folder: Path) -> int:
    """The run ends with the error; gives the newest checkpoint, which is whole."""
    folder.mkdir()
    before = max(complete_steps(output))
    with started(command(FLAGS, output), count=1, folder=folder) as (process,):
        wait_until(lambda: max(complete_steps(output)) > before, [process], folder=folder)
        small.fill(process)
        assert process.wait(timeout=90) == 1, printed(folder)
        newest = max(complete_steps(output))
        assert newest > before
    if small.kind == TMPFS:
        small.empty(process)
    text = printed(folder)
    require_named(text, output)
    assert "Traceback" not in text, text
    return newest


def require_named(text: str, output: Path) -> None:
    """Requires the path, the cause and the bytes."""
    cause = {os.strerror(28), os.strerror(27)}
    assert "cannot be saved" in text, text
    assert str(output / "checkpoints") in text
    assert any(words in text for words in cause), text
    assert "bytes" in text
