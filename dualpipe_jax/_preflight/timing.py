"""Replays one trip of a loop: when each collective starts, and for how long compute waits for it.

Compute takes the compiler's estimate of cycles, or its FLOPs at the published peak where there is
no estimate. Asynchronous collectives that go the same way along a mesh axis share its links and go
one after the other; so do copies to the host, and copies from it, on the link to the host, and
transfers between slices of TPUs on the network of a host. A loop inside counts as often as it runs.

The exposed time is that for which compute stands still: all of a synchronous collective's, and the
part of an asynchronous one's link time beyond the compute between its start and its done.

A rank hides a transfer behind its own work. All ranks run the straight-line code, loops of a known
number of trips, and the cheapest branch of a conditional. Beside these a rank that acts runs one of
the optional parts: the actions of a tick, which ranks run or pass over. So a trip is replayed once
for each part, with that one run and the others passed over, and the worst of these replays counts:
that of the rank that acts and has least to hide a collective behind. One more replay, of a rank
that passes over all parts, gives `most_exposed_seconds`. Without parts the two are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dualpipe_jax import _scopes
from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.collectives import (
    FROM_HOST,
    TO_HOST,
    FoundCollective,
    find_collectives,
)
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.kernels import Kernels
from dualpipe_jax._preflight.links import Lane, Network
from dualpipe_jax._preflight.work import CompiledWork, WorkCounter, action_of, trip_count


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Tells how long a collective takes in a trip of a loop, and how much of it is hidden.

    Or a copy to the host's memory or from it.

    FLOPs, cycles and times between its start and its done are those of a rank that acts.

    Attributes:
      kind: `"collective-permute"`, `"all-to-all"`, ..., `"to host"`, `"from host"`.
      name: The name of the instruction that starts it.
      op_name: The JAX functions and scopes that it stands for.
      axes: The mesh axes along which it moves data; none of a copy.
      across_slices: Whether it goes over the network between slices of TPUs.
      count: How often it runs in a trip of the loop; if in a branch, in a trip that takes it.
      conditional: The name of the conditional in one of whose branches it runs, of which a trip
        takes one; None outside of branches.
      branch: The branch's number.
      num_runs: How many of a step's trips take that branch, by the schedule's tables; None outside
        of branches, and where the tables are not known.
      is_async: Whether compute goes on between its start and its done.
      num_bytes: Bytes of a device's operands; for an all-gather those of its result; for a ragged
        all-to-all those of the smaller of its two buffers, which is the most that may move where no
        row goes to two devices.
      flops: FLOPs of the matmuls between its start and its done.
      cycles: Cycles of the instructions between, as the compiler estimates; None if it does not.
      compute_seconds: How long that takes; None where neither cycles nor a peak are known.
      link_seconds: How long its bytes need on its links, at the published bandwidth; None where
        none is published.
      exposed_seconds: For how long compute stands still for it; None where times are unknown.
      most_exposed_seconds: The same on a rank that passes over all optional parts.
    """

    kind: str
    name: str
    op_name: str
    axes: tuple[str, ...]
    across_slices: bool = False
    count: int
    conditional: str | None = None
    branch: int | None = None
    num_runs: int | None = None
    is_async: bool
    num_bytes: int
    flops: float
    cycles: float | None
    compute_seconds: float | None
    link_seconds: float | None
    exposed_seconds: float | None
    most_exposed_seconds: float | None

    @property
    def is_host_copy(self) -> bool:
        """Whether it is a copy to the host's memory or from it."""
        return self.kind in _WAY_TO_HOST

    @property
    def is_hidden(self) -> bool | None:
        """Whether it is asynchronous and costs no time; None where times are unknown."""
        if not self.is_async:
            return False
        return None if self.exposed_seconds is None else self.exposed_seconds == 0

    @property
    def is_beside_another(self) -> bool:
        """Whether it is hidden only because compute waits for another collective meanwhile."""
        return self.is_hidden is True and (self.compute_seconds or 0) < (self.link_seconds or 0)


def with_runs(
    collectives: Iterable[Collective], runs: Mapping[str, Sequence[int]]
) -> list[Collective]:
    """Adds to each collective in a branch how often a step takes the branch.

    Args:
      collectives: The collectives of a trip.
      runs: For conditionals by name, how often each of the branches is taken.
    """
    return [
        collective
        if collective.branch is None or collective.conditional not in runs
        else replace(collective, num_runs=runs[collective.conditional][collective.branch])
        for collective in collectives
    ]


def exposed_seconds(
    collectives: Sequence[Collective],
    *,
    num_trips: int | None = None,
    choose: Callable[[Iterable[float]], float] = max,
) -> float | None:
    """Sums up for how long compute stands still in a trip; None where times are unknown.

    A trip takes one branch of a conditional. The mean over a step's trips counts where it is known
    how many take which, else the branch that costs most.

    Args:
      collectives: The collectives of a trip.
      num_trips: The trips of a step.
      choose: Chooses the branch that counts where it is not known how many trips take which.
    """
    if any(collective.exposed_seconds is None for collective in collectives):
        return None
    total = 0.0
    branches: dict[str, dict[int, float]] = {}
    for collective in collectives:
        seconds = (collective.exposed_seconds or 0.0) * collective.count
        if collective.conditional is None or collective.branch is None:
            total += seconds
        elif collective.num_runs is not None and num_trips:
            total += seconds * collective.num_runs / num_trips
        else:
            of_branch = branches.setdefault(collective.conditional, {})
            of_branch[collective.branch] = of_branch.get(collective.branch, 0.0) + seconds
    return total + sum(choose(of_branch.values()) for of_branch in branches.values())


# The ways of copies on the link to the host, which carries as much each way.
_WAY_TO_HOST = {TO_HOST: 1, FROM_HOST: -1}
# The actions that every rank runs: its optional parts. Few ranks have the ends.
_OF_ALL_RANKS = {_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD}


@dataclass(frozen=True)
class OptionalPart:
    """Holds the instruction of a loop or a branch, and its work on a rank that runs it."""

    instruction: str
    work: CompiledWork


def find_parts(
    module: Module, where: Computation, *, at_least: WorkCounter, at_most: WorkCounter
) -> list[OptionalPart]:
    """Lists the loops and branches of a computation that some ranks run and others pass over.

    Such a loop is one whose number of trips is not in the text: a rank decides it as it runs. A
    branch counts with its cost beyond the cheapest one, which all ranks run at least. In a step of
    this library the parts are the forwards, input grads and weight grads, of which a rank that acts
    runs one; the ends, which few ranks have, and the permutes are none. In other programs all such
    loops and branches are parts. Loops and branches inside them are not listed.
    """
    found = [
        (part, {action_of(instruction.op_name) for instruction in module.within(inside)})
        for part, inside in _candidates(module, where, at_most)
        if part.work != at_least.of(where.by_name[part.instruction], where)
    ]
    names = {instruction.op_name for instruction in module.within(where)}
    if not any(scope in name for scope in (_scopes.RAMP, _scopes.STEADY) for name in names):
        return [part for part, _ in found]
    return [part for part, actions in found if actions & _OF_ALL_RANKS]


def _candidates(
    module: Module, where: Computation, at_most: WorkCounter
) -> Iterator[tuple[OptionalPart, Computation]]:
    """Yields the loops of unknown length and the branches, each with its contents."""
    for loop in where.instructions:
        match loop.opcode:
            case "while" if trip_count(module, loop, where) is None:
                body = module.computations[loop.called["body"][0]]
                yield OptionalPart(loop.name, at_most.of(loop, where)), body
            case "conditional":
                for branch in module.branches(loop):
                    yield OptionalPart(loop.name, at_most.of_computation(branch)), branch


class Replay:
    """Replays computations of one module."""

    def __init__(self, module: Module, network: Network, kernels: Kernels | None = None):
        self._module = module
        options = {"kernels": kernels, "device": network.device}
        self._least_work = WorkCounter(module, at_least=True, **options)
        self._most_work = WorkCounter(module, **options)
        self._network = network

    def run(self, where: Computation, *, loops: bool = True) -> list[Collective]:
        """Lists the collectives of one run of a computation.

        Args:
          where: The computation.
          loops: Whether those of its loops and branches are among them.
        """
        found = find_collectives(self._module, where)
        inside = {}
        if loops:
            inside = {i.name: self._inside(i, where) for i in where.instructions}
        parts = find_parts(self._module, where, at_least=self._least_work, at_most=self._most_work)
        passing = self._trip(where, found, inside, None)
        acting = [self._trip(where, found, inside, part) for part in parts] or [passing]
        out = []
        for instruction in where.instructions:
            name = instruction.name
            if name in passing:
                worst = max((trip[name] for trip in acting), key=_shortfall)
                out.append(replace(worst, most_exposed_seconds=passing[name].exposed_seconds))
            out += inside.get(name, [])
        return out

    def _trip(
        self,
        where: Computation,
        found: list[FoundCollective],
        inside: dict[str, list[Collective]],
        part: OptionalPart | None,
    ) -> dict[str, Collective]:
        """Replays a rank that runs a part, or none: its own collectives, by their starts."""
        started = {one.start.name: one for one in found}
        awaited = {one.done.name: one for one in found if one.done is not None}
        clock, done_work = 0.0, CompiledWork()
        free: dict[Lane, float] = {}  # when links that way along an axis are free
        flights: dict[
            str, tuple[float, CompiledWork]
        ] = {}  # when it arrives, and the work before it
        out: dict[str, Collective] = {}
        for instruction in where.instructions:
            name = instruction.name
            if name in awaited:
                one = awaited[name]
                arrives, before = flights[one.start.name]
                exposed = max(0.0, arrives - clock)
                between = CompiledWork(
                    done_work.flops - before.flops, done_work.cycles - before.cycles
                )
                out[one.start.name] = self._collective(one, between, exposed)
                clock += exposed
            elif name in started:
                one = started[name]
                seconds = self._link_seconds(one) or 0.0
                lanes = self._lanes(one)
                arrives = max([clock, *(free.get(lane, 0.0) for lane in lanes)]) + seconds
                free |= dict.fromkeys(lanes, arrives)
                flights[name] = arrives, done_work
                if one.done is None:
                    out[name] = self._collective(one, CompiledWork(), arrives - clock)
                    clock = arrives
            else:
                work = self._least_work.of(instruction, where)
                if part is not None and part.instruction == name:
                    work = part.work
                done_work += work
                clock += self.seconds(work) or 0.0
                clock += exposed_seconds(inside.get(name, []), choose=min) or 0.0
        return out

    def seconds(self, work: CompiledWork) -> float | None:
        """Says how long compute takes; None where nothing is known of the device."""
        device = self._network.device
        if device is None:
            return None
        if device.clock is not None:
            return work.cycles / device.clock
        return work.flops / device.peak_flops

    def _inside(self, instruction: Instruction, where: Computation) -> list[Collective]:
        """Lists the collectives in the body of a loop and in the branches of a conditional."""
        if instruction.opcode not in ("while", "conditional", "call"):
            return []
        out = []
        if instruction.opcode == "conditional":
            for number, branch in enumerate(self._module.branches(instruction)):
                for collective in self.run(branch):
                    if collective.conditional is None:
                        collective = replace(
                            collective, conditional=instruction.name, branch=number
                        )
                    out.append(collective)
            return out
        trips = 1
        if instruction.opcode == "while":
            trips = trip_count(self._module, instruction, where) or 1
        for callee in self._module.callees(instruction):
            out += [replace(inner, count=inner.count * trips) for inner in self.run(callee)]
        return out

    def _lanes(self, found: FoundCollective) -> set[Lane]:
        way = _WAY_TO_HOST.get(found.kind)
        return self._network.lanes_of(found.collective) if way is None else {("", way)}

    def _link_seconds(self, found: FoundCollective) -> float | None:
        if found.kind in _WAY_TO_HOST:
            link = self._network.host_link
            return None if link is None else found.num_bytes / link
        return self._network.seconds(found.kind, found.collective, found.num_bytes)

    def _collective(
        self, found: FoundCollective, between: CompiledWork, exposed: float
    ) -> Collective:
        device: Device | None = self._network.device
        link_seconds = self._link_seconds(found)
        has_cycles = device is not None and device.clock is not None
        return Collective(
            kind=found.kind,
            name=found.start.name,
            op_name=found.collective.op_name or found.start.op_name,
            axes=() if found.kind in _WAY_TO_HOST else self._network.axes_of(found.collective),
            across_slices=found.collective.is_across_slices,
            count=1,
            is_async=found.done is not None,
            num_bytes=found.num_bytes,
            flops=between.flops,
            cycles=between.cycles if has_cycles else None,
            compute_seconds=self.seconds(between),
            link_seconds=link_seconds,
            exposed_seconds=None if link_seconds is None else exposed,
            most_exposed_seconds=None if link_seconds is None else exposed,
        )


def _shortfall(collective: Collective) -> tuple[float, float, float]:
    """Orders replays of a collective by how little of it is hidden."""
    return (
        collective.exposed_seconds or 0.0,
        -(collective.cycles or 0.0),
        -collective.flops,
    )
