"""Text files -> train and held-out text -> batches of windows, read as they are needed.

Files go to one side or the other whole, by a hash of their path, so that no held-out line stands
in a file that was trained on. A window is int32[context + 1], a byte each; a batch has a window a
row. The order of windows is Grain's, the same whatever the number of processes; each process reads
the windows of its own rows alone.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

HELD_OUT = 0.1  # of the files, or of a file that stands alone
# Beside the library proper: installed packages, tests, and generated tables of characters.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}

# A file's name, relative to the folder that was read, and its path.
File = tuple[str, Path]


class Windows(Protocol):
    """A sequence of numbers, bytes or tokens, of which windows are read by position."""

    fingerprint: str  # tells one sequence from another

    def __len__(self) -> int: ...

    def windows(self, starts: np.ndarray, context: int) -> np.ndarray:
        """Reads int32[len(starts), context + 1]."""
        ...


class Pieces:
    """A text in files, one after the other with a newline between: read by position, on demand."""

    def __init__(self, files: Sequence[File], *, start: int = 0, stop: int | None = None):
        """Takes the files, and the positions at which the text begins and ends in them."""
        self._paths = [path for _, path in files]
        self._sizes = [path.stat().st_size for path in self._paths]
        # A file and its newline begin where the one before has ended.
        self._offsets = np.cumsum([0, *(size + 1 for size in self._sizes)])
        self._start = start
        self._stop = int(self._offsets[-1]) - 1 if stop is None else stop
        names = "".join(
            f"{name}\n{size}\n" for (name, _), size in zip(files, self._sizes, strict=True)
        )
        self.fingerprint = _digest(f"{names}{start}:{stop}").hex()[:16]

    def __len__(self) -> int:
        return self._stop - self._start

    def read(self, start: int, length: int) -> np.ndarray:
        """Reads uint8[length] from a position on.

        Raises:
          ValueError: If a file has become shorter since the run began.
        """
        start += self._start
        assert 0 <= start <= start + length <= self._stop, (start, length, self._stop)
        parts = []
        index = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while length > 0:
            begin = start - int(self._offsets[index])
            wanted = min(length, self._sizes[index] - begin)
            with self._paths[index].open("rb") as file:
                file.seek(begin)
                part = file.read(wanted)
            if len(part) < wanted:
                raise ValueError(f"{self._paths[index]}: has become shorter since the run began")
            parts.append(part)
            if length > wanted:
                parts.append(b"\n")
            start, length, index = start + wanted + 1, length - wanted - 1, index + 1
        return np.frombuffer(b"".join(parts), np.uint8)

    def windows(self, starts: np.ndarray, context: int) -> np.ndarray:
        """Reads int32[len(starts), context + 1]."""
        return np.stack([self.read(int(start), context + 1) for start in starts]).astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text: both sides, a line that describes them, and the name of an entry of a window."""

    train: Windows
    held_out: Windows
    summary: str
    unit: str = "byte"

    @property
    def fingerprint(self) -> str:
        """Tells one text from another, by the names and sizes of its files."""
        return f"{self.train.fingerprint}-{self.held_out.fingerprint}"


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
    """Finds the text of a file, a folder, or without `path` the standard library.

    Raises:
      ValueError: If there is no file, or a side has fewer than `min_length` bytes.
    """
    if path is None:
        files = standard_library()
    else:
        files = [(path.name, path)] if path.is_file() else folder(path)
    if not files:
        raise ValueError(f"--data {path}: has no text files")
    if len(files) > 1:
        sides = split(files)
        train, held_out = map(Pieces, sides)
        label = f"{len(sides[1])} of {len(files)} files"
    else:
        cut = round(len(Pieces(files)) * (1 - HELD_OUT))
        train, held_out = Pieces(files, stop=cut), Pieces(files, start=cut)
        label = "the last tenth"
    if min(len(train), len(held_out)) < min_length:
        raise ValueError(
            f"too little text: {len(train)} bytes to train on and {len(held_out)} held out "
            f"({label}), but a window takes {min_length}; give more text or a shorter context"
        )
    summary = f"{len(train):,} bytes to train on, {len(held_out):,} held out ({label})"
    return Text(train=train, held_out=held_out, summary=summary)


def iterate(
    text: Windows, *, batch_size: int, context: int, seed: int, rows: Any = slice(None)
) -> Any:
    """Makes Grain's iterator over batches without end, int32[rows, context + 1].

    An epoch has each window of `context` bytes once, moved by a random distance below `context`.

    Args:
      text: Its windows are read two batches ahead, in threads.
      batch_size: Windows of a whole batch.
      context: Bytes of a window, but its last one.
      seed: Gives the order and the distances.
      rows: The rows of each batch that are read.
    """
    last = len(text) - context - 1

    def move(index: Any, rng: np.random.Generator) -> int:
        return min(int(index) * context + int(rng.integers(context)), last)

    starts = grain.MapDataset.range(last // context + 1).seed(seed).shuffle().random_map(move)
    windows = starts.repeat().batch(batch_size).map(lambda s: text.windows(s[rows], context))
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
    return iter(windows.to_iter_dataset(options))


class Batches:
    """Batches without end over all processes, in the order of `iterate`, and their position."""

    def __init__(
        self, text: Windows, *, batch_size: int, context: int, seed: int, sharding: NamedSharding
    ):
        """Shards int32[batch_size, context + 1] as `sharding` says."""
        self._shape = (batch_size, context + 1)
        self._sharding = sharding
        self._rows = rows_of(sharding, self._shape)
        self._iterator = iterate(
            text, batch_size=batch_size, context=context, seed=seed, rows=self._rows
        )

    def __iter__(self) -> Iterator[jax.Array]:
        return self

    def __next__(self) -> jax.Array:
        return place(next(self._iterator), self._rows, self._shape, self._sharding)

    @property
    def position(self) -> Any:
        """The state of Grain's iterator, of a few bytes, the same in all processes."""
        return self._iterator.get_state()

    def move_to(self, position: Any) -> None:
        """Goes on from a position."""
        self._iterator.set_state(position)


def spread(
    text: Windows, *, batch_size: int, context: int, num_batches: int, sharding: NamedSharding
) -> list[jax.Array]:
    """Makes batches of windows spread evenly over the text, each sharded over all processes."""
    shape = (batch_size, context + 1)
    rows = rows_of(sharding, shape)
    starts = np.linspace(0, len(text) - context - 1, num_batches * batch_size).astype(np.int64)
    return [
        place(text.windows(part[rows], context), rows, shape, sharding)
        for part in np.split(starts, num_batches)
    ]


def rows_of(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """Finds the rows of a batch that devices of this process hold, int64[rows], ascending."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    held = [np.arange(shape[0])[index[0]] for index in indices if index is not None]
    return np.unique(np.concatenate(held))


def place(
    local: np.ndarray, rows: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding
) -> jax.Array:
    """Makes the global batch of the rows that each process has read."""

    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = np.arange(shape[0])[index[0]]
        return local[np.searchsorted(rows, wanted)]

    return jax.make_array_from_callback(shape, sharding, of_device)


def _hash(name: str) -> float:
    """Maps a name to [0, 1), evenly, the same on every machine."""
    return int.from_bytes(_digest(name)[:8], "big") / 2**64


def _digest(text: str) -> bytes:
    # Names of files may be no UTF-8.
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)
