"""Requests to stop: SIGTERM (pre-emption) and Ctrl-C, heeded after the step that is under way."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


class Requests:
    """Knows whether somebody has asked the run to stop.

    With one process, SIGTERM or Ctrl-C is such a request; a second Ctrl-C ends the run at once.
    With several, JAX's runtime takes SIGTERM in any of them, and names a step that all of them
    reach; Ctrl-C ends the run at once.
    """

    def __init__(self, say: Callable[[str], None]):
        """Says by `say` that it has taken a signal."""
        self._say = say
        self._got: signal.Signals | None = None

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Takes the signals inside the `with`."""
        if jax.process_count() > 1:
            yield
            return
        before = {kind: signal.signal(kind, self._take) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def after(self, step: int) -> signal.Signals | None:
        """Says which signal asks all processes to stop after this step; called after each step."""
        if jax.process_count() > 1:
            asked = multihost_utils.reached_preemption_sync_point(step)
            return signal.SIGTERM if asked else None
        return self._got

    def _take(self, number: int, frame: Any) -> None:
        if self._got is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._got = signal.Signals(number)
        self._say(f"{self._got.name}: stops after the step under way")
