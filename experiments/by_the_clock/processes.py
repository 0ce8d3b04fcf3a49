"""A task -> a worker process a rank -> their measurements, or the error of one.

All workers write to one pipe: the first line that says an error is that of the rank that failed
first; the others only miss it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from experiments.by_the_clock.tasks import Measured, Task, to_dict

_ROOT = Path(__file__).resolve().parents[2]


class WorkerError(Exception):
    """A worker failed, or ended before it was done; says which, and why."""


@dataclass(frozen=True, kw_only=True)
class Worker:
    """The process of a rank, and the file that is its stderr."""

    process: subprocess.Popen[bytes]
    errors: IO[str]

    def last_words(self) -> str:
        """Returns the last line of its stderr."""
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors if line.strip()]
        return lines[-1] if lines else "nothing said"


@contextmanager
def measuring(task: Task) -> Iterator[Iterator[Measured]]:
    """Starts the workers of a task and gives their measurements as they arrive.

    None is left when the `with` ends, however it ends. Should this process be killed, their stdin
    ends, and they with it.

    Raises:
      WorkerError: from the iterator, if a worker fails.
    """
    address = f"127.0.0.1:{_free_port()}"
    with ExitStack() as stack:
        read, write = os.pipe()
        answers = stack.enter_context(os.fdopen(read))
        workers: list[Worker] = []
        stack.callback(_end, workers)
        with os.fdopen(write, "wb") as stdout:
            for rank in range(task.num_ranks):
                errors = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                process = subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "experiments.by_the_clock.worker",
                        json.dumps(to_dict(task)),
                        str(rank),
                        address,
                    ],
                    stdin=subprocess.PIPE,
                    stdout=stdout,
                    stderr=errors,
                    cwd=_ROOT,  # which `-m` puts first on the path: this checkout, whoever runs it
                )
                workers.append(Worker(process=process, errors=errors))
        yield _read(answers, workers)


def _read(answers: IO[str], workers: Sequence[Worker]) -> Iterator[Measured]:
    for line in answers:
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(_killed(workers) or answer["error"])
        yield Measured(**answer)
    # All have closed the pipe, so all end.
    codes = [worker.process.wait() for worker in workers]
    failed = [rank for rank, code in enumerate(codes) if code]
    if failed:
        rank = failed[0]
        text = f"rank {rank}: exit code {codes[rank]}: {workers[rank].last_words()}"
        raise WorkerError(_killed(workers) or text)


def _killed(workers: Sequence[Worker]) -> str | None:
    """Names a worker that was killed: it could not say so, and the others fail after it."""
    time.sleep(0.5)  # its connections close shortly before it has ended
    for rank, worker in enumerate(workers):
        code = worker.process.poll() or 0
        # A worker that has lost rank 0 aborts itself.
        if code < 0 and -code != signal.SIGABRT:
            return f"rank {rank}: ended by signal {-code}: {worker.last_words()}"
    return None


def _end(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # without effect on one that has ended
    for worker in workers:
        worker.process.wait()
        assert worker.process.stdin is not None
        worker.process.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
