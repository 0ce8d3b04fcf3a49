"""Replays one trip of a loop: when each collective starts, when it is waited for, who waits.

Compute takes the compiler's estimate of cycles, or its FLOPs at the published peak where there is
no estimate. Asynchronous collectives that go the same way along a mesh axis share its links and go
one after the other. A loop inside counts as often as it runs.

What is exposed is the time for which compute stands still: all of a synchronous collective, and of
an asynchronous one what its links need beyond the compute between its start and its done.

A rank hides a transfer behind its own work. All ranks run the straight-line code, loops of a
known number of trips, and of a conditional at least the cheapest branch. Beside these a rank that
acts runs one of the `parts` that ranks run or pass over: the actions of a tick. So a trip is
replayed once for each part, with that one run and the others passed over, and the worst of these
replays counts: that of the rank that acts and has least to hide a collective behind. One more
replay, of a rank that passes over all parts, gives `most_exposed_seconds`. Without parts the two
are the same.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dualpipe_jax import _scopes
from dualpipe_jax._devices import Device
from dualpipe_jax._preflight.collectives import FoundCollective, find_collectives
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.kernels import Kernels
from dualpipe_jax._preflight.links import Lane, Network
from dualpipe_jax._preflight.work import CompiledWork, WorkCounter, action_of, trip_count


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Tells of a collective.

    FLOPs, cycles and times between its start and its done are those of a rank that acts (`timing`).

    Attributes:
      kind: `"collective-permute"`, `"all-to-all"`, ...
      name: The name of the instruction that starts it.
      op_name: The JAX functions and scopes that it stands for.
      axes: The mesh axes along which it moves data.
      count: How often it runs in a trip of the loop; of one in a branch, in a trip that takes it.
      conditional: The name of the conditional in one of whose branches it runs, of which a trip
        takes one; None outside of branches.
      branch: The branch's number.
      num_runs: How many of a step's trips take that branch, by the schedule's tables; None outside
        of branches, and where the tables are not known.
      is_async: Whether compute goes on between its start and its done.
      num_bytes: Bytes of a device's operands; of an all-gather, of its result; of a ragged
        all-to-all, of the smaller of its two buffers, which is the most that may move
        where no row goes to two devices.
      flops: FLOPs of the matmuls between its start and its done.
      cycles: Cycles of the instructions between, as the compiler estimates; None if it does not.
      compute_seconds: How long that takes; None where neither cycles nor a peak are known.
      link_seconds: How long its bytes need on its links, at the published bandwidth; None where
        none is published.
      exposed_seconds: For how long compute stands still for it; None where times are unknown.
      most_exposed_seconds: The same on a rank that passes over all that it may.
    """

    kind: str
    name: str
    op_name: str
    axes: tuple[str, ...]
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
    def is_hidden(self) -> bool | None:
        """Whether it is asynchronous and costs no time; None where times are unknown."""
        if not self.is_async:
            return False
        return None if self.exposed_seconds is None else self.exposed_seconds == 0

    @property
    def is_beside_another(self) -> bool:
        """Whether it costs no time since another one is waited for, and not for enough compute."""
        return self.is_hidden is True and (self.compute_seconds or 0) < (self.link_seconds or 0)


def with_runs(
    collectives: Iterable[Collective], runs: Mapping[str, Sequence[int]]
) -> list[Collective]:
    """Says of each collective in a branch how often a step takes the branch.

    Args:
      collectives: Those of a trip.
      runs: For conditionals by name, how often each of the branches is taken.
    """
    return [
        each
        if each.branch is None or each.conditional not in runs
        else replace(each, num_runs=runs[each.conditional][each.branch])
        for each in collectives
    ]


def exposed_seconds(
    collectives: Sequence[Collective],
    *,
    num_trips: int | None = None,
    choose: Callable[[Iterable[float]], float] = max,
) -> float | None:
    """Sums up for how long compute stands still in a trip; None where times are unknown.

    A trip takes one branch of a conditional. The mean over a step's trips counts, where it is known
    how many take which, else the branch that costs most.

    Args:
      collectives: Those of a trip.
      num_trips: The trips of a step.
      choose: Which branch counts of those of which nothing is known.
    """
    if any(each.exposed_seconds is None for each in collectives):
        return None
    total = 0.0
    branches: dict[str, dict[int, float]] = {}
    for each in collectives:
        seconds = (each.exposed_seconds or 0.0) * each.count
        if each.conditional is None or each.branch is None:
            total += seconds
        elif each.num_runs is not None and num_trips:
            total += seconds * each.num_runs / num_trips
        else:
            of_branch = branches.setdefault(each.conditional, {})
            of_branch[each.branch] = of_branch.get(each.branch, 0.0) + seconds
    return total + sum(choose(of_branch.values()) for of_branch in branches.values())


_OF_ALL_RANKS = {_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD}


@dataclass(frozen=True)
class OptionalPart:
    """Tells of a loop or a branch: its instruction, and its cost for a rank that runs it."""

    instruction: str
    work: CompiledWork


def find_parts(
    module: Module, where: Computation, *, at_least: WorkCounter, at_most: WorkCounter
) -> list[OptionalPart]:
    """Lists the parts of a computation, those in its loops and branches left out."""
    found = [
        (part, {action_of(each.op_name) for each in module.within(inside)})
        for part, inside in _candidates(module, where, at_most)
        if part.work != at_least.of(where.by_name[part.instruction], where)
    ]
    names = {each.op_name for each in module.within(where)}
    if not any(scope in name for scope in (_scopes.RAMP, _scopes.STEADY) for name in names):
        return [part for part, _ in found]
    return [part for part, actions in found if actions & _OF_ALL_RANKS]


def _candidates(
    module: Module, where: Computation, at_most: WorkCounter
) -> Iterator[tuple[OptionalPart, Computation]]:
    """Yields the loops of unknown length and the branches, each with its contents."""
    for each in where.instructions:
        match each.opcode:
            case "while" if trip_count(module, each, where) is None:
                body = module.computations[each.called["body"][0]]
                yield OptionalPart(each.name, at_most.of(each, where)), body
            case "conditional":
                for branch in module.branches(each):
                    yield OptionalPart(each.name, at_most.of_computation(branch)), branch


class Replay:
    """Replays computations of one module."""

    def __init__(self, module: Module, network: Network, kernels: Kernels | None = None):
        self._module = module
        options = {"kernels": kernels, "device": network.device}
        self._costs = WorkCounter(module, at_least=True, **options)
        self._most = WorkCounter(module, **options)
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
            inside = {each.name: self._inside(each, where) for each in where.instructions}
        parts = find_parts(self._module, where, at_least=self._costs, at_most=self._most)
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
        begun = {each.start.name: each for each in found}
        waited = {each.done.name: each for each in found if each.done is not None}
        clock, done_work = 0.0, CompiledWork()
        free: dict[Lane, float] = {}  # when links that way along an axis are free
        flights: dict[
            str, tuple[float, CompiledWork]
        ] = {}  # when it arrives, and the work before it
        out: dict[str, Collective] = {}
        for instruction in where.instructions:
            name = instruction.name
            if name in waited:
                each = waited[name]
                arrives, before = flights[each.start.name]
                exposed = max(0.0, arrives - clock)
                between = CompiledWork(
                    done_work.flops - before.flops, done_work.cycles - before.cycles
                )
                out[each.start.name] = self._collective(each, between, exposed)
                clock += exposed
            elif name in begun:
                each = begun[name]
                seconds = self._link_seconds(each) or 0.0
                lanes = self._network.lanes_of(each.collective)
                arrives = max([clock, *(free.get(lane, 0.0) for lane in lanes)]) + seconds
                free |= dict.fromkeys(lanes, arrives)
                flights[name] = arrives, done_work
                if each.done is None:
                    out[name] = self._collective(each, CompiledWork(), arrives - clock)
                    clock = arrives
            else:
                work = self._costs.of(instruction, where)
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
                for each in self.run(branch):
                    if each.conditional is None:
                        each = replace(each, conditional=instruction.name, branch=number)
                    out.append(each)
            return out
        trips = 1
        if instruction.opcode == "while":
            trips = trip_count(self._module, instruction, where) or 1
        for callee in self._module.callees(instruction):
            out += [replace(each, count=each.count * trips) for each in self.run(callee)]
        return out

    def _link_seconds(self, found: FoundCollective) -> float | None:
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
            axes=self._network.axes_of(found.collective),
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


def _shortfall(each: Collective) -> tuple[float, float, float]:
    """Orders what replays say of a collective by how little of it is hidden."""
    return each.exposed_seconds or 0.0, -(each.cycles or 0.0), -each.flops
