"""Messages of mistakes: the requirement, and a line for each offender."""

from collections.abc import Iterable, Sequence
from typing import Any

_MOST_NAMED = 20
# Characters of a value, and of an offender's line, in a message.
_LONGEST_VALUE, _LONGEST_LINE = 200, 500


class ScheduleError(ValueError):
    """Reports a schedule that cannot run, with action, rank and tick if there are any."""


def raise_all(message: str, offenders: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raises `message` with the list of the first 20 offenders, if there are any."""
    found = list(offenders)
    lines = [f"  * {_cut(line, _LONGEST_LINE)}" for line in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        lines.append(f"  * and {len(found) - _MOST_NAMED} more")
    if lines:
        raise error("\n".join([f"{message}; but:", *lines]))


def require_name(argument: str, value: Any) -> str:
    """Requires a name."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}={brief(value)}: must be a name, got {show(value)}")
    return value


def require_names(argument: str, value: Any) -> tuple[str, ...]:
    """Requires a name, or a sequence of them; returns a tuple."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"{argument}={brief(value)}: must be a name, or a sequence of names; got {show(value)}"
        )
    return tuple(found)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the aval of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def short(aval: Any) -> str:
    """Formats dtype and shape as JAX does."""
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def brief(value: Any) -> str:
    """Writes a value as Python does, and no more than its beginning if it is long.

    >>> brief("pipe"), brief("pipe" * 1000) == repr("pipe" * 1000)[:200] + ".."
    ("'pipe'", True)
    """
    try:
        return _cut(repr(value), _LONGEST_VALUE)
    except ValueError:  # an integer of more digits than Python writes
        return f"<{type(value).__name__} too long to write>"


def show(value: Any) -> str:
    """Describes a value in a few words."""
    if is_array(value):
        return f"an array {short(value)}"
    return f"{type(value).__name__} {brief(value)}"[:80]


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}.."
