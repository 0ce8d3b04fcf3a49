"""Calls a user's function: an error in it names the function, and the arrays it was given."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.tree_util import keystr

from dualpipe_jax._errors import is_array, short, show

# How the note begins that an error in a user's function gets, and how many arrays it names.
_NOTE = "dualpipe_jax: "
_MOST_NAMED = 20


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
    except Exception as error:
        reason = _reason_not_to_take(function, *inputs, **more)
        if isinstance(error, TypeError) and reason is not None:
            raise TypeError(f"{name}: must be a function {must}, but {reason}") from error
        _annotate(error, name, must, inputs)
        raise


def _reason_not_to_take(function: Callable[..., Any], *inputs: Any, **more: Any) -> str | None:
    """Says why a function does not take these arguments, if it does not."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none
        return None
    try:
        signature.bind(*inputs, **more)
    except TypeError as reason:
        return f"it takes {str(signature)[:80]}: {reason}"
    return None


def _annotate(error: Exception, name: str, must: str, inputs: Sequence[Any]) -> None:
    """Notes the function of the user that raised an error, and the arrays that it was given."""
    if any(note.startswith(_NOTE) for note in getattr(error, "__notes__", ())):
        return  # by a function that this one calls
    names = re.findall(r"\w+", must.partition(")")[0])
    given = [
        f"\n  {argument}{keystr(path)} is {short(leaf) if is_array(leaf) else show(leaf)}"
        for argument, value in zip(names, inputs, strict=False)
        for path, leaf in jax.tree_util.tree_leaves_with_path(value)
    ]
    more = f"\n  and {len(given) - _MOST_NAMED} more" if len(given) > _MOST_NAMED else ""
    error.add_note(f"{_NOTE}{name} raised this, given{''.join(given[:_MOST_NAMED])}{more}")
