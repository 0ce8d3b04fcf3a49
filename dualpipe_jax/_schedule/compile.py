"""Program -> Compiled: runs every pass and its verifier."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dualpipe_jax._schedule.align import align
from dualpipe_jax._schedule.allocate import allocate
from dualpipe_jax._schedule.emit import emit
from dualpipe_jax._schedule.exchanges import add_exchanges
from dualpipe_jax._schedule.ir import (
    INPUT_GRAD,
    TIMETABLES,
    Allocation,
    Program,
    Tables,
    Timeline,
)
from dualpipe_jax._schedule.place import place_shortest
from dualpipe_jax._schedule.release import release
from dualpipe_jax._schedule.steady import find_run
from dualpipe_jax._schedule.verify import (
    verify_allocation,
    verify_pairs,
    verify_program,
    verify_steady,
    verify_tables,
    verify_timeline,
)


@dataclass(frozen=True, eq=False)
class Compiled:
    """Holds what each pass made of a program."""

    program: Program
    timeline: Timeline
    allocation: Allocation
    tables: Tables


def compile_program(
    program: Program,
    *,
    timetable: str = "shortest",
    stash_deferred: bool = True,
    full_backward: bool = False,
    whole_stages: frozenset[int] = frozenset(),
) -> Compiled:
    """Compiles a program to tables, verifying the outcome of every pass; once for each choice.

    Args:
        program: The program.
        timetable: One of `TIMETABLES`.
        stash_deferred: Whether every I stashes for its W; else what a deferred W needs has slots of
            another kind, be it that it recomputes the rest, or that no other W needs any.
        full_backward: Whether an I and the W that directly follows it are the two halves of a full
            backward, so that a neighbour gets its cotangent after the W. Not those of the run of
            beats, nor those before it of which a neighbour reads the cotangent sooner.
        whole_stages: Stages whose full backwards have no halves, but are in the I's ticks.

    Raises:
        ScheduleError: if the program is not legal, or deadlocks.
        ValueError: if there is no timetable of that name.
    """
    require_timetable(timetable)
    return _compile(
        program, timetable, stash_deferred, full_backward, whole_stages if full_backward else None
    )


def require_timetable(timetable: object) -> None:
    """Requires one of `TIMETABLES`.

    Raises:
      ValueError: if there is no timetable of that name.
    """
    if timetable not in TIMETABLES:
        known = ", ".join(map(repr, TIMETABLES))
        raise ValueError(f"timetable={timetable!r}: must be one of {known}")


@lru_cache(maxsize=64)
def _compile(
    program: Program,
    timetable: str,
    stash_deferred: bool,
    full_backward: bool,
    whole_stages: frozenset[int] | None,
) -> Compiled:
    verify_program(program)
    if whole_stages:
        units = program.units
        is_whole = (units.opcode == INPUT_GRAD) & np.isin(units.stage, list(whole_stages))
        program = replace(program, at_once=frozenset(np.flatnonzero(is_whole).tolist()))
    run = None
    if timetable == "shortest":
        if full_backward:
            program = replace(program, full_backward=True)
        timeline = place_shortest(program)
        verify_timeline(timeline)
    else:
        timeline = place_shortest(program)
        verify_timeline(timeline)
        timeline = align(timeline)
        verify_timeline(timeline)
        verify_pairs(timeline)
        run = find_run(timeline)
        timeline = release(timeline, run, full_backward=full_backward)
        verify_timeline(timeline)
        program = timeline.program
    allocation = allocate(timeline, stash_deferred=stash_deferred)
    verify_allocation(timeline, allocation)
    tables = add_exchanges(emit(timeline, allocation, run))
    verify_tables(tables)
    verify_steady(tables)
    return Compiled(program, timeline, allocation, tables)
