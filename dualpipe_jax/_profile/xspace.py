"""A profile's file (`*.xplane.pb`) -> its compiled programs, and when each instruction ran where.

A file is an XSpace: planes, of lines, of events, times in picoseconds. Names of events and of their
stats are numbers that each plane resolves. The plane `/host:metadata` holds each compiled program
as an HloProto, under `jit_step(26)`, a module's name and its id.

- CPUs: events in the plane `/host:CPU`, whose lines are threads. Instructions have the stats
  `hlo_op`, `hlo_module`, `program_id`, `device_ordinal`, and `run_id`, the same on all devices.
- GPUs, TPUs: a plane for each device, `/device:GPU:0`. Instructions have `hlo_op` or are named by
  their event; no stat tells runs apart.

Source: tsl/profiler/protobuf/xplane.proto of https://github.com/openxla/xla.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dualpipe_jax._profile.wire import as_bytes, as_int, as_text, fields, message

_HOST = "/host:CPU"
_DEVICE = re.compile(r"/device:(?:GPU|TPU):(\d+)$")
_STATS = frozenset({"hlo_op", "hlo_module", "program_id", "run_id", "device_ordinal"})
_METADATA = "/host:metadata"
_INSTRUCTION = re.compile(r"%?([\w.\-]+)(?: = |$)")
_NS = 1e-3  # nanoseconds in a picosecond


class Event(NamedTuple):
    """One run of an instruction.

    Attributes:
      program: The name of its program, `"jit_step(26)"`.
      run: The run of the program; None where the file does not tell.
      device: The device.
      instruction: The instruction's name.
      start: When it starts, in nanoseconds.
      end: When it ends.
    """

    program: str
    run: int | None
    device: int
    instruction: str
    start: float
    end: float


class Space(NamedTuple):
    """Holds the programs of a file, as HloProtos by name, and the events of instructions."""

    programs: dict[str, memoryview]
    events: list[Event]


class _Plane(NamedTuple):
    name: str
    lines: list[memoryview]
    events: dict[int, memoryview]  # XEventMetadata
    stats: dict[int, str]


def read(path: Path) -> Space:
    """Reads a file.

    Raises:
      ValueError: If it is no such file.
      OSError: If it cannot be read.
    """
    data = memoryview(path.read_bytes())
    try:
        planes = [_plane(as_bytes(value)) for number, value in fields(data) if number == 1]
        programs = {
            name: proto
            for plane in planes
            if plane.name == _METADATA
            for name, proto in _programs(plane)
        }
        events = [event for plane in planes for event in _events(plane, programs)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: is no profile of JAX: {error}") from error
    return Space(programs, events)


def _plane(data: memoryview) -> _Plane:
    plane = _Plane("", [], {}, {})
    for number, value in fields(data):
        if number == 2:
            plane = plane._replace(name=as_text(value))
        elif number == 3:
            plane.lines.append(as_bytes(value))
        elif number in (4, 5):
            entry = message(value)
            key, of_key = as_int(entry.get(1, 0)), as_bytes(entry[2])
            if number == 4:
                plane.events[key] = of_key
            else:
                plane.stats[key] = as_text(message(of_key).get(2, memoryview(b"")))
    return plane


def _programs(plane: _Plane) -> Iterator[tuple[str, memoryview]]:
    for metadata in plane.events.values():
        name, proto = "", None
        for number, value in fields(metadata):
            if number == 2:
                name = as_text(value)
            elif number == 5:
                stat = message(value)
                if plane.stats.get(as_int(stat.get(1, 0))) == "Hlo Proto":
                    proto = as_bytes(stat[6])
        if proto is not None:
            yield name, proto


def _events(plane: _Plane, programs: dict[str, memoryview]) -> Iterator[Event]:
    """Yields the events of instructions of the file's programs."""
    device = _DEVICE.search(plane.name)
    if device is None and plane.name != _HOST:
        return
    by_id = {name.rpartition("(")[2].rstrip(")"): name for name in programs}
    by_module = {name.rpartition("(")[0]: name for name in programs}
    of_metadata = {key: _described(plane, data) for key, data in plane.events.items()}
    for line in plane.lines:
        of_line = list(fields(line))
        start_of_line = next((as_int(value) for number, value in of_line if number == 3), 0)
        for event in (as_bytes(value) for number, value in of_line if number == 4):
            metadata, offset, duration, stats = 0, 0, 0, []
            for number, value in fields(event):
                if number == 1:
                    metadata = as_int(value)
                elif number == 2:
                    offset = as_int(value)
                elif number == 3:
                    duration = as_int(value)
                elif number == 4:
                    stats.append(as_bytes(value))
            name, known = of_metadata.get(metadata, ("", {}))
            # On the host most events have no stats, or other ones: markers and Python's calls.
            if device is None and (len(stats) < 3 or ":" in name):
                continue
            known = {**known, **dict(_stat(plane, stat) for stat in stats)}
            instruction = known.get("hlo_op", name if device else None)
            program = by_id.get(str(known.get("program_id"))) or by_module.get(
                str(known.get("hlo_module"))
            )
            if instruction is None or program is None:
                continue
            run = known.get("run_id")
            start = start_of_line + offset * _NS
            yield Event(
                program=program,
                run=run if isinstance(run, int) else None,
                device=int(device[1]) if device else int(known.get("device_ordinal", 0)),
                instruction=str(instruction),
                start=start,
                end=start + duration * _NS,
            )


def _described(plane: _Plane, data: memoryview) -> tuple[str, dict[str, int | str]]:
    """Reads the name of an instruction off its event's, and the stats that all its events have.

    On TPUs the name is the instruction's whole text.
    """
    name, stats = "", {}
    for number, value in fields(data):
        if number == 2:
            text = as_text(value)
            found = _INSTRUCTION.match(text)
            name = found[1] if found else text
        elif number == 5:
            key, stat = _stat(plane, as_bytes(value))
            stats[key] = stat
    return name, stats


def _stat(plane: _Plane, data: memoryview) -> tuple[str, int | str]:
    """Reads a stat: its name, and its number or string; of others than `_STATS` nothing."""
    name, value = "", 0
    for number, content in fields(data):
        if number == 1:
            name = plane.stats.get(as_int(content), "")
            if name not in _STATS:
                break
        elif number in (3, 4):
            value = as_int(content)
        elif number == 5:
            value = as_text(content)
        elif number == 7:  # the name of another stat
            value = plane.stats.get(as_int(content), "")
    return name, value
