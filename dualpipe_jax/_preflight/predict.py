"""Predicts the time of a step: replays the schedule with the costs of the compiled actions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualpipe_jax import _scopes
from dualpipe_jax._devices import Device
from dualpipe_jax._predict import Placement, compile_for, replay_decided
from dualpipe_jax._predict.waits import Waits, explain_waits
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.links import Network, source_target_pairs
from dualpipe_jax._preflight.loop_costs import costs_of_loop
from dualpipe_jax._preflight.loops import FoundLoop
from dualpipe_jax._preflight.timing import Collective, exposed_seconds
from dualpipe_jax._preflight.work import WorkCounter
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule, make

_NO_CYCLES = "the compiler gives no cycles on this platform"
_NO_LOOP = "the program has no loop of a pipelined step's beats or ticks, and none of known length"
_NO_BANDWIDTH = "the bandwidth of a network is not known"
_NO_NAME = "the program does not name one schedule of dualpipe_jax.schedules.names()"
_NO_ACTIONS = "the loop has no instructions of a forward, or none of a backward"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Tells how long a step should take.

    Attributes:
      seconds: The whole step; None if it cannot be predicted.
      reason: Why not; "" if it can.
      loop_seconds: The schedule's part: from the first forward to the last weight grad; without a
        pipeline, all trips of the loop.
      outside_seconds: The part outside the schedule's loops, such as the optimizer's update: its
        compute, and the collectives that compute waits for.
      outside_exposed_seconds: The part of that for which compute waits for collectives.
      schedule: The schedule's name; None without a pipeline.
      idle_share: The share of the schedule's time in which ranks do not act.
      dependency_seconds: How long the schedule's part would take if ranks waited only for values
        that they read next: without false waits.
    """

    seconds: float | None = None
    reason: str = ""
    loop_seconds: float | None = None
    outside_seconds: float | None = None
    outside_exposed_seconds: float | None = None
    schedule: str | None = None
    idle_share: float | None = None
    dependency_seconds: float | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Timetable:
    """Tells which actions a step in ticks runs, and how long they take.

    Attributes:
      tables: The tables.
      work: float64[num_ticks, num_ranks], how long each tick's action takes, in cycles.
      transfer: How long a value travels, in cycles.
      clock: Cycles a second.
    """

    tables: Tables
    work: np.ndarray
    transfer: float
    clock: float

    def waits(self) -> Waits:
        """Finds for whom ranks wait, in microseconds."""
        to_us = 1e6 / self.clock
        return explain_waits(self.tables, self.work * to_us, transfer=self.transfer * to_us)


def predict(
    module: Module,
    loop: FoundLoop | None,
    *,
    counter: WorkCounter,
    device: Device | None,
    collectives: Sequence[Collective] = (),
    outside_seconds: float | None = None,
    outside_exposed_seconds: float | None = None,
) -> tuple[Prediction, Timetable | None]:
    """Predicts the time of a step from its steady loop, its scan over ticks, or any other loop.

    Args:
      module: The program.
      loop: Its loop; None if it has none.
      counter: The work of its instructions.
      device: The published figures of the devices.
      collectives: The collectives of one trip.
      outside_seconds: How long the instructions outside of the loops take.
      outside_exposed_seconds: For how long they wait for collectives.

    Returns:
      The prediction; and for a step in ticks, its timetable.
    """
    if device is None or device.clock is None:
        return Prediction(reason=_NO_CYCLES), None
    outside: dict[str, Any] = {
        "outside_seconds": outside_seconds,
        "outside_exposed_seconds": outside_exposed_seconds,
    }
    if loop is None or (loop.num_trips is None and loop.kind not in ("steady", "ramp")):
        return Prediction(reason=_NO_LOOP), None
    if loop.kind not in ("steady", "ramp"):
        trip = counter.of_computation(loop.body).cycles / device.clock
        waits = exposed_seconds(collectives)
        if waits is None:
            return Prediction(reason=_NO_BANDWIDTH), None
        loop_seconds = (loop.num_trips or 0) * (trip + waits)
        seconds = loop_seconds + (outside_seconds or 0)
        return Prediction(seconds=seconds, loop_seconds=loop_seconds, **outside), None
    op_names = [instruction.op_name for instruction in module.within(module.entry)]
    schedule = _find_schedule(op_names)
    if schedule is None:
        return Prediction(reason=_NO_NAME), None
    placement = _find_placement(op_names)
    sizes = (1,) * schedule.num_stages if placement is None else placement.layers.sizes
    costs = costs_of_loop(
        module,
        loop,
        counter,
        collectives,
        clock=device.clock,
        # The program has the layers of the largest stage.
        stages_per_rank=sum(sizes) / max(sizes) / schedule.num_ranks,
    )
    if costs is None:
        return Prediction(reason=_NO_ACTIONS), None
    transfer = _transfer_seconds(collectives) * device.clock
    if placement is None:
        execution = Execution(
            overlap=loop.kind == "steady",
            split_backward=not any(_scopes.FULL_BACKWARD in name for name in op_names),
        )
        placed: dict[str, Any] = {}
    else:
        execution = placement.execution
        placed = {"layers": placement.layers, "placed_by": placement.costs}
    simulation = replay_decided(schedule, execution, costs=costs, transfer=transfer, **placed)
    loop_seconds = simulation.makespan / device.clock
    prediction = Prediction(
        seconds=loop_seconds + (outside_seconds or 0),
        loop_seconds=loop_seconds,
        **outside,
        schedule=schedule.name,
        idle_share=simulation.idle_share,
        dependency_seconds=simulation.dependency_makespan / device.clock,
    )
    if loop.kind == "steady":
        return prediction, None
    made, durations = compile_for(
        schedule,
        simulation.execution,
        costs=costs,
        transfer=transfer,
        **{"layers": None, **placed},
    )
    return prediction, Timetable(
        tables=made.tables,
        work=durations.work(made.tables),
        transfer=transfer,
        clock=device.clock,
    )


def find_execution(module: Module) -> Execution | None:
    """Reads off a program how the order of its schedule became the program; None if not named."""
    placement = _find_placement(instruction.op_name for instruction in module.within(module.entry))
    return None if placement is None else placement.execution


def find_num_trips(module: Module, loop: FoundLoop) -> int | None:
    """Finds how often a loop runs: by its text, else for a steady loop by its schedule."""
    if loop.num_trips is not None or loop.kind != "steady":
        return loop.num_trips
    schedule = _find_schedule(instruction.op_name for instruction in module.within(module.entry))
    steady = None if schedule is None else schedule.compiled(overlap=True).tables.steady
    return None if steady is None else steady.num_beats // steady.period


def count_runs_of_branches(
    module: Module, body: Computation, network: Network, tables: Tables
) -> Mapping[str, tuple[int, ...]]:
    """Counts how many ticks take each branch of the conditional over exchanges.

    Args:
      module: The program.
      body: The body of the scan over ticks.
      network: The devices.
      tables: The tables.

    Returns:
      By the conditional's name; empty if none has permutes between the pairs of the exchanges.
    """
    runs = {}
    for instruction in module.within(body):
        if instruction.opcode != "conditional":
            continue
        found = [_pairs(module, network, branch) for branch in module.branches(instruction)]
        for part, exchanges in enumerate(tables.exchanges):
            pairs = [{p for side in sides for p in side if p[0] != p[1]} for sides in exchanges]
            if found == pairs:
                numbers = tables.exchange[:, part]
                counts = np.bincount(numbers[numbers >= 0], minlength=len(exchanges))
                runs[instruction.name] = tuple(counts.tolist())
    return runs


def _find_placement(op_names: Iterable[str]) -> Placement | None:
    """Reads off a program's names how its actions were placed; None if they do not say."""
    return next(filter(None, map(Placement.read, op_names)), None)


def _find_schedule(op_names: Iterable[str]) -> Schedule | None:
    """Makes the schedule that a program names; None if it names none, or several."""
    named = {found for name in op_names if (found := _scopes.read_schedule(name)) is not None}
    if len(named) != 1:
        return None
    ((name, num_ranks, num_microbatches),) = named
    return make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def _transfer_seconds(collectives: Iterable[Collective]) -> float:
    """Finds how long a value travels between ranks, in the longest of the transfers of a trip."""
    sends = [send for send in collectives if _scopes.SEND in send.op_name]
    # An x of several arrays has a permute for each, which share a tick's links.
    # (Parts of an exchange have a conditional each, one after the other, and links of their own.)
    in_ticks = [
        exposed_seconds([send for send in sends if send.conditional == conditional]) or 0
        for conditional in {send.conditional for send in sends if send.branch is not None}
    ]
    return max([0, *in_ticks, *(send.link_seconds or 0 for send in sends)])


def _pairs(module: Module, network: Network, branch: Computation) -> set[tuple[int, ...]]:
    """Lists the (source, target) indices of a branch's permutes, along the axis of the permute."""
    found = set()
    for permute in module.within(branch):
        for pair in source_target_pairs(permute) or ():
            found |= _along_axes(network, permute, pair)
    return found


def _along_axes(
    network: Network, permute: Instruction, pair: tuple[int, int]
) -> set[tuple[int, ...]]:
    """Finds the indices of a pair along each axis of its permute on which the two differ."""
    axes = [list(network.axes).index(axis) for axis in network.axes_of(permute)]
    index = network.coordinates(pair)
    return {tuple(index[:, axis].tolist()) for axis in axes if index[0, axis] != index[1, axis]}
