"""The messages of the two sides of a worker's pipe, as lines of JSON."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The model and its batches, the same for all variants."""

    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int
    microbatch_size: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A step for one process to compile and run."""

    variant: str
    ranks: int
    microbatches: int
    remat: str
    sizes: Sizes

    @classmethod
    def from_dict(cls, task: dict[str, Any]) -> "Task":
        """Undoes `dataclasses.asdict`."""
        attributes: dict[str, Any] = {**task, "sizes": Sizes(**task["sizes"])}
        return cls(**attributes)


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A worker's first line: its program, and the result of its warm-up step.

    Bytes are those of one device, by XLA's own account; None where it gives none. The norms are
    those of the gradients of ends and of each layer, in model order.
    """

    compile_seconds: float
    temporary_bytes: int
    argument_bytes: int
    output_bytes: int
    peak_bytes: int | None
    loss: float
    gradient_norms: list[float]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A worker's line for a step. CPU seconds are those of all its threads.

    The resident bytes are the most of the whole process, all its devices, since it had compiled;
    None where the system does not say.
    """

    wall_seconds: float
    cpu_seconds: float
    resident_bytes: int | None
    loss: float
