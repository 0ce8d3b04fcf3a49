"""A profile's folder -> the runs of pipelined steps in it, in order of time."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dualpipe_jax import _scopes
from dualpipe_jax._predict import Placement, compile_for
from dualpipe_jax._profile.parts import Parts, find_parts
from dualpipe_jax._profile.program import Program, parse
from dualpipe_jax._profile.xspace import Event, read
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule, make

_SUFFIX = ".xplane.pb"


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """Holds how a compiled step says that it came about.

    Attributes:
      schedule: Its schedule.
      placement: How its actions were placed in ticks.
    """

    schedule: Schedule
    placement: Placement

    @cached_property
    def tables(self) -> Tables:
        """The tables that the step runs."""
        made, _ = compile_for(
            self.schedule,
            self.placement.execution,
            costs=self.placement.costs,
            transfer=0.0,
            layers=self.placement.layers,
            placed_by=self.placement.costs,
        )
        return made.tables

    @cached_property
    def ramp(self) -> np.ndarray:
        """int[num_ticks], the ticks outside of the steady phase, in order."""
        steady = self.tables.steady
        ticks = np.arange(self.tables.num_ticks)
        return ticks if steady is None else np.delete(ticks, steady.ticks)


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """Holds one run of a pipelined step.

    Attributes:
      plan: How it came about.
      parts: Its program.
      events_of: Its events in order of time, by device.
    """

    plan: Plan
    parts: Parts
    events_of: dict[int, list[Event]]

    @property
    def start(self) -> float:
        """When its first instruction starts, in nanoseconds."""
        return min(events[0].start for events in self.events_of.values())

    def ticks_of(self, device: int) -> list[float]:
        """Lists when each trip of the loop over ticks starts, in nanoseconds."""
        return starts_of_trips(self.events_of[device], self.parts.stands_in(self.parts.ticks))

    @property
    def is_whole(self) -> bool:
        """Whether each device has as many ticks as the timetable, for as many ranks or more."""
        has_ranks = len(self.events_of) >= self.plan.schedule.num_ranks
        num_ticks = len(self.plan.ramp)
        return has_ranks and all(len(self.ticks_of(d)) == num_ticks for d in self.events_of)


def find_steps(path: Path) -> list[Step]:
    """Finds the runs of steps of named schedules in a profile.

    Args:
      path: A folder that `jax.profiler.start_trace` was given, or an `.xplane.pb` file. If a folder
        has several profiles, the newest one is read.

    Raises:
      ValueError: If it has no profile, or the profile has no run of such a step.
      OSError: If it cannot be read.
    """
    file = _find_file(path)
    space = read(file)
    events: dict[str, list[Event]] = defaultdict(list)
    for event in space.events:
        events[event.program].append(event)
    steps = []
    for name, of_program in events.items():
        program = parse(name, space.programs[name])
        plan, parts = find_plan(program.op_names), find_parts(program)
        if plan is not None and parts is not None:
            steps += [
                Step(plan=plan, parts=parts, events_of=run) for run in _runs(program, of_program)
            ]
    if not steps:
        raise ValueError(
            f"{file}: has no run of a program that names a schedule of dualpipe_jax; its programs "
            f"are {', '.join(map(repr, sorted(events))) or 'none'}. (Names are those with which a "
            "program was compiled: one of an older release may come out of JAX's compilation "
            "cache. A schedule of your own, by Schedule.from_csv, has no name.)"
        )
    return sorted(steps, key=lambda step: step.start)


def find_plan(op_names: Iterable[str]) -> Plan | None:
    """Reads off a program's names how it came about; None if they do not say."""
    schedule = placement = None
    for name in op_names:
        schedule = schedule or _scopes.read_schedule(name)
        placement = placement or Placement.read(name)
        if schedule is not None and placement is not None:
            break
    else:
        return None
    name, num_ranks, num_microbatches = schedule

    schedule = make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    return Plan(schedule=schedule, placement=placement)


def starts_of_trips(events: Sequence[Event], names: frozenset[str]) -> list[float]:
    """Finds when each trip of a loop starts, by the instructions that each trip runs once.

    Args:
      events: The events of one device, in order of time.
      names: The names of those instructions. Some of them have no events.
    """
    starts: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.instruction in names:
            starts[event.instruction].append(event.start)
    num_trips = max(map(len, starts.values()), default=0)
    whole = [of_name for of_name in starts.values() if len(of_name) == num_trips]
    return [min(of_trip) for of_trip in zip(*whole, strict=True)]


def _runs(program: Program, events: list[Event]) -> Iterator[dict[int, list[Event]]]:
    """Divides the events of a program into its runs: those of each device, in order of time."""
    of_device: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.start):
        of_device[event.device].append(event)
    runs: dict[int, dict[int, list[Event]]] = defaultdict(lambda: defaultdict(list))
    in_entry = frozenset(each.name for each in program.standing_in.get(program.entry, ()))
    for device, of_one in of_device.items():
        # Without numbers of runs: by the instructions of the entry, which run once in each.
        starts = starts_of_trips(of_one, in_entry)
        for event in of_one:
            run = event.run
            if run is None:
                run = int(np.searchsorted(starts, event.start, side="right"))
            runs[run][device].append(event)
    yield from (dict(run) for run in runs.values())


def _find_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder or file")
    files = sorted(path.rglob(f"*{_SUFFIX}"), key=lambda file: (file.parent.name, file.name))
    if not files:
        raise ValueError(
            f"{path}: has no profile, a file *{_SUFFIX}, in it; jax.profiler.start_trace(folder) "
            "and stop_trace() around a few steps write one"
        )
    of_newest = [file for file in files if file.parent == files[-1].parent]
    if len(of_newest) > 1:
        raise ValueError(
            f"{path}: the newest profile has files of {len(of_newest)} processes, whose clocks "
            f"differ: name one of them, {', '.join(file.name for file in of_newest)}"
        )
    return files[-1]
