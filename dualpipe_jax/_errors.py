"""Messages of mistakes: the requirement, and a line for each offender."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

_MOST_NAMED = 20


class ScheduleError(ValueError):
    """Reports a schedule that cannot run, with action, rank and tick if there are any."""


def raise_all(message: str, offenders: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raises `message` with the list of the first 20 offenders, if there are any."""
    found = list(offenders)
    lines = [f"  * {line}" for line in found[:_MOST_NAMED]]
    if len(found) > _MOST_NAMED:
        lines.append(f"  * and {len(found) - _MOST_NAMED} more")
    if lines:
        raise error("\n".join([f"{message}; but:", *lines]))


def call(name: str, must: str, function: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    """Calls a user's function; a message names it if it does not take these arguments.

    Args:
      name: The user's argument that gave the function.
      must: The signature that it must have.
      function: The function.
      *inputs: Its arguments.
      **more: Its arguments by name.

    >>> call("model.embed", "(ends, ctx) -> x", lambda ends: ends, 1, 2)
    Traceback (most recent call last):
    TypeError: model.embed: must be a function (ends, ctx) -> x, but it takes (ends): too many
    positional arguments

    Raises:
      TypeError: If the function takes other arguments.
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


def require_name(argument: str, value: Any) -> str:
    """Requires a name."""
    if not isinstance(value, str):
        raise TypeError(f"{argument}={repr(value)[:80]}: must be a name, got {show(value)}")
    return value


def require_names(argument: str, value: Any) -> tuple[str, ...]:
    """Requires a name, or a sequence of them; returns a tuple."""
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(name, str) for name in found):
        raise TypeError(
            f"{argument}={repr(value)[:80]}: must be a name, or a sequence of names; got "
            f"{show(value)}"
        )
    return tuple(found)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or the aval of one."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def short(aval: Any) -> str:
    """Formats dtype and shape as JAX does."""
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def show(value: Any) -> str:
    """Describes a value in a few words."""
    if is_array(value):
        return f"an array {short(value)}"
    return f"{type(value).__name__} {value!r}"[:80]
