"""Reads the text of a compiled program."""

import os
import re
from typing import NamedTuple

from dualpipe_jax._preflight.collectives import KINDS
from dualpipe_jax._preflight.hlo import parse
from dualpipe_jax._preflight.links import Network

# Options of a compile that has the fusions a user's has, where tests/conftest.py asks for others.
AS_EVER: dict[str, bool | str] = {}
if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
    AS_EVER["xla_cpu_use_fusion_emitters"] = True


def instructions(text: str) -> list[str]:
    """Lists the lines that are instructions."""
    return [line for line in text.splitlines() if re.match(r"\s+(ROOT )?%", line)]


def loop_lines(text: str) -> list[str]:
    """Lists the lines of every computation but the entry: of loops and their callees."""
    lines, name = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            name = line.split()[0]
        elif name != "ENTRY":
            lines.append(line)
    return lines


class Collective(NamedTuple):
    """A collective of a program for CPUs, where all are synchronous.

    `axes` are the mesh axes along which it moves data, `shapes` those of its results.
    """

    kind: str
    axes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    in_loop: bool


def collectives(text: str, axes: dict[str, int]) -> list[Collective]:
    """Lists the collectives of a program over a mesh with `axes`, those that move nothing not."""
    module, network = parse(text), Network(axes=axes, device=None)
    outside = {each.name for each in module.within(module.entry, loops=False)}
    found = [
        Collective(
            kind=each.opcode,
            axes=network.axes_of(each),
            shapes=tuple(shape.dims for shape in each.shapes),
            in_loop=each.name not in outside,
        )
        for each in module.within(module.entry)
        if each.opcode in KINDS
    ]
    return [each for each in found if each.axes]
