"""Problem -> orders to begin with: the named ones of its placement, and random list schedules."""

import inspect
from dataclasses import dataclass, replace

import numpy as np

from dualpipe_jax._costs import Costs
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._search import list_loops, loops
from dualpipe_jax._search.problem import Problem

# Scores of about this size decide between kinds of actions.
_SCALE = 10.0
_RANDOM = {
    "forward_by_depth": (0, 3, 10, 30, -10),
    "forward_by_live": (0, 0, -0.5, -1, -3, -10),
    "input_grad_by_depth": (0, 3, 10, -10),
    "weight_grad_by_depth": (0, 3, 10, -10),
    "weight_grad_by_waiting": (0, 0, 1, 3, 10, 30),
    "weight_grad_if_full": (0, 0, 5, 10, 20),
    # In mean actions.
    "patience": (0, 0, 0.15, 0.3, 0.6, 1),
    # As a share of the activations with which a stage keeps all stages busy.
    "most_live": (99, 99, 0.5, 0.6, 0.75, 1, 1, 1.25, 1.5, 2, 2),
}
_KINDS = ("forward", "input_grad", "weight_grad")


@dataclass(frozen=True, kw_only=True, eq=False)
class Seed:
    """An order to begin with.

    Attributes:
      rows: Its tokens.
      makespan: If ranks wait only for values that they read.
      pairs: For each rank, the places of its beats, which are to be kept; empty for none.
      program: The named program that it is, if it is one.
    """

    rows: np.ndarray
    makespan: float
    pairs: tuple[range, ...] = ()
    program: Program | None = None

    @property
    def num_beats(self) -> int:
        """The beats that are to be kept."""
        return len(self.pairs[0]) // 3 if self.pairs else 0


def named_programs(problem: Problem) -> list[Program]:
    """Makes the named schedules that have the routes of a problem."""
    sizes = {
        "num_ranks": problem.num_ranks,
        "num_microbatches": problem.num_microbatches,
        "num_stages_per_rank": problem.num_stages // problem.num_ranks,
    }
    made = []
    for generate in GENERATORS.values():
        taken = inspect.signature(generate).parameters
        if "num_stages_per_rank" in taken and sizes["num_stages_per_rank"] == 1:
            continue  # for several only
        program = generate(**{name: size for name, size in sizes.items() if name in taken})
        if program.routes == problem.routes:
            made.append(program)
    return made


def named_seeds(problem: Problem, *, keep_beats: bool) -> list[Seed]:
    """Makes seeds of the named orders that fit, the fastest first.

    With `keep_beats` only those that have a steady phase, if one of these fits.
    """
    found = []
    times = problem.make_times()
    for program in named_programs(problem):
        rows = problem.rows_of(program)
        if problem.peak_of(rows) <= problem.lanes.limit:
            makespan = loops.replay(rows, problem.lanes, times, loops.NEVER, 0.0)
            pairs = _places_of_beats(program) if keep_beats else ()
            found.append(Seed(rows=rows, makespan=makespan, pairs=pairs, program=program))
    found.sort(key=lambda seed: seed.makespan)
    return [seed for seed in found if seed.pairs] or found


def _places_of_beats(program: Program) -> tuple[range, ...]:
    """Finds the places of the steady phase in each row; empty where there is none."""
    if (program.units.pair < 0).all():
        return ()
    try:
        made = compile_program(program, timetable="aligned")
    except ScheduleError:
        return ()
    steady = made.tables.steady
    if steady is None:
        return ()
    units, before = program.units, made.timeline.tick_of < steady.first_tick
    first = np.add.reduceat(before.astype(np.int64), units.row_start[:-1]).tolist()
    return tuple(range(start, start + 3 * steady.num_beats) for start in first)


def list_seeds(problem: Problem, rng: np.random.Generator, *, num_tried: int) -> list[Seed]:
    """Makes list schedules by random scores, and gives the best few, the fastest first.

    Two of three trials change some scores of one of the best so far. Half of all are made as if all
    actions took equally long; each is judged by its true makespan. If in all of them ranks hold too
    many activations to go on, microbatches run one after the other.
    """
    lanes, times = problem.lanes, problem.make_times()
    equal = replace(problem, costs=Costs(), transfer=0.0).lanes
    rows = np.zeros(times.start.shape, np.int64)
    mean_cost = float(lanes.work.sum() / lanes.length.sum())
    one_by_one = problem.rows_one_by_one()
    makespan = loops.replay(one_by_one, lanes, times, loops.NEVER, 0.0)
    slowest = Seed(rows=one_by_one, makespan=makespan)
    best: list[tuple[Seed, bool, np.ndarray]] = []
    for number in range(num_tried):
        by_equal, scores = bool(rng.random() < 0.5), _draw_scores(rng, problem, mean_cost)
        if best and number % 3:
            _, by_equal, old = best[rng.integers(len(best))]
            scores = np.where(rng.random(len(scores)) < 0.2, scores, old)
        by = equal if by_equal else lanes
        if not list_loops.list_schedule(rows, by, problem.depth, scores, times.end):
            continue
        makespan = loops.replay(rows, lanes, times, loops.NEVER, 0.0)
        if all(abs(makespan - seed.makespan) > 1e-9 for seed, _, _ in best):
            best.append((Seed(rows=rows.copy(), makespan=makespan), by_equal, scores))
            best = sorted(best, key=lambda entry: entry[0].makespan)[:4]
    return [seed for seed, _, _ in best] or [slowest]


def _draw_scores(rng: np.random.Generator, problem: Problem, mean_cost: float) -> np.ndarray:
    """Draws the scores of a list schedule, mostly with I before F before W."""
    kinds = rng.permutation(3) if rng.random() < 0.4 else np.array([1, 2, 0])
    drawn = dict(zip(_KINDS, _SCALE * kinds + rng.normal(0, _SCALE / 2, 3), strict=True))
    drawn |= {name: float(rng.choice(values)) for name, values in _RANDOM.items()}
    drawn["patience"] *= mean_cost
    drawn["most_live"] *= problem.num_stages
    return np.array([drawn[name] for name in list_loops.SCORES])
