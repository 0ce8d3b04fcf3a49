"""Values as the CSVs of experiments have them: booleans are yes or no, None is nothing."""

from typing import Any

_WORDS = {True: "yes", False: "no"}


def write(value: Any, *, form: str) -> Any:
    """Writes one for a CSV, a float in this form.

    >>> [write(value, form=".2f") for value in (True, 0.125, 3, "1f1b", None)]
    ['yes', '0.12', 3, '1f1b', '']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return yes_or_no(value)
    return format(value, form) if isinstance(value, float) else value


def yes_or_no(value: bool) -> str:
    """Writes a boolean."""
    return _WORDS[value]


def is_yes(text: str) -> bool:
    """Reads a boolean.

    >>> is_yes("yes"), is_yes("no")
    (True, False)
    """
    (value,) = (value for value, word in _WORDS.items() if word == text)
    return value
