"""Seed -> its program, and how long that takes as ranks wait in it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.durations import Durations
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax._search.problem import Problem
from dualpipe_jax._search.seeds import Seed

_LEAST_BEATS = 0.8


@dataclass(frozen=True, kw_only=True, eq=False)
class Compiled:
    """A seed as a program.

    Attributes:
      seed: The seed.
      program: The program.
      makespan: With the program's own waits, with beats or without, whichever is faster.
      num_beats: The beats that it can have.
    """

    seed: Seed
    program: Program
    makespan: float
    num_beats: int

    @property
    def has_enough_beats(self) -> bool:
        """Whether it has most of the beats that are to be kept: costs decide over those at edges.

        A named order may lose as many by its own placement.
        """
        return self.num_beats >= _LEAST_BEATS * self.seed.num_beats

    def times(self, waits: str) -> tuple[float, float]:
        """Gives the time that counts, and the one that decides between equal ones."""
        times = self.makespan, self.seed.makespan
        return times if waits == "program" else times[::-1]


@dataclass(frozen=True)
class Compiler:
    """Compiles seeds of a problem to programs of a name."""

    problem: Problem
    name: str

    @cached_property
    def _durations(self) -> Durations:
        problem = self.problem
        of_stages = slice(problem.num_stages)
        cost, recompute = problem.lanes.cost[:, of_stages], problem.lanes.recompute[of_stages]
        return Durations(
            of_opcode=tuple(tuple(each.tolist()) for each in (0 * recompute, *cost)),
            recompute=tuple(recompute.tolist()),
            upper_share=(0.5,) * problem.num_stages,
            full_backward=None,
            embed_grad=problem.costs.embed_grad,
            transfer=problem.transfer,
        )

    def compile(self, seed: Seed) -> Compiled:
        """Takes the fastest program of an order, of those with enough beats if any has them."""
        tried = [self._compile(seed, program) for program in self._programs(seed)]
        return min(tried, key=lambda made: (not made.has_enough_beats, made.makespan))

    def _programs(self, seed: Seed) -> Iterator[Program]:
        """Writes the order: as it is named, or with pairs in beats, and outside of them too."""
        if seed.program is not None:
            yield replace(seed.program, name=self.name)
            return
        yield self.problem.program_of(seed.rows, name=self.name, pairs=seed.pairs)
        if seed.pairs:
            everywhere = [range(len(row)) for row in seed.rows]
            yield self.problem.program_of(seed.rows, name=self.name, pairs=everywhere)

    def _compile(self, seed: Seed, program: Program) -> Compiled:
        """Makes the tables, with and without beats, and replays them."""
        durations, makespan, num_beats = self._durations, np.inf, 0
        has_pairs = (program.units.pair >= 0).any()
        for timetable in ("shortest", "aligned") if has_pairs else ("shortest",):
            try:
                tables = compile_program(
                    program,
                    timetable=timetable,
                    stash_deferred=not any(durations.recompute),
                    durations=durations,
                ).tables
            except ScheduleError:  # it cannot be aligned
                continue
            ends = replay(tables, durations.work(tables), transfer=durations.transfer)
            makespan = min(makespan, float(ends.max()))
            num_beats = 0 if tables.steady is None else tables.steady.num_beats
        return Compiled(seed=seed, program=program, makespan=makespan, num_beats=num_beats)
