"""Bytes of a protobuf message -> its fields, without the message's description.

Source: https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator

# A number, or the bytes of a string, of a message or of a fixed-width number.
Value = int | memoryview
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS = {_FIXED64: 8, _FIXED32: 4}


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """Yields (number, value) of each field, in the order of the message.

    >>> message = memoryview(bytes([0x08, 0x96, 0x01, 0x12, 2]) + b"hi")
    >>> [
    ...     (number, value if isinstance(value, int) else bytes(value))
    ...     for number, value in fields(message)
    ... ]
    [(1, 150), (2, b'hi')]

    Raises:
      ValueError: If the bytes are no message.
    """
    at, end = 0, len(data)
    while at < end:
        key, at = _varint(data, at)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire_type == _BYTES:
            size, at = _varint(data, at)
        elif wire_type in _WIDTHS:
            size = _WIDTHS[wire_type]
        else:
            raise ValueError(f"field {key >> 3} is of the unknown wire type {wire_type}")
        if at + size > end:
            raise ValueError(f"field {key >> 3} ends after the message")
        yield key >> 3, data[at : at + size]
        at += size


def message(data: Value) -> dict[int, Value]:
    """Maps numbers to values, of a repeated field the last one."""
    return dict(fields(as_bytes(data)))


def as_bytes(value: Value) -> memoryview:
    """Requires bytes.

    Raises:
      ValueError: If it is a number.
    """
    if isinstance(value, int):
        raise ValueError("a number stands where a message or a string belongs")
    return value


def as_text(value: Value) -> str:
    """Decodes a string."""
    return bytes(as_bytes(value)).decode(errors="replace")


def as_int(value: Value) -> int:
    """Requires a number.

    Raises:
      ValueError: If it is none.
    """
    if not isinstance(value, int):
        raise ValueError("a message or a string stands where a number belongs")
    return value


def as_ints(value: Value) -> list[int]:
    """Reads one entry of a repeated number, or all of them packed."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    try:
        while (byte := data[at]) >= 0x80:
            number |= (byte & 0x7F) << shift
            shift += 7
            at += 1
    except IndexError:
        raise ValueError("the message ends within a number") from None
    return number | byte << shift, at + 1
