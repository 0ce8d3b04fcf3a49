"""Reads costs and sizes: `F=1,I=1.2`, `80GiB`, the costs of a report."""

import json
from pathlib import Path
from typing import Any

import click

from dualpipe_jax._cli.refusal import Refusal
from dualpipe_jax._costs import as_number, parse_bytes
from dualpipe_jax._errors import brief
from dualpipe_jax._sizes import as_host_memory

_FIELDS = {"F": "forward", "I": "input_grad", "W": "weight_grad", "B": "full_backward"}
_OPTIONAL = ("full_backward", "embed", "head")
_REQUIRED = tuple(name for name in _FIELDS.values() if name not in _OPTIONAL)


class Size(click.ParamType):
    """Converts a number of bytes, with or without a unit."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As `click.ParamType.convert`."""
        try:
            return parse_bytes(value)
        except ValueError as error:
            self.fail(f"{error}.")


class Rate(Size):
    """Converts bytes a second, more than none, such as `32GB/s`."""

    name = "rate"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As `click.ParamType.convert`."""
        rate = super().convert(str(value).removesuffix("/s"), param, ctx)
        return rate or self.fail(f"{value!r} is no bandwidth, such as 32GB/s.")


class HostMemory(Size):
    """Converts bytes of the host's memory: none, or room for some value."""

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As `click.ParamType.convert`."""
        size = super().convert(value, param, ctx)
        try:
            return as_host_memory("size", size)
        except ValueError as error:
            self.fail(f"{error}.")


class Numbers(click.ParamType):
    """Converts one positive integer, or several with commas."""

    name = "N,N,.."

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """As `click.ParamType.convert`."""
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
            self.fail(f"{value!r} is not positive integers with commas, each once.", param, ctx)
        return numbers


x_bytes = click.option(
    "--x-bytes", type=Size(), help="Bytes of x, shown with each value that is sent. For html."
)


def parse_costs(text: str) -> dict[str, Any]:
    """Reads `F=1,I=1,W=1,B=2`, each once or not at all.

    Raises:
      Refusal: naming all that cannot be read.
    """
    costs: dict[str, Any] = {}
    wrong = []
    for item in text.split(","):
        kind, _, number = (part.strip() for part in item.partition("="))
        try:
            value = float(number)
        except ValueError:
            value = None
        if value is None or kind not in _FIELDS or _FIELDS[kind] in costs:
            wrong.append(repr(item))
        else:
            costs[_FIELDS[kind]] = value
    if wrong:
        raise Refusal(
            f"--costs {text!r}: {', '.join(wrong)} must be F, I, W or B, each once, with a number: "
            "F=1,I=1,W=1"
        )
    return costs


def read_costs(path: Path) -> dict[str, float]:
    """Reads a report, `{"costs": {"forward": ..., "input_grad": ..., "weight_grad": ...}}`.

    Raises:
      Refusal: if it cannot be read, or its costs are not numbers of the known names.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise Refusal(f"--costs-from {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Refusal(f"--costs-from {path}: is not JSON: {error}") from error
    costs = report.get("costs") if isinstance(report, dict) else None
    if not isinstance(costs, dict):
        raise Refusal(f'--costs-from {path}: must be an object with an object "costs"')
    wrong = [
        f"{name}={brief(value)}"
        for name, value in costs.items()
        if name not in (*_REQUIRED, *_OPTIONAL)
        or isinstance(value, bool)
        or not isinstance(value, int | float)
    ]
    wrong += [f"no {name}" for name in _REQUIRED if name not in costs]
    if wrong:
        known = ", ".join((*_REQUIRED, *_OPTIONAL))
        raise Refusal(
            f'--costs-from {path}: {", ".join(wrong)}; "costs" must have numbers for {known} (the '
            "last three may be left out), and nothing else"
        )
    try:
        return {name: as_number(name, value) for name, value in costs.items()}
    except ValueError as error:
        raise Refusal(f"--costs-from {path}: {error}") from error
