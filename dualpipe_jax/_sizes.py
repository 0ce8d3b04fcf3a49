"""Sizes in bytes: numbers, or texts such as "80GiB", and back."""

import math
from numbers import Real

from dualpipe_jax._errors import brief

# Values of a layer with fewer bytes do not wait in the host's memory: many short copies would take
# link time for few bytes.
LEAST_ON_HOST = 2**20
_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}iB": 2 ** (10 * i) for i, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}B": 10 ** (3 * i) for i, prefix in enumerate("KMGT", start=1)},
}


def parse_bytes(value: object) -> float:
    """Reads a size, with or without a unit.

    >>> parse_bytes("80 GiB") == 80 * 2**30, parse_bytes("1.5MB"), parse_bytes(512)
    (True, 1500000.0, 512.0)

    Raises:
      ValueError: if it is no size.
    """
    try:
        text = str(value).strip()
    except ValueError:  # an integer of more digits than Python writes
        text = brief(value)
    digits = text.rstrip("BKMGTi ")
    try:
        number = float(digits)
    except ValueError:
        number = math.nan
    unit = text[len(digits) :].strip()
    if not 0 <= number < math.inf or unit not in _UNITS:
        raise ValueError(
            f"{brief(text)} is not a size: a number of bytes, or such as 80GiB or 1.5MB"
        )
    return number * _UNITS[unit]


def format_bytes(num_bytes: float) -> str:
    """Writes a size with three digits and a unit.

    >>> format_bytes(512), format_bytes(1.5 * 2**20), format_bytes(80 * 2**30)
    ('512 B', '1.5 MiB', '80 GiB')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 2 ** (10 * power):
            number = num_bytes / 2 ** (10 * power)
            return f"{number:.0f} {unit}" if number >= 99.95 else f"{number:.3g} {unit}"
    return f"{num_bytes:.0f} B"


def as_bytes(name: str, value: object) -> float:
    """Converts a number of bytes, or a text such as `"80GiB"`, to a number; infinity too.

    Raises:
      TypeError: if the value is neither.
      ValueError: if it is no size.
    """
    if not isinstance(value, str | Real):
        raise TypeError(f"{name}={brief(value)}: must be a number of bytes, or such as '80GiB'")
    if value == math.inf:
        return math.inf
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ValueError(f"{name}={brief(value)}: {error}") from error


def as_host_memory(name: str, value: object) -> float:
    """Converts bytes of the host's memory, as `as_bytes`: none, or room for some value.

    Raises:
      TypeError: if the value is neither a number nor a text.
      ValueError: if it is no size, or too small for all values that may wait there.
    """
    size = as_bytes(name, value)
    if 0 < size < LEAST_ON_HOST:
        raise ValueError(
            f"{name}={brief(value)}: must be at least {format_bytes(LEAST_ON_HOST)}, as smaller "
            "values do not leave the device, or 0 for none"
        )
    return size


def require_rate(name: str, value: object) -> None:
    """Requires bytes a second, or None.

    Raises:
      TypeError: if the value is no number above 0.
    """
    if value is None:
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise TypeError(f"{name}={brief(value)}: must be bytes a second, a number above 0, or None")
