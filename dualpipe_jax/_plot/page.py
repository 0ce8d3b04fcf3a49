"""Timed actions -> one HTML file to zoom and hover, which loads nothing.

`page.html` is the file without its parts, and `page.js` the program that draws; both are written
into the file, and the actions as JSON. Colours are those of pictures. It needs no Matplotlib.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import NamedTuple

from dualpipe_jax._plot.legend import FACES, IDLE, INKS, SEND, WORDS
from dualpipe_jax._sizes import format_bytes

_DIGITS = 9  # of a time, significant


class Box(NamedTuple):
    """Tells when a rank ran an action, or a part of one.

    Attributes:
      rank: The rank.
      kind: F, I, W or `send`.
      action: The action in words.
      stage: Its stage; None for a transfer, as the next three.
      microbatch: Its microbatch.
      direction: The direction of the microbatch.
      tick: The tick of the tables.
      start: When it starts, in the unit of the page.
      end: When it ends.
      source: The place, among the boxes, of the one on another rank that makes the value that it
        reads; None if it reads none of another rank.
      value: That value: `x` or `cotangent`.
      waits: (time, text) of each wait of its rank since the action before.
    """

    rank: int
    kind: str
    action: str
    stage: int | None
    microbatch: int | None
    direction: int | None
    tick: int | None
    start: float
    end: float
    source: int | None
    value: str | None
    waits: Sequence[tuple[float, str]]


@dataclass(frozen=True, kw_only=True)
class Timetable:
    """Holds the rows of one timetable.

    Attributes:
      name: Its name, with its makespan.
      boxes: The boxes, rank by rank in order of time.
      idle_shares: The share of the makespan in which each rank runs no action.
      rest: Why a rank waits for a time that no wait of its next action explains.
    """

    name: str
    boxes: Sequence[Box]
    idle_shares: Sequence[float]
    rest: str


def make_page(
    timetables: Sequence[Timetable],
    *,
    title: str,
    notes: str,
    unit: str,
    starts: Sequence[int],
    has_ticks: bool,
    x_bytes: float | None,
) -> str:
    """Writes the file.

    Args:
      timetables: The timetables of the same ranks, one below the other.
      title: The schedule, its ranks and microbatches.
      notes: A line below the title.
      unit: The unit of times, `ms`; empty for that of the costs.
      starts: The rank at which the microbatches of each direction enter.
      has_ticks: Whether the timetable may be drawn by ticks too.
      x_bytes: The bytes of x; None if they are not known.
    """
    data = {
        "unit": unit,
        "starts": starts[:2],
        "has_ticks": has_ticks,
        "x_bytes": None if x_bytes is None else format_bytes(x_bytes),
        "words": WORDS,
        "faces": FACES,
        "inks": INKS,
        "idle": IDLE,
        "send": SEND,
        "columns": Box._fields,
    }
    groups = [
        {"name": each.name, "rest": each.rest, "idle_shares": [*map(_short, each.idle_shares)]}
        for each in timetables
    ]
    rows = [[_row(box) for box in each.boxes] for each in timetables]
    # A line for each box.
    tables = [
        json.dumps(group).removesuffix("}") + ', "boxes": [\n' + ",\n".join(boxes) + "\n]}"
        for group, boxes in zip(groups, rows, strict=True)
    ]
    content = json.dumps(data).removesuffix("}") + ', "timetables": [' + ",\n".join(tables) + "]}"
    folder = resources.files("dualpipe_jax._plot")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=_escape(title),
        notes=_escape(notes),
        # No text of the data ends the element that holds it.
        data=content.replace("<", r"\u003c"),
        program=(folder / "page.js").read_text(encoding="utf-8"),
    )


def _row(box: Box) -> str:
    waits = [(_short(time), text) for time, text in box.waits]
    return json.dumps(box._replace(start=_short(box.start), end=_short(box.end), waits=waits))


def _short(number: float) -> float:
    return float(f"{number:.{_DIGITS}g}")


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
