"""Problem -> the best order that a search finds: seeds, annealing, then the program's own waits."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._search import loops
from dualpipe_jax._search.bounds import lower_bound
from dualpipe_jax._search.problem import Problem
from dualpipe_jax._search.programs import Compiled, Compiler
from dualpipe_jax._search.seeds import Seed, list_seeds, named_seeds

# The annealed value is the makespan plus this share of the mean of all ranks' ends, which tells
# apart orders that are equally long.
_MEAN_WEIGHT = 0.05


class _Round(NamedTuple):
    """Says how long and how boldly an order is annealed.

    Attributes:
      share: Of all moves.
      first, last: The temperatures at its start and end, in mean actions.
      farthest: By how many places an action moves.
    """

    share: float
    first: float
    last: float
    farthest: int


_FIRST_ROUNDS = (
    _Round(0.22, 0.3, 0.01, 8),
    _Round(0.22, 0.3, 0.01, 8),
    _Round(0.16, 0.6, 0.01, 8),
)
# It goes on from the best.
_LAST_ROUND = _Round(0.4, 0.15, 0.005, 6)
# With the program's waits steps follow, each of a few moves and a compilation.
_STEP = _Round(1.0, 0.05, 0.05, 8)
_MOVES_A_STEP, _MOVES_OF_STEPS = 1000, (20, 60, 180, 540)
# Moves between two signs of progress.
_MOVES_AT_ONCE = 2000
_MOVES_A_TRIAL = 50
_ROUNDING = 1e-9


def search(
    problem: Problem, *, name: str, keep_beats: bool, waits: str, moves: int, seed: int
) -> Program:
    """Searches for the fastest order of a problem.

    Args:
      problem: The problem.
      name: The name of the program.
      keep_beats: Whether the beats of a named order, if one with beats fits, are kept.
      waits: As `schedules.search`.
      moves: How many moves are tried; none once an order is as fast as any can be.
      seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    named = named_seeds(problem, keep_beats=keep_beats)
    if named and named[0].pairs:
        seeds = named[:1]
    else:
        tried = list_seeds(problem, rng, num_tried=max(1, moves // _MOVES_A_TRIAL))
        seeds = sorted([*named, *tried], key=lambda seed: seed.makespan)[: len(_FIRST_ROUNDS)]
    found = [*named, *_anneal_rounds(problem, seeds, rng, moves)]
    compiler = Compiler(problem, name)
    compiled = [compiler.compile(seed) for seed in found]
    enough = [made for made in compiled if made.has_enough_beats]
    best = min(enough or compiled[:1], key=lambda made: made.times(waits))
    if waits == "program":
        best = _descend(compiler, best, rng, num_steps=moves // _MOVES_A_STEP)
    return best.program


def _descend(
    compiler: Compiler, best: Compiled, rng: np.random.Generator, *, num_steps: int
) -> Compiled:
    """Anneals a few moves at a time, and keeps them if the program does not get slower by them."""
    problem = compiler.problem
    bound = lower_bound(problem)
    for _ in range(num_steps):
        moves = int(rng.choice(_MOVES_OF_STEPS))
        seed = _anneal(problem, best.seed, rng, moves, _STEP, bound, lambda number: None)
        if (seed.rows != best.seed.rows).any():
            made = compiler.compile(seed)
            if made.has_enough_beats and made.makespan <= best.makespan:
                best = made
    return best


def _anneal_rounds(
    problem: Problem, seeds: list[Seed], rng: np.random.Generator, moves: int
) -> list[Seed]:
    """Anneals the seeds, then the best of them again."""
    bound = lower_bound(problem)
    found = list(seeds)
    rounds = _FIRST_ROUNDS[: len(seeds)]
    # Fewer seeds share the moves of the first rounds.
    longer = sum(r.share for r in _FIRST_ROUNDS) / sum(r.share for r in rounds)
    with _progress(moves) as advance:
        for start, plan in zip(seeds, rounds, strict=True):
            plan = plan._replace(share=longer * plan.share)
            found.append(_anneal(problem, start, rng, moves, plan, bound, advance))
        best = min(found, key=lambda seed: seed.makespan)
        found.append(_anneal(problem, best, rng, moves, _LAST_ROUND, bound, advance))
    return found


def _anneal(
    problem: Problem,
    start: Seed,
    rng: np.random.Generator,
    moves: int,
    plan: _Round,
    bound: float,
    advance: Callable[[int], None],
) -> Seed:
    """Anneals an order, by a share of the moves; its beats stay."""
    lanes, times, num_moves = problem.lanes, problem.make_times(), int(plan.share * moves)
    walk = _begin(problem, start)
    value = loops.replay(walk.rows, lanes, times, loops.NEVER, _MEAN_WEIGHT)
    walk.figures[:] = value, value, times.end_of_rank.max()
    loops.find_critical_path(walk, lanes, times)
    mean_cost = float(lanes.work.sum() / lanes.length.sum())
    cooling = np.linspace(0, 1, num_moves, endpoint=False)
    temperature = mean_cost * plan.first * (plan.last / plan.first) ** cooling
    is_best = start.makespan <= bound + _ROUNDING
    for begun in range(0, num_moves, _MOVES_AT_ONCE):
        if is_best:
            break
        now = temperature[begun : begun + _MOVES_AT_ONCE]
        draws = rng.random((len(now), loops.NUM_DRAWS))
        # A loss is accepted with probability exp(-loss / temperature).
        allowed = -now * np.log1p(-rng.random(len(now)))
        is_best = loops.anneal(
            walk, lanes, times, draws, allowed, _MEAN_WEIGHT, plan.farthest, bound + _ROUNDING
        )
        advance(len(now))
    return Seed(rows=walk.best_rows, makespan=float(walk.figures[2]), pairs=start.pairs)


def _begin(problem: Problem, start: Seed) -> loops.Walk:
    """Makes the state of an annealing from an order."""
    length = problem.lanes.length
    first, end = length.copy(), length.copy()
    for rank, places in enumerate(start.pairs):
        first[rank], end[rank] = places.start, places.stop
    return loops.Walk(
        rows=start.rows.copy(),
        best_rows=start.rows.copy(),
        peaks=problem.peaks_of(start.rows),
        first_kept=first,
        end_kept=end,
        critical_rank=np.zeros(start.rows.size, np.int64),
        critical_place=np.zeros(start.rows.size, np.int64),
        figures=np.zeros(3),
        counts=np.zeros(1, np.int64),
    )


@contextmanager
def _progress(moves: int) -> Iterator[Callable[[int], None]]:
    """Shows a bar in a terminal, on stderr."""
    if not sys.stderr.isatty():
        yield lambda number: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("moves", total=moves)
        yield lambda number: bar.advance(task, number)
