"""Starts scripts as several processes on this machine, and ends all of them."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    """Finds a port that no program listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def started(
    command: Sequence[str], *, count: int, folder: Path
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts `python command` as processes that find each other by flags.

    The output of each goes to `process-K.txt` in the folder. None is left after the `with`.
    """
    address = f"127.0.0.1:{free_port()}"
    found = [] if count == 1 else ["--coordinator", address, "--num-processes", str(count)]
    processes = []
    try:
        for index in range(count):
            number = [] if count == 1 else ["--process-id", str(index)]
            with (folder / f"process-{index}.txt").open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *found, *number],
                        cwd=ROOT,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        text=True,
                        env=os.environ,
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(command: Sequence[str], *, count: int, folder: Path, seconds: float = 240) -> list[str]:
    """Runs the processes to their end, and gives the output of each.

    Raises:
      AssertionError: If one fails.
    """
    folder.mkdir(exist_ok=True)
    with started(command, count=count, folder=folder) as processes:
        codes = [process.wait(timeout=seconds) for process in processes]
    printed = [(folder / f"process-{index}.txt").read_text() for index in range(count)]
    assert codes == [0] * count, (codes, printed)
    return printed
