"""Figures of steps that were never compiled."""

import dataclasses
from typing import Any

from experiments.compiled.compiles import Figures


def figures_of(**values: Any) -> Figures:
    """Makes figures with these values, and nothing else known."""
    empty: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Figures))
    texts: dict[str, Any] = {"counts": {}, "cycles": {}, "fits": True, "account": "", "text": ""}
    return Figures(**(empty | texts | values))
