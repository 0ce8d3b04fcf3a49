"""Texts of experiments in pages: each between two comments that name it."""

from pathlib import Path


def marks(name: str) -> tuple[str, str]:
    """Gives the comments before and after the text."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def read_from(path: Path, *, name: str = "table") -> str:
    """Returns the text between the two comments of a page.

    Raises:
      ValueError: If the page has them not once each, in this order.
    """
    return _divide(path, name)[1].strip()


def write_into(path: Path, text: str, *, name: str = "table") -> None:
    """Replaces the text between the two comments of a page.

    Raises:
      ValueError: If the page has them not once each, in this order.
    """
    before, _, after = _divide(path, name)
    begin, end = marks(name)
    path.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{after}")


def _divide(path: Path, name: str) -> tuple[str, str, str]:
    begin, end = marks(name)
    before, found_begin, rest = path.read_text().partition(begin)
    between, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or begin in rest or end in before + after:
        raise ValueError(f"{path}: must contain {begin} and then {end}, once each; put them back")
    return before, between, after
