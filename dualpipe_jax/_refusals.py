"""How a mistake is told: what must be, and a line for each offender."""

from collections.abc import Iterable
from typing import Any

_MOST_NAMED = 20


def raise_all(message: str, offenders: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raises `message` with the list of offenders, if there are any; of very many, the first."""
    found = list(offenders)
    lines = [f"  * {line}" for line in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        lines.append(f"  * and {len(found) - _MOST_NAMED} more")
    if lines:
        raise error("\n".join([f"{message}; but:", *lines]))


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the aval of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def short(aval: Any) -> str:
    """Writes dtype and shape as JAX does."""
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def show(value: Any) -> str:
    """Says in a few words what a value is."""
    if is_array(value):
        return f"an array {short(value)}"
    return f"{type(value).__name__} {value!r}"[:80]
