"""Programs -> their times, side by side: each round takes a step of every program.

A program that fails is left out from there on, with its message; the others go on.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

from experiments.hardware.tasks import Figure

Samples = dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Times:
    """The seconds of each program, one for each round, and the messages of those that failed."""

    samples: Samples
    failures: dict[str, str]

    def figure(self, name: str, *, table: str, row: str, column: str) -> Figure:
        """Makes the figure of a program."""
        failure = self.failures.get(name, "")
        return Figure(
            table=table,
            row=row,
            column=column,
            samples=self.samples.get(name, ()),
            note=failure,
            is_failure=bool(failure),
        )


def side_by_side(programs: Mapping[str, Callable[[], Callable[[], Any]]], *, rounds: int) -> Times:
    """Compiles programs one after the other, warms each up, and takes steps of all in turns.

    Each round begins with another program, so that no one always runs after the same neighbour.

    Args:
      programs: Functions that compile a program, and return a function that runs a step of it.
      rounds: Measured steps of each program.
    """
    steps: dict[str, Callable[[], Any]] = {}
    failures: dict[str, str] = {}
    for name, compile_program in programs.items():
        with _noting(name, failures):
            step = compile_program()
            jax.block_until_ready(step())
            steps[name] = step
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds):
        turn = index % max(1, len(names))
        for name in (*names[turn:], *names[:turn]):
            if name not in failures:
                with _noting(name, failures):
                    start = time.perf_counter()
                    jax.block_until_ready(steps[name]())
                    samples[name].append(time.perf_counter() - start)
    whole = {name: tuple(times) for name, times in samples.items() if name not in failures}
    return Times(samples=whole, failures=failures)


@contextmanager
def _noting(name: str, failures: dict[str, str]) -> Iterator[None]:
    """Makes an error inside the `with` the failure of a program.

    It may be any error: XLA refuses an option, the driver refuses a graph, memory is full.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        failures[name] = describe(error)


def describe(error: BaseException) -> str:
    """Writes an error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def difference(longer: tuple[float, ...], shorter: tuple[float, ...]) -> tuple[float, ...]:
    """Subtracts times, round by round.

    >>> difference((3.0, 5.0), (1.0, 2.0))
    (2.0, 3.0)
    """
    return tuple(a - b for a, b in zip(longer, shorter, strict=True))


def share(times: tuple[float, ...], parts: float) -> tuple[float, ...]:
    """Divides times by a number of parts.

    >>> share((3.0, 5.0), 2)
    (1.5, 2.5)
    """
    return tuple(each / parts for each in times)
