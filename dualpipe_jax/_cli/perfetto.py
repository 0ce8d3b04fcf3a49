"""Timetables -> a trace for ui.perfetto.dev: Chrome's trace events, a track for each rank.

Source: "Trace Event Format", Google, 2016.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dualpipe_jax._predict import TimedAction
from dualpipe_jax._profile import Measured
from dualpipe_jax._schedule.actions import EFFECTS

_MICROSECONDS = 1e6  # in a second
_DIGITS = 6
# A flow starts within the event of its sender: by this part of it before its end.
_BEFORE_END = 1e-3


class Bar(NamedTuple):
    """One event of a rank, in microseconds."""

    rank: int
    name: str
    start: float
    end: float
    args: dict[str, Any]


class Flow(NamedTuple):
    """An arrow from a rank at a time to another one, in microseconds."""

    source: tuple[int, float]
    target: tuple[int, float]
    name: str


@dataclass(frozen=True, kw_only=True)
class Process:
    """Holds a timetable: the name of its group of tracks, events and arrows."""

    name: str
    bars: Sequence[Bar]
    flows: Sequence[Flow] = ()


def predicted(name: str, actions: Sequence[TimedAction], *, unit: float = 1.0) -> Process:
    """Makes the events of a replay, and an arrow for each value that goes to another rank.

    Args:
      name: The name of the group.
      actions: The actions.
      unit: Microseconds in a unit of their times.
    """
    bars = [
        Bar(
            action.rank,
            action.name,
            action.start * unit,
            action.end * unit,
            {
                "opcode": action.opcode.name,
                "stage": action.stage,
                "microbatch": action.microbatch,
                "direction": action.direction,
                "tick": action.tick,
            },
        )
        for action in actions
    ]
    return Process(name=name, bars=bars, flows=list(_flows(actions, unit)))


def measured(name: str, found: Measured) -> Process:
    """Makes the events of a measured timetable."""
    bars = []
    for segment in found.segments:
        args = {
            "part": segment.part,
            "stage": segment.stage,
            "microbatch": segment.microbatch,
            "direction": segment.direction,
            "tick": segment.tick,
        }
        start, end = segment.start * _MICROSECONDS, segment.end * _MICROSECONDS
        stated = {key: value for key, value in args.items() if value is not None}
        bars.append(Bar(segment.rank, segment.name, start, end, stated))
    return Process(name=name, bars=bars)


def write(processes: Iterable[Process]) -> str:
    """Writes the trace, an event a line."""
    events = [event for number, each in enumerate(processes) for event in _events(number, each)]
    lines = ",\n".join(json.dumps(event) for event in events)
    return f'{{"displayTimeUnit": "ms", "traceEvents": [\n{lines}\n]}}\n'


def _events(pid: int, process: Process) -> Iterator[dict[str, Any]]:
    yield _named(pid, "process_name", name=process.name)
    yield _named(pid, "process_sort_index", sort_index=pid)
    for rank in sorted({bar.rank for bar in process.bars}):
        yield {**_named(pid, "thread_name", name=f"rank {rank}"), "tid": rank}
        yield {**_named(pid, "thread_sort_index", sort_index=rank), "tid": rank}
    for bar in process.bars:
        start, end = round(bar.start, _DIGITS), round(bar.end, _DIGITS)
        yield {
            "ph": "X",
            "pid": pid,
            "tid": bar.rank,
            "name": bar.name,
            "ts": start,
            "dur": round(end - start, _DIGITS),
            "args": bar.args,
        }
    for number, flow in enumerate(process.flows):
        both = {"cat": "send", "name": flow.name, "id": f"{pid}.{number}", "pid": pid}
        for phase, (rank, time) in (("s", flow.source), ("f", flow.target)):
            event = {"ph": phase, **both, "tid": rank, "ts": round(time, _DIGITS)}
            yield {**event, "bp": "e"} if phase == "f" else event


def _named(pid: int, kind: str, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "name": kind, "args": args}


def _flows(actions: Sequence[TimedAction], unit: float) -> Iterator[Flow]:
    """Yields an arrow for each x and each cotangent that another rank makes."""
    for reader in actions:
        if reader.source is not None:
            maker = actions[reader.source]
            sent = maker.end - _BEFORE_END * (maker.end - maker.start)
            value = EFFECTS[reader.opcode].takes
            yield Flow((maker.rank, sent * unit), (reader.rank, reader.start * unit), value)
