"""Processes that check programs, and are made anew after a hundred each."""

import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from experiments.fuzz_losses.grammar import write
from experiments.fuzz_losses.results import Result

PROGRAMS, LIMIT = 100, 300.0  # of a process; seconds of a program
# Compiling takes the time here, not running (tests/conftest.py).
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)


def set_up_jax() -> None:
    """Sets JAX up for checks; before it is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = XLA_FLAGS
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_enable_x64", True)


def _work(connection: Connection) -> None:
    """Checks the programs whose seeds come in, and sends their results."""
    set_up_jax()
    import jax

    from experiments.fuzz_losses.check import check

    while (seed := connection.recv()) is not None:
        result = check(seed)
        jax.clear_caches()
        connection.send(result)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    done: int = 0
    seed: int | None = None
    since: float = 0.0

    def stop(self) -> None:
        """Ends the process, whatever it is at."""
        self.connection.close()
        self.process.kill()
        self.process.join()


def _start() -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def check_all(seeds: Iterable[int], jobs: int) -> Iterator[Result]:
    """Checks programs in several processes; gives results as they come."""
    queue = iter(seeds)
    workers = [_start() for _ in range(jobs)]
    try:
        for worker in workers:
            _give(worker, next(queue, None))
        while busy := [worker for worker in workers if worker.seed is not None]:
            ready = wait([worker.connection for worker in busy], timeout=1)
            for worker in busy:
                is_late = time.monotonic() - worker.since > LIMIT
                if worker.connection not in ready and not is_late:
                    continue
                if worker.connection in ready:
                    result = _receive(worker)
                else:
                    result = _crashed(worker, f"took more than {LIMIT:g} s")
                yield result
                has_ended = result.outcome == "crashed" and not result.seconds
                if has_ended or worker.done >= PROGRAMS:
                    worker.stop()
                    new = _start()
                    workers[workers.index(worker)] = new
                    worker = new
                _give(worker, next(queue, None))
    finally:
        for worker in workers:
            worker.stop()


def _give(worker: _Worker, seed: int | None) -> None:
    worker.seed, worker.since = seed, time.monotonic()
    if seed is not None:
        worker.connection.send(seed)


def _receive(worker: _Worker) -> Result:
    try:
        result = worker.connection.recv()
    except (EOFError, OSError):
        return _crashed(worker, "the process died")
    worker.done += 1
    return result


def _crashed(worker: _Worker, message: str) -> Result:
    """Gives the result of a program whose process is at an end."""
    program = write(worker.seed or 0)
    return Result(
        seed=program.seed,
        digest=program.digest,
        outcome="crashed",
        message=message,
        names_line=False,
        features=list(program.features),
        num_layers=program.num_layers,
        seconds={},
    )
