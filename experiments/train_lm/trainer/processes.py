"""The processes of a run: JAX's distributed runtime, and decisions that all processes share.

Every process runs the same script over the same mesh. Process 0 prints and writes; a mistake that
one process finds is refused by all of them, in the same words.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import click
import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from ..flags import Refusal

# A process that is silent for so long counts as dead; JAX then ends all others.
HEARTBEAT_SECONDS = 60
_LONGEST = 2000  # bytes of a text that processes share
# Set by the launchers that JAX detects.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def start(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    *,
    heartbeat: int = HEARTBEAT_SECONDS,
) -> int:
    """Joins the other processes of the run, before JAX is first used.

    Args:
      coordinator: The address of process 0, HOST:PORT; None where JAX finds the processes by itself
        (SLURM, Open MPI, Kubernetes, TPU pods), or where there is only this one.
      num_processes: How many there are.
      process_id: The number of this one.
      heartbeat: Seconds of silence after which a process counts as dead.

    Returns:
      The number of processes, as far as it is known before JAX's backends start.

    Raises:
      Refusal: If the processes do not come together.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        if coordinator is None and "coordinator_address should be defined" in str(error):
            return 1
        raise Refusal(f"cannot join the other processes: {error}") from error
    except RuntimeError as error:
        if coordinator is None and "must be called before" in str(error):
            return jax.process_count()  # whoever calls the script from Python has begun already
        where = f"--coordinator {coordinator}" if coordinator else "the coordinator"
        text = " ".join(str(error).split())
        raise Refusal(f"{where}: the processes did not come together: {text}") from error
    # How processes exchange arrays of CPUs.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    _leave_stdout_to_python()
    if num_processes is not None:
        return num_processes
    return next((int(os.environ[name]) for name in _COUNTS if name in os.environ), 1)


def console() -> Console:
    """Makes the console: that of process 0 prints, those of others do not.

    It prints text as it is: "[a]" and ":b:" in a path, an error or a sample are no markup.
    """
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=not is_first())


def is_first() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Makes a refusal inside the `with` by one process the refusal of all processes.

    Raises:
      Refusal: If any process raised one: the first one's.
    """
    problem = ""
    try:
        yield
    except Refusal as error:
        problem = error.message
    if first := first_of_all(problem):
        raise Refusal(first)


def first_of_all(text: str) -> str:
    """Shares a text: gives all processes that of the first process whose text is not empty."""
    if jax.process_count() == 1:
        return text
    mine = np.zeros(_LONGEST, np.uint8)
    if text:
        prefix = "" if is_first() else f"process {jax.process_index()}: "
        encoded = f"{prefix}{text}".encode()[:_LONGEST]
        mine[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    everyone = np.asarray(multihost_utils.process_allgather(mine))
    texts = [bytes(row[row > 0]).decode(errors="replace") for row in everyone]
    return next(filter(None, texts), "")


def wait_for_all(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def fail(error: BaseException, *, folder: Path) -> NoReturn:
    """Ends this process after an error that the others may not have, and tells them.

    The text goes to a file beside the run's logs, where process 0 looks for it: its own error is
    only that a collective failed. The process ends at once, as JAX's shutdown would wait for the
    others, who wait for this one.
    """
    index = jax.process_index()
    said = _said_by_others(folder)
    text = f"process {index} of {jax.process_count()}: {type(error).__name__}: {error}"
    with contextlib.suppress(OSError):
        _file_of(folder, index).write_text(text, encoding="utf-8")
    traceback.print_exception(error)
    for line in said:
        print(line, file=sys.stderr)
    print(
        f"process {index} of {jax.process_count()} stops: another process, or this one, failed. "
        f"Start all of them again with the same command: the run in {folder} goes on from its "
        "last checkpoint.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def forget_failures(folder: Path) -> None:
    """Removes the files of earlier failures."""
    for path in folder.glob("failed-process-*.txt"):
        path.unlink(missing_ok=True)


def _said_by_others(folder: Path) -> list[str]:
    paths = sorted(folder.glob("failed-process-*.txt"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def _file_of(folder: Path, index: int) -> Path:
    return folder / f"failed-process-{index}.txt"


def _leave_stdout_to_python() -> None:
    """Drops lines that gloo prints to stdout from C++ as it connects processes."""
    if sys.stdout is sys.__stdout__:
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Ends this process after the `with`, if there are others; Python's own end is left out.

    That end destroys XLA's client and gloo's connections, which on a busy machine hangs in all
    processes at once (seen with JAX 0.10.2 on CPUs).
    """
    if jax.process_count() == 1:
        yield
        return
    code = 0
    try:
        yield
    except SystemExit as error:
        code = int(error.code or 0)
    except click.ClickException as error:
        click.echo(f"{click.get_current_context().info_name}: {error.format_message()}", err=True)
        code = error.exit_code
    try:
        jax.distributed.shutdown()  # waits for the others, a heartbeat's time at most
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """Ends this process at once: JAX's own end would wait for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
