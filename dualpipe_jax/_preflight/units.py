"""Numbers -> text of three digits and a unit; what is not known is a dash."""

from collections.abc import Sequence


def show_bytes(number: int | None) -> str:
    """Writes bytes in KiB, MiB, ..."""
    return "-" if number is None else _scaled(number, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def show_flops(number: float) -> str:
    """Writes FLOPs in kFLOP, MFLOP, ..."""
    units = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP")
    return _scaled(number, 1000, units) if number else "-"


def show_time(seconds: float | None) -> str:
    """Writes seconds in us, ms, ..."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0"
    return f"{seconds:.3g} s" if seconds >= 1 else _scaled(seconds * 1e9, 1000, ("ns", "us", "ms"))


def _scaled(number: float, base: int, units: Sequence[str]) -> str:
    index = 0
    while number >= base and index + 1 < len(units):
        number, index = number / base, index + 1
    return f"{number:,.0f} {units[index]}" if number >= 100 else f"{number:.3g} {units[index]}"


def show_number(number: float | None) -> str:
    """Writes a number with its thousands apart."""
    return "-" if number is None else f"{number:,.0f}"
