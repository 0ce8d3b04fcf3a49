"""Tables with one wrong entry, which verifiers must refuse."""

import dataclasses
from typing import Any

from hypothesis import strategies as st

from dualpipe_jax._schedule.tables import Tables


def draw_changed(data: Any, tables: Tables, column: str) -> Tables:
    """Draws another value for some entry of a column, in its range or just outside."""
    table = getattr(tables, column).copy()
    # A tick and a rank, or a part of the line of ranks.
    entry = tuple(data.draw(st.integers(0, size - 1)) for size in table.shape)
    table[entry] = data.draw(
        st.integers(-2, max(table.max(), 1) + 1).filter(lambda v: v != table[entry])
    )
    return dataclasses.replace(tables, **{column: table})
