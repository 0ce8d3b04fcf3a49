"""Reads the text of a compiled program."""

import re


def instructions(text: str) -> list[str]:
    """Lists the lines that are instructions."""
    return [line for line in text.splitlines() if re.match(r"\s+(ROOT )?%", line)]


def loop_lines(text: str) -> list[str]:
    """Lists the lines of every computation but the entry: of loops, and what they call."""
    lines, name = [], ""
    for line in text.splitlines():
        if line and not line.startswith(" "):
            name = line.split()[0]
        elif name != "ENTRY":
            lines.append(line)
    return lines
