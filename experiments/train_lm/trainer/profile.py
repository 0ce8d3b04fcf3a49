"""A profile of some steps, by `jax.profiler`: `--profile START:STOP`."""

from pathlib import Path
from types import TracebackType

import click
import jax

FOLDER = "profile"


class StepRange(click.ParamType):
    """Steps START:STOP, the first and the last one."""

    name = "START:STOP"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        """Reads the range, or refuses the flag."""
        start, colon, stop = str(value).partition(":")
        if not (colon and start.isdecimal() and stop.isdecimal() and 1 <= int(start) <= int(stop)):
            self.fail(f"{value!r} is no range START:STOP of steps from 1 on", param, ctx)
        return str(value)


class Profile:
    """Traces the steps of a range into a folder; within a `with`, which ends the trace."""

    def __init__(self, steps: str | None, folder: Path):
        """Takes the range as `StepRange` gives it; None traces nothing."""
        self._first, self._last = map(int, steps.split(":")) if steps else (0, -1)
        self.folder = folder / FOLDER
        self._is_tracing = False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def starts_at(self, step: int) -> bool:
        """Whether the trace starts before this step."""
        return not self._is_tracing and self._first <= step <= self._last

    def before(self, step: int) -> None:
        """Starts the trace before its first step; the steps before have to be done by then."""
        if self.starts_at(step):
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # calls of Python functions would fill the buffers
            jax.profiler.start_trace(str(self.folder), profiler_options=options)
            self._is_tracing = True

    def ends_at(self, step: int) -> bool:
        """Whether the trace ends after this step."""
        return self._is_tracing and step >= self._last

    def after(self, step: int) -> None:
        """Ends the trace after its last step, which has to be done by then."""
        if self.ends_at(step):
            self._stop()

    def _stop(self) -> None:
        if self._is_tracing:
            jax.profiler.stop_trace()
            self._is_tracing = False
