"""Costs of a compiled step -> its schedule's tables, and the time of each tick's actions."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dualpipe_jax._predict import Costs, compile_for
from dualpipe_jax._predict.waits import Waits, explain_waits
from dualpipe_jax._preflight.hlo import Computation, Instruction, Module
from dualpipe_jax._preflight.links import Network, source_target_pairs
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
    places = network.places(pair)
    return {tuple(places[:, axis].tolist()) for axis in axes if places[0, axis] != places[1, axis]}
