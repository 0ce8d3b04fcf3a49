"""Predicts the time of a step: replays the schedule with the costs of the compiled actions."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualpipe_jax import _scopes, schedules
from dualpipe_jax._devices import Device
from dualpipe_jax._predict import Costs, compile_for, simulate
from dualpipe_jax._predict.waits import Waits, explain_waits
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.links import Network, source_target_pairs
from dualpipe_jax._preflight.loop_costs import costs_of_ticks
from dualpipe_jax._preflight.loops import FoundLoop
from dualpipe_jax._preflight.timing import Collective, exposed_seconds
from dualpipe_jax._preflight.work import OTHER, CompiledWork, WorkCounter, action_of, count_parts
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax.schedules import Schedule


@dataclass(frozen=True, eq=False, kw_only=True)
class Timetable:
    """Tells what a step in ticks runs, and how long it takes.

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
        """Says for whom ranks wait, in microseconds."""
        to_us = 1e6 / self.clock
        return explain_waits(self.tables, self.work * to_us, transfer=self.transfer * to_us)


def find_timetable(
    schedule: Schedule,
    costs: Costs,
    *,
    transfer: float,
    clock: float,
    execution: Execution,
    layers_of_stage: tuple[int, ...] | None,
    placed_by: Costs | None,
) -> Timetable:
    """Compiles a schedule as the step in ticks did, whose costs are known.

    Args:
      schedule: The schedule.
      costs: What actions cost, in cycles.
      transfer: How long a value travels, in cycles.
      clock: Cycles a second.
      execution: How its order became the program.
      layers_of_stage: The layers of each stage; None if they are not known.
      placed_by: As for `simulate`.
    """
    tables, durations = compile_for(
        schedule,
        execution,
        costs=costs,
        transfer=transfer,
        layers_of_stage=layers_of_stage,
        placed_by=placed_by,
    )
    work = durations.work(tables)
    return Timetable(tables=tables, work=work, transfer=transfer, clock=clock)


def runs_of_branches(
    module: Module, body: Computation, network: Network, tables: Tables
) -> Mapping[str, tuple[int, ...]]:
    """Finds how many ticks take each branch of the conditional over exchanges.

    Args:
      module: The program.
      body: That of the scan over ticks.
      network: The devices.
      tables: The tables.

    Returns:
      By the conditional's name; empty if none has permutes between the pairs of the exchanges.
    """
    runs = {}
    for each in module.within(body):
        if each.opcode != "conditional":
            continue
        found = [_pairs(module, network, branch) for branch in module.branches(each)]
        for part, of_part in enumerate(tables.exchanges):
            pairs = [{p for side in both for p in side if p[0] != p[1]} for both in of_part]
            if found == pairs:
                numbers = tables.exchange[:, part]
                counts = np.bincount(numbers[numbers >= 0], minlength=len(of_part))
                runs[each.name] = tuple(counts.tolist())
    return runs


def _pairs(module: Module, network: Network, branch: Computation) -> set[tuple[int, ...]]:
    """The (source, target) places of a branch's permutes, along the axis that they move along."""
    found = set()
    for each in module.within(branch):
        for pair in source_target_pairs(each) or ():
            found |= _along(network, each, pair)
    return found


def _along(network: Network, permute: Instruction, pair: tuple[int, int]) -> set[tuple[int, ...]]:
    axes = [list(network.axes).index(axis) for axis in network.axes_of(permute)]
    places = network.coordinates(pair)
    return {tuple(places[:, axis].tolist()) for axis in axes if places[0, axis] != places[1, axis]}


# The steady loop runs two beats in a trip: two forwards, input grads and weight grads a rank.
_BEATS = 2

_NO_LOOP = "the program has no loop of a pipelined step's beats or ticks"
_NO_NAME = "the program does not name one schedule of dualpipe_jax.schedules.names()"
_NO_ACTIONS = "the loop has no instructions of a forward, or none of a backward"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Tells how long a step should take.

    Attributes:
      seconds: Of the whole step; None if it cannot be predicted.
      reason: Why not; "" if it can.
      loop_seconds: Of it, the schedule's: from the first forward to the last weight grad.
      outside_seconds: Of it, what stands outside the schedule's loops, such as the optimizer's
        update: its compute, and the collectives that compute waits for.
      schedule: The schedule's name.
      idle_share: The share of the schedule's time in which ranks do not act.
      dependency_seconds: How long the schedule's part would take if ranks waited only for values
        that they read next: without false waits.
    """

    seconds: float | None = None
    reason: str = ""
    loop_seconds: float | None = None
    outside_seconds: float | None = None
    schedule: str | None = None
    idle_share: float | None = None
    dependency_seconds: float | None = None


def predict(
    module: Module,
    loop: FoundLoop | None,
    *,
    costs_of: WorkCounter,
    work: dict[str, CompiledWork],
    collectives: list[Collective],
    outside_seconds: float | None,
    device: Device | None,
) -> tuple[Prediction, Timetable | None]:
    """Predicts the time of a step whose steady loop, or scan over ticks, is known.

    Args:
      module: The program.
      loop: Its loop.
      costs_of: What its instructions cost.
      work: The work of one trip by action.
      collectives: Those of one trip.
      outside_seconds: How long what stands outside the loops takes.
      device: What is published of the devices.

    Returns:
      The prediction, and of a step in ticks what it runs.
    """
    names = [each.op_name for each in module.within(module.entry)]
    made = _find_schedule(names)
    if device is None or device.clock is None:
        return Prediction(reason="the compiler gives no cycles on this platform"), None
    if loop is None or loop.kind not in ("steady", "ramp"):
        return Prediction(reason=_NO_LOOP), None
    if made is None:
        return Prediction(reason=_NO_NAME), None
    name, num_ranks = made.name, made.num_ranks
    exposed: dict[str, float] = {}
    for each in collectives:
        # A model's own collectives belong to their action; the simulator knows the transfers.
        action = action_of(each.op_name)
        if action != _scopes.SEND:
            waited = (each.exposed_seconds or 0) * each.count * device.clock
            exposed[action] = exposed.get(action, 0.0) + waited
    stages_per_rank = made.num_stages / num_ranks
    if loop.kind == "steady":
        cycles = {
            action: work.get(action, CompiledWork()).cycles + exposed.get(action, 0.0)
            for action in {*work, *exposed}
        }
        costs = _costs_of_beats(module, loop, cycles, stages_per_rank=stages_per_rank)
    else:
        costs = costs_of_ticks(
            module, costs_of, loop.body, exposed=exposed, stages_per_rank=stages_per_rank
        )
    if costs is None:
        return Prediction(reason=_NO_ACTIONS), None
    sends = [each for each in collectives if _scopes.SEND in each.op_name]
    # An x of several arrays has a permute for each, which share a tick's links.
    # (Parts of an exchange have a conditional each, one after the other, and links of their own.)
    in_ticks = [
        exposed_seconds([each for each in sends if each.conditional == conditional]) or 0
        for conditional in {each.conditional for each in sends if each.branch is not None}
    ]
    transfer = max([0, *in_ticks, *(each.link_seconds or 0 for each in sends)])
    placed = next(filter(None, map(_scopes.read_placement, names)), None)
    if placed is None:
        placed_by, layers = None, None
        execution = Execution(
            overlap=loop.kind == "steady",
            split_backward=not any(_scopes.FULL_BACKWARD in name for name in names),
        )
    else:
        placed_by, layers = Costs(**_named(Costs(), placed.costs)), placed.layers_of_stage
        execution = Execution(**_named(Execution(), placed.execution))
    simulation = simulate(
        made,
        costs=costs,
        transfer=transfer * device.clock,
        execution=execution,
        layers_per_stage=layers,
        placed_by=placed_by,
    )
    loop_seconds = simulation.makespan / device.clock
    prediction = Prediction(
        seconds=loop_seconds + (outside_seconds or 0),
        loop_seconds=loop_seconds,
        outside_seconds=outside_seconds,
        schedule=name,
        idle_share=simulation.idle_share,
        dependency_seconds=simulation.dependency_makespan / device.clock,
    )
    if loop.kind == "steady":
        return prediction, None
    return prediction, find_timetable(
        made,
        costs,
        transfer=transfer * device.clock,
        clock=device.clock,
        execution=simulation.execution,
        layers_of_stage=layers,
        placed_by=placed_by,
    )


def find_execution(module: Module) -> Execution | None:
    """Finds how a schedule's order became the program, if that says it."""
    names = (each.op_name for each in module.within(module.entry))
    placed = next(filter(None, map(_scopes.read_placement, names)), None)
    return None if placed is None else Execution(**_named(Execution(), placed.execution))


def find_num_trips(module: Module, loop: FoundLoop) -> int | None:
    """Finds how often a loop runs: as its text says, else of a steady loop as its schedule does."""
    if loop.num_trips is not None or loop.kind != "steady":
        return loop.num_trips
    made = _find_schedule(each.op_name for each in module.within(module.entry))
    steady = None if made is None else made.compiled(overlap=True).tables.steady
    return None if steady is None else steady.num_beats // _BEATS


def _find_schedule(op_names: Iterable[str]) -> schedules.Schedule | None:
    """Makes the schedule that a program names, if it names one."""
    named = {_scopes.read_schedule(name) for name in op_names} - {None}
    if len(named) != 1:
        return None
    ((name, num_ranks, num_microbatches),) = (each for each in named if each is not None)
    return schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def _named(like: Any, values: tuple[Any, ...]) -> dict[str, Any]:
    """Names the values of a record, which a program has in the order of its fields."""
    return dict(zip(vars(like), values, strict=True))


def _costs_of_beats(
    module: Module, loop: FoundLoop, cycles: dict[str, float], *, stages_per_rank: float
) -> Costs | None:
    """Makes the simulator's costs of the cycles of each action in a trip of two beats."""
    total, named = sum(cycles.values()), sum(cycles.values()) - cycles.get(OTHER, 0.0)
    if not cycles.get(_scopes.FORWARD):
        return None
    # What stands under no action's name (copies, reads and writes of slots) belongs to all of them.
    scale = total / named

    def each(action: str, times: float) -> float:
        return cycles.get(action, 0.0) * scale / times

    forward, input_grad, weight_grad = (
        each(action, _BEATS) * stages_per_rank
        for action in (_scopes.FORWARD, _scopes.INPUT_GRAD, _scopes.WEIGHT_GRAD)
    )
    # In how many beats of the two they stand; at the ends, which are few ranks' alone, not in all.
    embed, head = (
        sum(each(action, count_parts(module, loop.body, action) or _BEATS) for action in actions)
        for actions in ((_scopes.EMBED, _scopes.EMBED_GRAD), (_scopes.HEAD,))
    )
    return Costs.with_whole_ends(
        forward=forward, input_grad=input_grad, weight_grad=weight_grad, embed=embed, head=head
    )
