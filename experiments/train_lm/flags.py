"""Types of flags that click has not."""

import math
from typing import Any

import click


class PositiveFloat(click.FloatRange):
    """A number above 0, and not one of those beyond all numbers (inf, nan)."""

    def __init__(self) -> None:
        super().__init__(min=0, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Reads the number, or refuses the flag."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number
