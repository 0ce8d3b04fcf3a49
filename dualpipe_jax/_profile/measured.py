"""A run of a step -> its measured timetable: which rank ran which action when.

Each trip of the loop over ticks is a tick of the tables, each trip of the loop over beats six. They
say which stage and microbatch it is; the instructions that ran must be those of its action.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dualpipe_jax import _scopes
from dualpipe_jax._predict import Costs, Simulation, replay_decided
from dualpipe_jax._profile.moments import Action, Segment, Span, divide
from dualpipe_jax._profile.parts import KINDS
from dualpipe_jax._profile.steps import Plan, Step, starts_of_trips
from dualpipe_jax._schedule.actions import Opcode, letter_of
from dualpipe_jax._schedule.ir import TICKS_PER_BEAT

_SECONDS = 1e-9  # of a nanosecond
_FULL = (Opcode.BACKWARD, Opcode.BACKWARD_UPPER, Opcode.BACKWARD_LOWER)
_HEAD = _scopes.HEAD.removeprefix(_scopes.PREFIX)
_NAME_DEVICES = "where devices are not numbered in order of rank, name them in that order"
_NOTHING = (Opcode.IDLE, Opcode.WEIGHT_GRAD_DONE)


@dataclass(frozen=True, kw_only=True)
class RankTimes:
    """Sums up the time of a rank, in seconds.

    Attributes:
      forward: In F, with embedding and head (whose gradient runs with its value).
      input_grad: In I, with the embedding's gradient.
      weight_grad: In W.
      send: In transfers that no action hides, and in the waits for the other rank.
      idle: In none of the actions; transfers are a part of it.
    """

    forward: float
    input_grad: float
    weight_grad: float
    send: float
    idle: float


@dataclass(frozen=True, eq=False, kw_only=True)
class Measured:
    """Holds the measured timetable of a step.

    Attributes:
      plan: How the step came about.
      segments: The parts of actions, and transfers, of all ranks in order of time.
    """

    plan: Plan
    segments: tuple[Segment, ...]

    @cached_property
    def makespan(self) -> float:
        """The time from the first action of any rank to the end of the last one, in seconds."""
        return max(segment.end for segment in self.segments if segment.kind != "send")

    @cached_property
    def ranks(self) -> tuple[RankTimes, ...]:
        """The times of each rank."""
        found = []
        for rank in range(self.plan.schedule.num_ranks):
            forward, input_grad, weight_grad, send = (
                self._seconds(rank=rank, kind=kind) for kind in ("F", "I", "W", "send")
            )
            found.append(
                RankTimes(
                    forward=forward,
                    input_grad=input_grad,
                    weight_grad=weight_grad,
                    send=send,
                    idle=self.makespan - forward - input_grad - weight_grad,
                )
            )
        return tuple(found)

    @property
    def idle_share(self) -> float:
        """The share of the time of all ranks in which they run no action."""
        return sum(rank.idle for rank in self.ranks) / (len(self.ranks) * self.makespan)

    @cached_property
    def costs(self) -> Costs:
        """The mean durations of actions of a rank's whole share of the layers, in seconds."""
        num_microbatches = self.plan.schedule.num_microbatches
        num_shares = num_microbatches * self.plan.schedule.num_ranks

        def of_part(*scopes: str) -> float:
            names = {scope.removeprefix(_scopes.PREFIX) for scope in scopes}
            return sum(segment.seconds for segment in self.segments if segment.part in names)

        return Costs.with_whole_ends(
            forward=of_part(_scopes.FORWARD) / num_shares,
            input_grad=of_part(_scopes.INPUT_GRAD) / num_shares,
            weight_grad=of_part(_scopes.WEIGHT_GRAD) / num_shares,
            embed=of_part(_scopes.EMBED, _scopes.EMBED_GRAD) / num_microbatches,
            head=of_part(_scopes.HEAD) / num_microbatches,
        )

    @cached_property
    def predicted(self) -> Simulation:
        """The step by simulation, at the measured costs and with transfers that take no time."""
        return replay_decided(
            self.plan.schedule,
            self.plan.placement.execution,
            costs=self.costs,
            layers=self.plan.placement.layers,
            placed_by=self.plan.placement.costs,
        )

    @cached_property
    def joined(self) -> tuple[Segment, ...]:
        """The segments rank by rank, the parts of an action that follow one another as one.

        They are cut where the first action of any rank starts, and where the last one ends.
        """
        found: list[Segment] = []
        for rank in range(self.plan.schedule.num_ranks):
            before: Segment | None = None
            for each in (segment for segment in self.segments if segment.rank == rank):
                start, end = max(each.start, 0.0), min(each.end, self.makespan)
                goes_on = before is not None and (before.end, before.name, before.tick) == (
                    each.start,
                    each.name,
                    each.tick,
                )
                if goes_on and found:
                    parts = found[-1].part.split(", ")
                    part = ", ".join([*parts, *({each.part} - {*parts})])
                    found[-1] = replace(found[-1], end=end, part=part)
                elif start < end:
                    found.append(replace(each, start=start, end=end))
                before = each
        return tuple(found)

    def _seconds(self, *, rank: int, kind: str) -> float:
        return sum(
            min(segment.end, self.makespan) - max(segment.start, 0.0)
            for segment in self.segments
            if segment.rank == rank
            and segment.kind == kind
            and segment.end > 0
            and segment.start < self.makespan
        )


def measure(step: Step, devices: Sequence[int] | None = None) -> Measured:
    """Makes the measured timetable of a step.

    Args:
      step: The run of a step.
      devices: The devices of a pipeline, in order of rank; by default all devices of the profile,
        sorted by number.

    Raises:
      ValueError: If devices are not as many as the ranks, or the events of a rank are not those of
        its actions in the timetable. The message names options of the command line.
    """
    num_ranks, present = step.plan.schedule.num_ranks, sorted(step.events_of)
    if devices is None and len(present) != num_ranks:
        raise ValueError(
            f"the profile has events of devices {_listed(present)}, and the schedule {num_ranks} "
            "ranks: name the devices of one pipeline, in order of rank (--devices 0,1,2,3)"
        )
    chosen = list(present if devices is None else devices)
    if len(chosen) != num_ranks or len({*chosen} & {*present}) != num_ranks:
        raise ValueError(
            f"--devices {_listed(chosen)}: must be {num_ranks} different ones, one for each rank, "
            f"of {_listed(present)}, which the profile has"
        )
    of_ranks = [divide(_spans(step, rank, device)) for rank, device in enumerate(chosen)]
    starts = [start for moments in of_ranks for start, _, action in moments if action is not None]
    if not starts:
        raise ValueError("the profile has no events of actions in this step")
    segments = [
        _segment(step.plan, rank, action, (start - min(starts), end - min(starts)))
        for rank, moments in enumerate(of_ranks)
        for start, end, action in moments
    ]
    ordered = sorted(segments, key=lambda segment: (segment.start, segment.rank))
    return Measured(plan=step.plan, segments=tuple(ordered))


def _segment(plan: Plan, rank: int, action: Action | None, times: tuple[float, float]) -> Segment:
    start, end = (time * _SECONDS for time in times)
    if action is None:
        return Segment(
            rank=rank,
            kind="send",
            part=_scopes.SEND.removeprefix(_scopes.PREFIX),
            stage=None,
            microbatch=None,
            direction=None,
            tick=None,
            start=start,
            end=end,
        )
    microbatch = int(plan.tables.microbatch[action.tick, rank])
    return Segment(
        rank=rank,
        kind=action.kind,
        part=action.part,
        stage=int(plan.tables.stage[action.tick, rank]),
        microbatch=microbatch,
        direction=int(plan.schedule.program.direction_of[microbatch]),
        tick=action.tick,
        start=start,
        end=end,
    )


def _spans(step: Step, rank: int, device: int) -> list[Span]:
    """Gives each event of a rank that is a part of the timetable its action.

    Raises:
      ValueError: If the events are not those of the rank's actions.
    """
    plan, parts, events = step.plan, step.parts, step.events_of[device]
    ramp, steady = plan.ramp.tolist(), plan.tables.steady
    ticks = step.ticks_of(device)
    where = f"rank {rank} (device {device}) of {plan.schedule.name!r}"
    if len(ticks) != len(ramp):
        raise ValueError(
            f"{where} ran {len(ticks)} ticks in this step, and the timetable has {len(ramp)} "
            "outside of its steady phase: the step is not whole, or the profiler dropped events; "
            "take a profile of fewer steps, or name another --step"
        )
    trips: list[float] = []
    if steady is not None and parts.beats is not None:
        trips = starts_of_trips(events, parts.stands_in(parts.beats))
    per_trip = 1 if steady is None else steady.period
    num_trips = 0 if steady is None else steady.num_beats // per_trip
    if len(trips) != num_trips:
        raise ValueError(
            f"{where} ran {per_trip * len(trips)} beats in this step, and the timetable has "
            f"{per_trip * num_trips}: the profile is not that of this release's program"
        )
    spans: list[Span] = []
    last: dict[int, Action] = {}
    for event in events:
        part = parts.of(event.instruction)
        if part is None:
            continue
        starts = ticks if part.beat is None else trips
        number = bisect_right(starts, event.start) - 1
        if number < 0:
            continue
        group = number if part.beat is None else -1 - number
        action = last.get(group)
        if part.scope == _scopes.SEND:
            action = None
        elif part.scope:
            kind, name = KINDS[part.scope], part.scope.removeprefix(_scopes.PREFIX)
            if part.beat is None:
                tick = ramp[number]
            else:
                assert steady is not None
                beat = steady.period * number + part.beat
                tick = steady.first_tick + TICKS_PER_BEAT * beat + "FIW".index(kind)
            action = last[group] = Action(tick, kind, name)
        elif action is None:
            continue  # before the first instruction of the action
        spans.append(Span(event.start, event.end, action, group))
    _require_actions(step, rank, spans, where)
    return spans


def _require_actions(step: Step, rank: int, spans: Sequence[Span], where: str) -> None:
    """Requires in each tick the actions of the timetable, and no others."""
    ran: dict[int, set[str]] = {}
    last_stage = step.plan.schedule.num_stages - 1
    for span in spans:
        if span.action is None:
            continue
        tick, kind, part = span.action
        ran.setdefault(tick, set()).add(kind)
        if part == _HEAD and step.plan.tables.stage[tick, rank] != last_stage:
            raise ValueError(
                f"{where} ran the head in tick {tick}, where the timetable has another stage than "
                f"the last one: {_NAME_DEVICES}"
            )
    for tick, wanted in _wanted(step, rank):
        found = ran.get(tick, set())
        # In a stage without layers the ends run, or nothing.
        has_layers = step.plan.placement.layers.sizes[step.plan.tables.stage[tick, rank]] > 0
        if not (found == wanted if has_layers else found <= wanted):
            raise ValueError(
                f"{where} ran {_named(found)} in tick {tick}, where the timetable has "
                f"{_named(wanted)}: the profile does not fit the timetable; {_NAME_DEVICES}"
            )


def _wanted(step: Step, rank: int) -> Iterator[tuple[int, set[str]]]:
    """Yields the actions of a rank in each tick, of those that the program has."""
    tables = step.plan.tables
    in_ticks, in_beats = step.parts.kinds
    beats = range(0) if tables.steady is None else range(*tables.steady.ticks.indices(10**9))
    for tick, opcode in enumerate(tables.opcode[:, rank].tolist()):
        kinds = in_beats if tick in beats else in_ticks
        wanted = "" if opcode in _NOTHING else "IW" if opcode in _FULL else letter_of(opcode)
        yield tick, {kind for kind in wanted if kind in kinds}


def _named(kinds: set[str]) -> str:
    return " and ".join(sorted(kinds)) or "no action"


def _listed(devices: Sequence[int]) -> str:
    return ", ".join(map(str, devices)) or "none"
