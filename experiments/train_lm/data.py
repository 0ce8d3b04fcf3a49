"""Text files -> train and held-out bytes -> batches, all on the host.

Files go to one side or the other whole, by a hash of their path, so that no held-out line stands
in a file that was trained on. A batch is int32[batch_size, context + 1], a window of bytes a row.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT = 0.1  # of the files, or of a file that stands alone
# Beside the library proper: installed packages, tests, and generated tables of characters.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}

# A file's name, relative to the folder that was read, and its path.
File = tuple[str, Path]


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text: the bytes of both sides, uint8[length], and a line that describes them."""

    train: np.ndarray
    held_out: np.ndarray
    summary: str


def standard_library() -> list[File]:
    """Lists the Python sources of the standard library that this Python runs on."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    return [(name.as_posix(), root / name) for name in names if not _SKIPPED & set(name.parts)]


def folder(root: Path) -> list[File]:
    """Lists the text files under a folder: those without a NUL byte, hidden ones left out."""
    names = [path.relative_to(root) for path in root.rglob("*") if path.is_file()]
    visible = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    return [(name.as_posix(), root / name) for name in visible if _is_text(root / name)]


def split(files: list[File]) -> tuple[list[File], list[File]]:
    """Splits two files or more into train and held-out, at least one on each side.

    A file's side depends on its name alone, not on the order or on the other files, but where one
    side would stay empty.
    """
    ordered = sorted(files, key=lambda file: (_hash(file[0]), file[0]))
    num_held_out = sum(_hash(name) < HELD_OUT for name, _ in ordered)
    num_held_out = min(max(num_held_out, 1), len(ordered) - 1)
    return ordered[num_held_out:], ordered[:num_held_out]


def read(path: Path | None, *, min_length: int) -> Text:
    """Reads a file, a folder, or without `path` the standard library.

    Raises:
      ValueError: If a side has fewer than `min_length` bytes.
    """
    if path is None:
        files = standard_library()
    else:
        files = [(path.name, path)] if path.is_file() else folder(path)
    if len(files) > 1:
        sides = split(files)
        train, held_out = map(_join, sides)
        label = f"{len(sides[1])} of {len(files)} files"
    else:
        text = _join(files)
        cut = round(len(text) * (1 - HELD_OUT))
        train, held_out, label = text[:cut], text[cut:], "the last tenth"
    if min(len(train), len(held_out)) < min_length:
        raise ValueError(
            f"too little text: {len(train)} bytes to train on and {len(held_out)} held out "
            f"({label}), but a window takes {min_length}; give more text or a shorter context"
        )
    summary = f"{len(train):,} bytes to train on, {len(held_out):,} held out ({label})"
    return Text(train=train, held_out=held_out, summary=summary)


def batches(text: np.ndarray, *, batch_size: int, context: int, seed: int) -> Iterator[np.ndarray]:
    """Yields batches of windows that start anywhere, without end, the same for the same seed."""
    rng = np.random.default_rng(seed)
    while True:
        yield _windows(text, rng.integers(0, len(text) - context, batch_size), context)


def spread(
    text: np.ndarray, *, batch_size: int, context: int, num_batches: int
) -> list[np.ndarray]:
    """Makes batches of windows spread evenly over the text."""
    starts = np.linspace(0, len(text) - context - 1, num_batches * batch_size).astype(np.int64)
    return [_windows(text, part, context) for part in np.split(starts, num_batches)]


def _windows(text: np.ndarray, starts: np.ndarray, context: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def _join(files: list[File]) -> np.ndarray:
    return np.frombuffer(b"\n".join(path.read_bytes() for _, path in files), np.uint8)


def _hash(name: str) -> float:
    """Maps a name to [0, 1), evenly, the same on every machine."""
    return (
        int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big")
        / 2**64
    )


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)
