"""Spans of instructions on one rank -> to which action each moment belongs.

A moment belongs to an action whose instruction runs; where two actions run at once, to the one
whose instruction began last. Else it belongs to a transfer, if one is under way: so a transfer that
compute hides takes no time. A pause between two instructions of a tick, or of a trip over beats, in
which nothing of the above runs, belongs to the action before it.

>>> F, I = Action(0, "F", "forward"), Action(1, "I", "input_grad")
>>> spans = [Span(0, 4, F, 0), Span(5, 7, F, 0), Span(6, 12, None, 0), Span(14, 20, I, 1)]
>>> for start, end, action in divide(spans):
...     print(start, end, action and action.kind)
0 7 F
7 12 None
14 20 I
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Action(NamedTuple):
    """Names a part of an action of one rank.

    Attributes:
      tick: The row of the tables.
      kind: F, I or W; in the tick of a full backward both I and W.
      part: The scope: `forward`, `head`.
    """

    tick: int
    kind: str
    part: str


class Span(NamedTuple):
    """Tells when an instruction ran.

    Attributes:
      start: When it started.
      end: When it ended.
      action: Its action; None for a transfer.
      group: A number for each tick and each trip over beats.
    """

    start: float
    end: float
    action: Action | None
    group: int


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Tells when a rank ran a part of an action without another one in between.

    Attributes:
      rank: The rank.
      kind: F, I or W; `"send"` for a transfer, in which a rank also waits for the other one.
      part: The scope, without its prefix: `forward`, `head`, `embed_grad`.
      stage: The stage; None for a transfer.
      microbatch: The microbatch; None for a transfer.
      direction: The direction; None for a transfer.
      tick: The tick of the timetable; None for a transfer.
      start: When it starts, in seconds since the first action of any rank.
      end: When it ends.
    """

    rank: int
    kind: str
    part: str
    stage: int | None
    microbatch: int | None
    direction: int | None
    tick: int | None
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """The action as the text form of a timetable writes it: F3, or f3 in direction 1."""
        if self.direction is None:
            return self.kind
        letter = self.kind if self.direction % 2 == 0 else self.kind.lower()
        return f"{letter}{self.microbatch}"


def divide(spans: Iterable[Span]) -> list[tuple[float, float, Action | None]]:
    """Lists (start, end, action) in order of time, None for a transfer that no action hides."""
    found: list[tuple[float, float, Action | None]] = []
    group_of_last = None
    for start, end, span in _moments(spans):
        if found:
            before, until, action = found[-1]
            is_near = group_of_last == span.group and action is not None
            if is_near and span.action is not None and until < start:
                found[-1] = (before, start, action)
                until = start
            if until == start and action == span.action:
                found[-1] = (before, end, action)
                continue
        found.append((start, end, span.action))
        group_of_last = span.group
    return found


def _moments(spans: Iterable[Span]) -> Iterator[tuple[float, float, Span]]:
    """Yields the moments in which something runs, and the span to which each belongs."""
    ordered = sorted(spans, key=lambda span: span.start)
    edges = sorted({edge for span in ordered for edge in (span.start, span.end)})
    # The spans that have begun, actions before transfers, and of these the last one first.
    begun: list[tuple[bool, float, int]] = []
    number = 0
    for start, end in itertools.pairwise(edges):
        while number < len(ordered) and ordered[number].start <= start:
            span = ordered[number]
            heapq.heappush(begun, (span.action is None, -span.start, number))
            number += 1
        while begun and ordered[begun[0][2]].end <= start:
            heapq.heappop(begun)
        if begun:
            yield start, end, ordered[begun[0][2]]
