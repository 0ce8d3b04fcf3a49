"""Draws wrong calls, and judges how they end.

A wrong call is a valid one with one argument broken, sometimes two. It must end in a documented
exception whose message names a broken argument, and that a frame of the library raises, in bounded
time. If the values are legal after all, it must succeed.
"""

import re
import textwrap
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import dualpipe_jax as dpj
from dualpipe_jax._errors import brief
from tests.wrong_calls.mistakes import MISSING, Mistake, mistake

# CPU time of a call: other work on the machine does not count. The slowest valid one takes 1 s.
MOST_SECONDS = 5.0
# Characters of a message: 20 offenders and their paths.
MOST_CHARACTERS = 6000
_LIBRARY = str(Path(dpj.__file__).parent)
_HERE = str(Path(__file__).parent)
_NOTE = "dualpipe_jax: "


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """Holds a public callable, a valid call of it, and the mistakes in each argument.

    Attributes:
      name: The callable's name.
      call: Makes the call, with arguments by name.
      valid: Arguments of a valid call.
      mistakes: Classes of mistakes, by argument.
      raises: The documented exceptions.
      takes_more: Whether unknown arguments are passed on, so that none is unknown.
      weight: How often it is called, beside the others.
      is_slow: Whether a valid call takes seconds, and is made by `make wrong-calls` alone.
    """

    name: str
    call: Callable[..., Any]
    valid: Mapping[str, Any]
    mistakes: Mapping[str, Sequence[Mistake]]
    raises: tuple[type[Exception], ...] = (ValueError, TypeError)
    takes_more: bool = False
    weight: float = 1.0
    is_slow: bool = False

    @property
    def all_mistakes(self) -> list[tuple[str, Mistake]]:
        """Lists the pairs of an argument and a class of mistakes."""
        found = [(name, each) for name, made in self.mistakes.items() for each in made]
        if not self.takes_more:
            unknown = ("schedul", "mesh_axis", "num_stage", "x")
            found += [(name, mistake("unknown argument", None, 1)) for name in unknown]
        return found


@dataclass(frozen=True, kw_only=True)
class Wrong:
    """Holds a broken argument, the class of the mistake, and the value."""

    argument: str
    mistake: Mistake
    value: Any

    def __repr__(self) -> str:
        return f"{self.argument}={brief(self.value)} ({self.mistake.name})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would write the fields, all of a long text

    @property
    def is_legal(self) -> bool:
        """Whether the argument may have the value."""
        return self.mistake.legal(self.value)


@st.composite
def wrong_calls(draw: st.DrawFn, target: Target, first: int | None = None) -> list[Wrong]:
    """Draws one mistake in a call, or two in different arguments.

    Args:
      draw: Draws a value.
      target: The callable.
      first: The index in `all_mistakes` of the first mistake; None draws it.
    """
    everything = target.all_mistakes
    indices = st.integers(0, len(everything) - 1)
    chosen = [everything[draw(indices) if first is None else first]]
    if draw(st.integers(0, 3)) == 3:
        other = everything[draw(indices)]
        chosen += [other] if other[0] != chosen[0][0] else []
    return [
        Wrong(argument=argument, mistake=each, value=draw(each.values)) for argument, each in chosen
    ]


@dataclass
class Tally:
    """Counts the calls of a session.

    Attributes:
      calls: The number of calls.
      refused: The number of calls that ended in an exception.
      classes: The number of calls for each class of mistakes.
      targets: The number of calls for each callable.
      arguments: The pairs of a callable and a broken argument.
      slowest: The CPU seconds of the slowest call, its callable and its mistakes.
    """

    calls: int = 0
    refused: int = 0
    classes: Counter[str] = field(default_factory=Counter)
    targets: Counter[str] = field(default_factory=Counter)
    arguments: set[tuple[str, str]] = field(default_factory=set)
    slowest: tuple[float, str, str] = (0.0, "", "")

    def add(self, target: Target, wrong: Sequence[Wrong], seconds: float, *, refused: bool) -> None:
        """Counts a call."""
        self.calls += 1
        self.refused += refused
        self.targets[target.name] += 1
        self.classes.update(each.mistake.name for each in wrong)
        self.arguments.update((target.name, each.argument) for each in wrong)
        self.slowest = max(self.slowest, (seconds, target.name, str(wrong)))

    def report(self) -> str:
        """Writes the figures for the documentation."""
        seconds, slowest, _ = self.slowest
        classes = ", ".join(f"{name} {number:,}" for name, number in self.classes.most_common())
        figures = (
            f"{self.calls:,} calls of {len(self.targets)} callables and commands, with "
            f"{len(self.classes)} classes of mistakes in {len(self.arguments)} arguments: "
            f"{self.refused:,} were refused as above, and {self.calls - self.refused:,}, whose "
            f"values are legal after all, succeeded. The slowest call took {seconds:.1f} s of CPU "
            f"time (`{slowest}`)."
        )
        by_class = f"Calls by class (a call with two mistakes counts twice): {classes}."
        return "\n\n".join(textwrap.fill(each, 110) for each in (figures, by_class))


TALLY = Tally()


def problem_of(target: Target, wrong: Sequence[Wrong], tally: Tally = TALLY) -> str | None:
    """Makes a wrong call, counts it, and says which rule its end breaks, if any."""
    arguments = {**target.valid, **{each.argument: each.value for each in wrong}}
    arguments = {name: value for name, value in arguments.items() if value is not MISSING}
    error: Exception | None = None
    start = time.process_time()
    try:
        target.call(**arguments)
    except Exception as caught:  # noqa: BLE001 - every exception is judged
        error = caught
    seconds = time.process_time() - start
    tally.add(target, wrong, seconds, refused=error is not None)
    if seconds > MOST_SECONDS:
        return f"took {seconds:.1f} s"
    illegal = [each for each in wrong if not each.is_legal]
    if error is None:
        return f"was accepted: {illegal}" if illegal else None
    if not illegal and len(wrong) == 1:
        return f"is legal, but was refused: {_show(error)}"
    own = [each.mistake.raises for each in wrong if each.mistake.raises is not None]
    if isinstance(error, tuple(own)):
        return None
    # With two broken arguments, a legal value of one may not fit the other.
    return _problem_of_error(target, wrong, error)


def _problem_of_error(target: Target, wrong: Sequence[Wrong], error: Exception) -> str | None:
    """Says why an exception is not one that a user can act upon."""
    notes = [note for note in getattr(error, "__notes__", ()) if note.startswith(_NOTE)]
    text = "\n".join((str(error), *notes))
    known = [name for each in wrong for name in (each.argument, *each.mistake.also)]
    if not any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) for name in known):
        return f"names none of {known}: {_show(error)}"
    if len(text) > MOST_CHARACTERS:
        return f"has a message of {len(text)} characters: {text[:200]}"
    if notes:  # an error in the user's own function, which the library annotates
        return None
    if not isinstance(error, target.raises):
        return f"raises another exception than documented: {_show(error)}"
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    # Python itself refuses unknown and missing arguments, at the call.
    if not frames[-1].startswith((_LIBRARY, _HERE)):
        return f"comes from {frames[-1]}: {_show(error)}"
    return None


def _show(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:600]}"
