"""How a mistake is told: what must be, and a line for each offender."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_MOST_NAMED = 20


class ScheduleError(ValueError):
    """Reports a schedule that cannot be run: naming action, rank and tick where there are any."""


def raise_all(message: str, offenders: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raises `message` with the list of offenders, if there are any; of very many, the first."""
    found = list(offenders)
    lines = [f"  * {line}" for line in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        lines.append(f"  * and {len(found) - _MOST_NAMED} more")
    if lines:
        raise error("\n".join([f"{message}; but:", *lines]))


def call(name: str, must: str, function: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    """Calls a user's function, which is told by its name if it does not take these arguments.

    >>> call("model.embed", "(ends, ctx) -> x", lambda ends: ends, 1, 2)
    Traceback (most recent call last):
    TypeError: model.embed: must be a function (ends, ctx) -> x, but it takes (ends): too many
    positional arguments

    Raises:
      TypeError: If the function takes others.
    """
    try:
        return function(*inputs, **more)
    except TypeError as error:
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some builtins have none
            raise error from None
        try:
            signature.bind(*inputs, **more)
        except TypeError as reason:
            raise TypeError(
                f"{name}: must be a function {must}, but it takes {str(signature)[:80]}: {reason}"
            ) from error
        raise


def name(argument: str, value: Any) -> str:
    """Requires a name."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}={repr(value)[:80]}: must be a name, got {show(value)}")
    return value


def names(argument: str, value: Any) -> tuple[str, ...]:
    """Requires a name, or a sequence of them; returns a tuple."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(each, str) for each in found):
        raise TypeError(
            f"{argument}={repr(value)[:80]}: must be a name, or a sequence of names; got "
            f"{show(value)}"
        )
    return tuple(found)


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
