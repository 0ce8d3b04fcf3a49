"""Schedule, costs, layers -> the number of layers of each stage with which a step is the fastest.

Two kinds of descents, in which the best move of one layer from any stage to any other follows the
best, until none helps. The first makes the busiest rank's work least, by arithmetic. The second
makes the step short, by simulation: it replays the schedule after every move at once, each rank
waiting only for the values that it reads. Between their results and an even split the replay of the
program decides, which waits as the program does. The result depends on the arguments alone, so that
every process comes to the same.

Eight layers over four ranks. With its gradient, the head takes as long as two layers with theirs:

>>> from dualpipe_jax import schedules
>>> schedule = schedules.make("1f1b", num_ranks=4, num_microbatches=8)
>>> balance(schedule, costs=Costs(head=1), transfer=0.1, num_layers=8)
(3, 3, 2, 0)
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from dualpipe_jax._costs import Costs, StageLayers, cumulated
from dualpipe_jax._predict.decide import replay_decided
from dualpipe_jax._predict.simulation import Simulation
from dualpipe_jax._schedule.actions import FORWARD, IDLE, INPUT_GRAD, WEIGHT_GRAD, Opcode
from dualpipe_jax._schedule.compile import place_program
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.replay import replay_dependencies
from dualpipe_jax._schedule.stage_sizes import spread_evenly
from dualpipe_jax.schedules import Schedule

# A mean of such a power over the ranks is close to the busiest rank's work, and falls too where
# another rank than that gets less.
_POWER = 16
# The weights of the second aims, which decide between splits that are about as good: stages that
# are alike (where they differ the program waits for more), ranks that end early, and a small
# largest stage, for which every rank has memory.
_ALIKE, _EARLY, _SMALL = 0.1, 0.01, 0.01
# The least gain, as a share of the step, that another split is worth; and where an even one has
# stages that are alike: in unlike ones the layers cost up to 4 % more (experiments/compiled).
_LEAST_GAIN, _LEAST_GAIN_OF_ALIKE = 0.01, 0.05
# Models of more layers are spread evenly: a descent moves one layer at a time.
_MOST_LAYERS = 4096
# The most numbers, 8 bytes each, in a replay of all moves. Larger steps are balanced by arithmetic.
_MOST_NUMBERS = 50_000_000

# Gives a figure for each of several splits, int64[num_splits, num_stages]; less is better.
_Aim = Callable[[np.ndarray], np.ndarray]


@lru_cache(maxsize=256)
def balance(
    schedule: Schedule,
    execution: Execution = Execution(),  # noqa: B008
    *,
    costs: Costs,
    transfer: float,
    num_layers: int,
    layer_weights: tuple[float, ...] | None = None,
    most: int | None = None,
) -> tuple[int, ...]:
    """Spreads layers over the stages of a schedule so that its step is short.

    Args:
      schedule: The schedule.
      execution: How it becomes a program, as far as given.
      costs: How long actions take, embedding and head included.
      transfer: How long a value travels to a neighbour.
      num_layers: The layers of the model.
      layer_weights: The relative cost of every layer, in model order; None if all cost the same.
      most: The most layers of a stage, for every rank has memory for the largest one; at least
        `num_layers / num_stages`, rounded up. None for any number.

    Returns:
      The layers of each stage, in model order, of which some may be none. They are spread evenly
      if no other split is found to be faster, or if there are more than 4,096 layers.
    """
    even = spread_evenly(num_layers, schedule.num_stages)
    if num_layers > _MOST_LAYERS:
        return even
    costs = replace(costs, layer=None)  # which are in the layers' weights
    weights = cumulated(layer_weights, num_layers=num_layers)
    splits = Splits(schedule, costs=costs, transfer=transfer, weights=weights)
    most = num_layers if most is None else most
    found = [_descend(np.array(even), splits.unevenness, most=most)[0]]
    if splits.size <= _MOST_NUMBERS:
        starts = dict.fromkeys((even, even[::-1], tuple(found[0].tolist())))
        ends = [_descend(np.array(start), splits.aims, most=most) for start in starts]
        found.append(min(ends, key=lambda end: end[1])[0])
    candidates = [even, *dict.fromkeys(tuple(sizes.tolist()) for sizes in found)]
    gain = _LEAST_GAIN if len(set(even)) > 1 else _LEAST_GAIN_OF_ALIKE
    times = splits.makespans(*candidates)
    worth = [time < (1 - gain) * times[0] for time in times]
    candidates = [even, *itertools.compress(candidates, worth)]
    if len(candidates) == 1:
        return candidates[0]

    def replayed(sizes: tuple[int, ...], execution: Execution) -> Simulation:
        layers = StageLayers.cut(sizes, layer_weights)
        return replay_decided(schedule, execution, costs=costs, transfer=transfer, layers=layers)

    # All are compared in the execution that the last one is run in.
    decided = replayed(candidates[-1], execution).execution
    # Sums in different orders differ in their last bits.
    return min(candidates, key=lambda each: float(f"{replayed(each, decided).makespan:.9g}"))


class Splits:
    """Judges splits of a model's layers over the stages of a schedule.

    Args:
      schedule: The schedule.
      costs: How long actions take.
      transfer: How long a value travels to a neighbour.
      weights: float64[num_layers + 1], the layers' costs, added up.
    """

    def __init__(self, schedule: Schedule, *, costs: Costs, transfer: float, weights: np.ndarray):
        self._costs, self._transfer, self._weights = costs, transfer, weights
        # The order of actions does not depend on the layers of the stages.
        stash_deferred = not costs.recompute
        timeline, _ = place_program(schedule.program, stash_deferred=stash_deferred)
        self._timeline = timeline
        self._opcode = timeline.grid(timeline.program.units.opcode, idle=IDLE)
        units = schedule.program.units
        # int[num_ranks, num_stages], the microbatches that a rank runs through a stage.
        self._runs = np.zeros((schedule.num_ranks, schedule.num_stages), int)
        is_forward = units.opcode == FORWARD
        np.add.at(self._runs, (units.rank[is_forward], units.stage[is_forward]), 1)
        # The time of a rank's whole share of the layers.
        self._time = schedule.num_microbatches * (costs.forward + costs.backward)

    @property
    def size(self) -> int:
        """The numbers in a replay of every move of a layer at once."""
        return self._timeline.program.num_stages**2 * self._opcode.size

    def unevenness(self, sizes: np.ndarray) -> np.ndarray:
        """Divides the busiest ranks' work by the mean, nearly: float64[num_splits]."""
        cost = _of_stages(self._costs_of(sizes))
        work = self._runs @ cost
        busiest = np.mean((work / work.mean(axis=0)) ** _POWER, axis=0) ** (1 / _POWER)
        return busiest + _ALIKE * _variance(cost)

    def aims(self, sizes: np.ndarray) -> np.ndarray:
        """Simulates the step of each split, and adds the second aims: float64[num_splits]."""
        cost, end = self._costs_of(sizes), self._ends(sizes)
        largest = sizes.max(axis=1) / sizes.mean(axis=1)
        second = _ALIKE * _variance(_of_stages(cost)) + _SMALL * largest
        return end.max(axis=0) + _EARLY * end.mean(axis=0) + self._time * second

    def makespans(self, *splits: tuple[int, ...]) -> list[float]:
        """Simulates the step of each split, ranks waiting for nothing but values."""
        return self._ends(np.array(splits)).max(axis=0).tolist()

    def _ends(self, sizes: np.ndarray) -> np.ndarray:
        """Finds when each rank ends: float64[num_ranks, num_splits]."""
        work = self._costs_of(sizes)[self._opcode, self._timeline.stage]
        return replay_dependencies(self._timeline, work, transfer=self._transfer)[-1]

    def _costs_of(self, sizes: np.ndarray) -> np.ndarray:
        """Finds how long actions take: float64[num_opcodes, num_stages, num_splits]."""
        program, costs = self._timeline.program, self._costs
        ends = np.cumsum(np.pad(sizes, ((0, 0), (1, 0))), axis=1)
        weights = np.diff(self._weights[ends], axis=1).T
        num_ranks, cost = program.num_ranks, np.zeros((max(Opcode) + 1, *weights.shape))
        cost[: WEIGHT_GRAD + 1] = costs.of_stages(
            weights, num_ranks=num_ranks, forward_only=program.forward_only
        )
        recompute = costs.recompute * num_ranks / self._weights[-1] * weights
        cost[Opcode.INPUT_GRAD_DEFERRING] = cost[INPUT_GRAD]
        cost[Opcode.WEIGHT_GRAD_DEFERRED] = cost[WEIGHT_GRAD] + recompute
        return cost


def _of_stages(cost: np.ndarray) -> np.ndarray:
    """Adds up F, I and W of each stage: float64[num_stages, num_splits]."""
    return cost[[FORWARD, INPUT_GRAD, WEIGHT_GRAD]].sum(axis=0)


def _variance(cost: np.ndarray) -> np.ndarray:
    """Measures how the costs of stages differ: float64[num_splits], 0 if all are alike."""
    return np.var(cost / cost.mean(axis=0), axis=0)


def _descend(sizes: np.ndarray, aim: _Aim, *, most: int) -> tuple[np.ndarray, float]:
    """Moves one layer after the other between stages, each by the best move, until none helps.

    Returns:
      The split at the end, and its figure.
    """
    while True:
        splits = np.concatenate([sizes[None], _moved(sizes, most=most)])
        figures = aim(splits)
        best = figures.argmin()
        # Sums in different orders differ in their last bits. No split comes twice.
        if not figures[best] < figures[0] * (1 - 1e-12):
            return sizes, figures[0]
        sizes = splits[best]


def _moved(sizes: np.ndarray, *, most: int) -> np.ndarray:
    """Lists the splits with one layer in another stage: int64[num_splits, num_stages]."""
    one = np.eye(len(sizes), dtype=int)
    splits = (sizes - one[:, None] + one[None]).reshape(-1, len(sizes))
    is_split = (splits >= 0).all(axis=1) & (splits <= most).all(axis=1)
    return splits[is_split & (splits != sizes).any(axis=1)]
