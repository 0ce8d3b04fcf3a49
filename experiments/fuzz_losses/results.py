"""The result of one program, its line in a file, and the class of a refusal."""

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path

# The library's outcomes among them: an error is none.
RIGHT = ("exact", "refused", "miscompiled")
OUTCOMES = ("exact", "refused", "miscompiled", "wrong", "crashed", "invalid")


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a program.

    Attributes:
      seed: The program's.
      digest: The digest of its source.
      outcome: Of `OUTCOMES`; "miscompiled" if the loss without jit and the step with XLA's default
        options are equal, though one of them differs as compiled here; "invalid" if the program
        itself has no finite values.
      message: The refusal, the largest difference, or the traceback.
      names_line: Whether the message names a line of the program.
      features: The program's features.
      num_layers: The number of its layers.
      seconds: Seconds by part.
      error: The largest difference, as a multiple of what rounding is allowed.
    """

    seed: int
    digest: int
    outcome: str
    message: str
    names_line: bool
    features: list[str]
    num_layers: int
    seconds: dict[str, float]
    error: float | None = None

    @property
    def reason(self) -> str:
        """The class of the message: the message without names, numbers and lines."""
        return reason(self.message) if self.outcome == "refused" else self.outcome


def reason(message: str) -> str:
    """Gives a short class of a refusal.

    >>> reason("layers='a_{}': layer 3 reads x of layer 2 at program_7.py:12 (loss_fn)")
    'layers=…: layer N reads x of layer N at LINE'
    """
    first, *points = message.split("\n  * ")
    # Of the pairs of layers that differ, the first stands for all.
    message = f"too many kinds of layers: {points[0]}" if "kinds" in first and points else message
    text = " ".join(message.split())
    text = re.sub(r"\S*\.py:\d+(:\d+)?( \([^)]*\))?", "LINE", text)
    text = re.sub(r"\"[^\"]*\"|'[^']*'|`[^`]*`|\[[^\]]*\]", "…", text)
    text = re.sub(r"\b[a-z]*\d*\[[\d,]*\]", "…", text)
    if "puts" in text:
        text = re.sub(r"\([\w-]+ at LINE\)", "", text)
    text = text.replace(" at LINE)", ")")
    text = re.sub(r"(reads a parameter of layer \d+|their parameters differ).*", r"\1", text)
    text = re.sub(r"\d+(\.\d+)?", "N", text).replace("floatN…", "…").replace("loss_fn: ", "")
    text = " ".join(text.replace("layers N and N: ", "").replace(" ,", ",").split())
    return text if len(text) <= 110 else f"{text[:109]}…"


def append(path: Path, result: Result) -> None:
    """Adds a result to a file of JSON lines."""
    with path.open("a") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def read(path: Path) -> dict[int, Result]:
    """Reads a file of results, by seed; a line that was cut short is left out."""
    results = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                result = Result(**json.loads(line))
            except json.JSONDecodeError:
                continue
            results[result.seed] = result
    return results
