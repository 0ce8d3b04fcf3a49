"""Tasks -> a worker each, started one after the other -> steps in turns -> figures of each.

Only one worker ever runs; the others wait for a line on their stdin.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.benchmarks.tasks import Compiled, Step, Task

_ROOT = Path(__file__).resolve().parents[2]

# Has glibc ask for huge pages whenever it gets memory from the system. A step's temporaries are
# mapped anew for each step; in pages of 4 KiB the first touch of each is an interrupt, which costs
# CPU time in proportion to memory, and which accelerators do not have: they hold all their memory.
_HUGE_PAGES = "glibc.malloc.hugetlb=1"
_SYSTEM_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Called with each answer to a task: its program, a step, or why it failed.
Record = Callable[[Task, Compiled | Step | str], None]


class WorkerError(Exception):
    """A worker ended, or said something else than it was asked."""


def can_have_huge_pages() -> bool:
    """Whether the system gives huge pages to a process that asks for them."""
    return _SYSTEM_PAGES.exists() and "[never]" not in _SYSTEM_PAGES.read_text()


def environment(*, huge_pages: bool) -> dict[str, str]:
    """Makes a worker's environment: this process's, with its memory in huge pages on demand."""
    if not huge_pages:
        return dict(os.environ)
    others = os.environ.get("GLIBC_TUNABLES")
    return {**os.environ, "GLIBC_TUNABLES": ":".join(filter(None, (others, _HUGE_PAGES)))}


class Worker:
    """The process of a task, as seen from outside; it ends with the `with`.

    Its stderr goes to the file `log`.
    """

    def __init__(self, task: Task, *, log: Path, huge_pages: bool):
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "experiments.benchmarks.worker",
                    json.dumps(dataclasses.asdict(task)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment(huge_pages=huge_pages),
                cwd=_ROOT,  # which `-m` puts first on the path: this checkout, whoever runs it
            )

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: Any) -> None:
        try:
            self._process.communicate(timeout=60)  # closes its stdin, at which it ends
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()

    def compiled(self) -> Compiled:
        """Waits until it has compiled and warmed up."""
        return Compiled(**self._answer())

    def step(self) -> Step:
        """Has it take a step, and waits for it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return Step(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> WorkerError:
        code = self._process.wait()
        lines = [line for line in self._log.read_text().splitlines() if line.strip()]
        return WorkerError(f"exit code {code}: {lines[-1] if lines else 'nothing said'}")


@dataclass(kw_only=True, eq=False)
class Result:
    """The answers to a task; `failure` says in a line why there is nothing, or no more."""

    task: Task
    compiled: Compiled | None = None
    steps: list[Step] = field(default_factory=list)
    failure: str | None = None


def race(
    results: Sequence[Result],
    *,
    num_rounds: int,
    huge_pages: bool,
    logs: Path,
    record: Record,
) -> Iterator[None]:
    """Compiles the tasks of all results, then takes steps with them in turns; yields after each.

    Each round begins with another one, so that nobody always runs after the same neighbour. One
    that fails is left out from there on; the others go on.

    Args:
      results: The tasks to run, and the entries for their answers.
      num_rounds: Steps of each, beside the one that warms up.
      huge_pages: Whether workers ask for their memory in huge pages.
      logs: The folder for the workers' stderr.
      record: Called with every answer, as it arrives: a stopped run leaves its figures.
    """
    with ExitStack() as stack:
        workers = {}
        for result in results:
            task = result.task
            log = logs / f"{task.ranks}-{task.remat}-{task.variant}.log"
            workers[task] = worker = stack.enter_context(
                Worker(task, log=log, huge_pages=huge_pages)
            )
            with _noted(result, record):
                result.compiled = worker.compiled()
                record(task, result.compiled)
            yield
        for index in range(num_rounds):
            turn = index % len(results)
            for result in (*results[turn:], *results[:turn]):
                if result.failure is None:
                    with _noted(result, record):
                        result.steps.append(workers[result.task].step())
                        record(result.task, result.steps[-1])
                yield


@contextmanager
def _noted(result: Result, record: Record) -> Iterator[None]:
    """Makes a worker's failure that of its result."""
    try:
        yield
    except WorkerError as failure:
        result.failure = str(failure)
        record(result.task, result.failure)
