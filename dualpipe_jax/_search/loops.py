"""The inner loops of a search: plain functions of arrays, compiled by Numba where it is installed.

An order is `rows`, int64[num_ranks, longest], of tokens: `3 * lane + kind`, a kind being 0 for F, 1
for I and 2 for W. A lane is a stage of a direction; its m-th token of a kind is that of its m-th
microbatch. Random numbers come in arrays, so that both ways make the same order.

(Loops that call each other are in one file: Numba's cache does not see the change of another file.)
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

try:
    from numba import njit
except ModuleNotFoundError:
    njit = None

_Function = TypeVar("_Function", bound=Callable[..., Any])
NEVER = np.inf
FORWARD, INPUT_GRAD, WEIGHT_GRAD = 0, 1, 2
# Columns of the random numbers of a move.
NUM_DRAWS = 6
# The share of moves that take an action of the critical path, that go by one place, and back.
_CRITICAL, _BY_ONE, _BACK = 0.75, 0.5, 0.6


def compiled(function: _Function) -> _Function:
    """Compiles a function where Numba is installed."""
    return function if njit is None else cast(_Function, njit(cache=True)(function))


class Lanes(NamedTuple):
    """Describes the lanes of a problem to the loops.

    Attributes:
      rank: int64[num_lanes], the rank of each.
      before, after: int64[num_lanes], the lanes that x comes from and goes to; -1 for none.
      count: int64[num_lanes], how many microbatches pass.
      cost: float64[3, num_lanes], how long each kind takes.
      recompute: float64[num_lanes], how long a W takes in addition if it does not follow its I.
      size: float64[num_lanes], of an activation, in shares of a rank's layers.
      reserve: float64[num_lanes], of one activation of each deeper lane of the rank.
      stash: The size of a stash, from I to W, over that of an activation; 0 if stashes are free.
      least: float64[2], the most that some rank holds and stashes in every order.
      of_rank: int64[num_ranks, most], the lanes of each rank; -1 for fewer.
      length: int64[num_ranks], how many tokens each row has.
      work: float64[num_ranks], how long each rank acts if no W recomputes.
      transfer: How long a value travels to another rank.
      limit: How much the slots of a rank may hold, of activations and of stashes.
    """

    rank: np.ndarray
    before: np.ndarray
    after: np.ndarray
    count: np.ndarray
    cost: np.ndarray
    recompute: np.ndarray
    size: np.ndarray
    reserve: np.ndarray
    stash: float
    least: np.ndarray
    of_rank: np.ndarray
    length: np.ndarray
    work: np.ndarray
    transfer: float
    limit: float


class Times(NamedTuple):
    """Holds the replay of an order: `end`, `place` by kind, lane, microbatch; the others by place.

    `awaited` says whether an action began with the arrival of its value, and not with the end of
    the action before it.
    """

    end: np.ndarray
    place: np.ndarray
    start: np.ndarray
    microbatch: np.ndarray
    awaited: np.ndarray
    end_of_rank: np.ndarray


class Walk(NamedTuple):
    """Holds the state of an annealing: `rows`, the best of them, and the critical path.

    `peaks`, float64[num_ranks, 2], are the most that each row holds, of activations and stashes.
    Places from `first_kept` up to `end_kept` of each row stay. `figures` are the current value, the
    best value and the best order's makespan; `counts` is the length of the critical path.
    """

    rows: np.ndarray
    best_rows: np.ndarray
    peaks: np.ndarray
    first_kept: np.ndarray
    end_kept: np.ndarray
    critical_rank: np.ndarray
    critical_place: np.ndarray
    figures: np.ndarray
    counts: np.ndarray


@compiled
def is_legal(row: np.ndarray, length: int, lanes: Lanes, peaks: np.ndarray) -> bool:
    """Whether each F, I and W of a row are in this order, and its activations within the limit.

    `peaks`, float64[2], becomes the most that it holds between F and W, and between I and W.
    """
    count = np.zeros((3, lanes.rank.shape[0]), np.int64)
    held, stashed = 0.0, 0.0
    peaks[:] = 0.0
    for place in range(length):
        token = row[place]
        lane, kind = token // 3, token % 3
        if kind > 0 and count[kind - 1, lane] <= count[kind, lane]:
            return False
        count[kind, lane] += 1
        if kind == FORWARD:
            held += lanes.size[lane]
            if held > lanes.limit:
                return False
            peaks[0] = max(peaks[0], held)
        elif kind == INPUT_GRAD:
            stashed += lanes.size[lane]
            peaks[1] = max(peaks[1], stashed)
        else:
            held -= lanes.size[lane]
            stashed -= lanes.size[lane]
    return True


@compiled
def fits(peaks: np.ndarray, lanes: Lanes) -> bool:
    """Whether the slots are within the limit: all ranks have as many as the fullest needs."""
    return peaks[:, 0].max() + lanes.stash * peaks[:, 1].max() <= lanes.limit


@compiled
def replay(rows: np.ndarray, lanes: Lanes, times: Times, most: float, weight: float) -> float:
    """Finds when each action ends if ranks wait only for values that they read.

    Returns:
      The makespan plus `weight` times the mean of the ranks' ends; infinity if ranks wait for each
      other, or if it must be more than `most`.
    """
    num_ranks = rows.shape[0]
    count = np.zeros((3, lanes.rank.shape[0]), np.int64)
    reached = np.zeros(num_ranks, np.int64)
    waits = np.zeros(num_ranks, np.bool_)
    stack = np.arange(num_ranks)[::-1].copy()
    now = times.end_of_rank
    now[:] = 0.0
    # The end of each rank if it never waits again.
    least = lanes.work.copy()
    least_mean = weight * lanes.work.mean()
    top = num_ranks
    while top:
        top -= 1
        rank = stack[top]
        while reached[rank] < lanes.length[rank]:
            place = reached[rank]
            token = rows[rank, place]
            lane, kind = token // 3, token % 3
            microbatch = count[kind, lane]
            source, target = -1, -1
            if kind == FORWARD:
                source, target = lanes.before[lane], lanes.after[lane]
            elif kind == INPUT_GRAD:
                source, target = lanes.after[lane], lanes.before[lane]
            awaited = False
            if source >= 0:
                if count[kind, source] <= microbatch:
                    waits[rank] = True
                    break
                arrival = times.end[kind, source, microbatch]
                if lanes.rank[source] != rank:
                    arrival += lanes.transfer
                if arrival > now[rank]:
                    least[rank] += arrival - now[rank]
                    if least[rank] + least_mean > most:
                        return NEVER
                    now[rank] = arrival
                    awaited = True
            times.start[rank, place] = now[rank]
            times.awaited[rank, place] = awaited
            times.microbatch[rank, place] = microbatch
            now[rank] += lanes.cost[kind, lane]
            if kind == WEIGHT_GRAD and (place == 0 or rows[rank, place - 1] != token - 1):
                now[rank] += lanes.recompute[lane]
                least[rank] += lanes.recompute[lane]
            times.end[kind, lane, microbatch] = now[rank]
            times.place[kind, lane, microbatch] = place
            count[kind, lane] += 1
            reached[rank] += 1
            if target >= 0:
                other = lanes.rank[target]
                if waits[other]:
                    waits[other] = False
                    stack[top] = other
                    top += 1
    for rank in range(num_ranks):
        if reached[rank] < lanes.length[rank]:
            return NEVER
    return now.max() + weight * now.mean()


@compiled
def find_critical_path(walk: Walk, lanes: Lanes, times: Times) -> None:
    """Goes back from the last action over those that each one waited for, to the first."""
    rank = times.end_of_rank.argmax()
    place = lanes.length[rank] - 1
    length = 0
    while place >= 0:
        walk.critical_rank[length] = rank
        walk.critical_place[length] = place
        length += 1
        if not times.awaited[rank, place]:
            place -= 1
            continue
        token, microbatch = walk.rows[rank, place], times.microbatch[rank, place]
        lane, kind = token // 3, token % 3
        source = lanes.before[lane] if kind == FORWARD else lanes.after[lane]
        rank, place = lanes.rank[source], times.place[kind, source, microbatch]
    walk.counts[0] = length


@compiled
def move(row: np.ndarray, start: int, stop: int) -> None:
    """Moves the token at `start` to `stop`; those between close up."""
    token = row[start]
    step = 1 if stop > start else -1
    place = start
    while place != stop:
        row[place] = row[place + step]
        place += step
    row[stop] = token


@compiled
def passes_its_like(row: np.ndarray, start: int, stop: int) -> bool:
    """Whether a move takes a token over one like it, which changes nothing."""
    step = 1 if stop > start else -1
    place = start
    while place != stop:
        place += step
        if row[place] == row[start]:
            return True
    return False


@compiled
def anneal(
    walk: Walk,
    lanes: Lanes,
    times: Times,
    draws: np.ndarray,
    allowed: np.ndarray,
    weight: float,
    farthest: int,
    stop_at: float,
) -> bool:
    """Moves single actions along their rows, and keeps the moves that do not lose too much.

    Args:
      walk: The state, changed in place.
      lanes: The problem.
      times: Room for replays.
      draws: float64[num_moves, NUM_DRAWS], random numbers below 1.
      allowed: float64[num_moves], by how much the value may grow with each move.
      weight: As for `replay`.
      farthest: By how many places an action moves at most.
      stop_at: The makespan that no order is below.

    Returns:
      Whether an order of that makespan is found.
    """
    num_ranks = walk.rows.shape[0]
    current = walk.figures[0]
    for number in range(draws.shape[0]):
        draw = draws[number]
        if draw[0] < _CRITICAL:
            chosen = int(draw[1] * walk.counts[0])
            rank, start = walk.critical_rank[chosen], walk.critical_place[chosen]
        else:
            rank = int(draw[1] * num_ranks)
            start = int(draw[2] * lanes.length[rank])
        distance = 1 if draw[3] < _BY_ONE else 1 + int(draw[4] * farthest)
        stop = start - distance if draw[5] < _BACK else start + distance
        if stop < 0 or stop >= lanes.length[rank]:
            continue
        low, high = min(start, stop), max(start, stop)
        if high >= walk.first_kept[rank] and low < walk.end_kept[rank]:
            continue
        row = walk.rows[rank]
        if passes_its_like(row, start, stop):
            continue
        move(row, start, stop)
        value, peaks = NEVER, walk.peaks[rank].copy()
        if is_legal(row, lanes.length[rank], lanes, walk.peaks[rank]) and fits(walk.peaks, lanes):
            value = replay(walk.rows, lanes, times, current + allowed[number], weight)
        if value > current + allowed[number]:
            move(row, stop, start)
            walk.peaks[rank] = peaks
            continue
        current = value
        find_critical_path(walk, lanes, times)
        if current < walk.figures[1] - 1e-12:
            walk.figures[1] = current
            walk.figures[2] = times.end_of_rank.max()
            walk.best_rows[:] = walk.rows
            if walk.figures[2] <= stop_at:
                break
    walk.figures[0] = current
    return walk.figures[2] <= stop_at
