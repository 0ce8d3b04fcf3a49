"""Writes one rank's row in the words of the DualPipe papers: F, B, W of either of two chunks."""

from collections import deque
from collections.abc import Iterable, Sequence

from dualpipe_jax._schedule.ir import Action, Cell, Pair, Row


class RowBuilder:
    """Appends actions to a row; each chunk takes its microbatches in order.

    A chunk is a stage and the microbatches that pass through it. A weight grad that does not
    follow its input grad at once is deferred; the oldest deferred one runs first.

    >>> build = RowBuilder([(0, range(2)), (1, range(2, 4))])
    >>> build.forward(0), build.pair(1, 0), build.input_grad(1), build.weight_grad()
    (None, None, None, None)
    >>> print(*build.row)
    0F0 (1F2;0B0)OVERLAP_F_B 1I2 1W2
    """

    def __init__(self, chunks: Sequence[tuple[int, Iterable[int]]]):
        self._stages = [stage for stage, _ in chunks]
        self._forwards = [iter(microbatches) for _, microbatches in chunks]
        self._backwards = [iter(microbatches) for _, microbatches in chunks]
        self._deferred: deque[Action] = deque()
        self._cells: list[Cell] = []

    @property
    def row(self) -> Row:
        """The row so far."""
        return tuple(self._cells)

    def forward(self, chunk: int) -> None:
        """Appends the chunk's next F."""
        self._cells.append(self._next_forward(chunk))

    def backward(self, chunk: int, *, defer: bool = False) -> None:
        """Appends the chunk's next B, or only its I if the W is to be deferred."""
        if defer:
            self.input_grad(chunk)
        else:
            self._cells.append(self._next_backward(chunk, "B"))

    def input_grad(self, chunk: int) -> None:
        """Appends the chunk's next I and defers its W."""
        action = self._next_backward(chunk, "I")
        self._cells.append(action)
        self._deferred.append(action._replace(kind="W"))

    def weight_grad(self) -> None:
        """Appends the oldest deferred W."""
        self._cells.append(self._deferred.popleft())

    def pair(self, forward_chunk: int, backward_chunk: int) -> None:
        """Appends the pair of one chunk's next F and the other's next B."""
        forward = self._next_forward(forward_chunk)
        self._cells.append(Pair(forward, self._next_backward(backward_chunk, "B")))

    def _next_forward(self, chunk: int) -> Action:
        return Action("F", self._stages[chunk], next(self._forwards[chunk]))

    def _next_backward(self, chunk: int, kind: str) -> Action:
        return Action(kind, self._stages[chunk], next(self._backwards[chunk]))
