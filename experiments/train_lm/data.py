"""Text files -> train and held-out bytes -> batches, on the host.

Files go to one side or the other whole, by a hash of their path relative to the root.
"""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HELD_OUT = 0.1  # of the files
# Beside the library proper: installed packages, tests, and generated tables of characters.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}


@dataclass(frozen=True, kw_only=True)
class Text:
    """The bytes of both sides, uint8[length], and how many files they come from."""

    train: np.ndarray
    held_out: np.ndarray
    num_files: tuple[int, int]


def standard_library() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    return [
        (name.as_posix(), path) for name, path in found if not _SKIPPED_FOLDERS & set(name.parts)
    ]


def split(files):
    score = lambda name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
    ordered = sorted(files, key=lambda f: (score(f[0]), f[0]))
    n = sum(score(name) < HELD_OUT for name, _ in ordered)
    n = min(max(n, 1), len(ordered) - 1)
    return ordered[n:], ordered[:n]
