"""Reads the data of a page that `--format html` writes."""

import json
from typing import Any, NamedTuple

from dualpipe_jax._plot import Box as Box

_START, _END = '<script type="application/json" id="data">', "</script>"


class Page(NamedTuple):
    """The data: the boxes of each timetable, its idle shares, and all else."""

    timetables: list[list[Box]]
    idle_shares: list[list[float]]
    more: dict[str, Any]


def page_of(text: str) -> Page:
    """Reads the one block of data of a page."""
    assert text.count(_START) == 1
    data = json.loads(text.partition(_START)[2].partition(_END)[0])
    tables = data.pop("timetables")
    boxes = [
        [Box(**dict(zip(data["columns"], cells, strict=True))) for cells in table["boxes"]]
        for table in tables
    ]
    return Page(boxes, [table["idle_shares"] for table in tables], data)
