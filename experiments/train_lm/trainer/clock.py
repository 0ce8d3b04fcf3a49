"""Where the time of a run goes: seconds by phase, and the line that sums them up (goodput)."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

STEPS = "steps"


class Clock:
    """Counts the seconds since it was made, and those in each phase."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the seconds inside the `with` for a phase; phases do not lie in one another."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def goodput(self) -> str:
        """Says which share of the time went into steps, and where the rest went."""
        total = time.perf_counter() - self._start
        rest = total - sum(self.seconds.values())
        others = {name: s for name, s in self.seconds.items() if name != STEPS} | {"other": rest}
        shares = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in others.items())
        return f"{100 * self.seconds[STEPS] / total:.1f} % of {total:.0f} s in steps; {shares}"
