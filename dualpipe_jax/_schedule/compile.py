"""Program -> Compiled: runs every pass and its verifier."""

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dualpipe_jax._schedule.actions import FORWARD, IDLE
from dualpipe_jax._schedule.align import align
from dualpipe_jax._schedule.allocate import allocate
from dualpipe_jax._schedule.durations import Durations
from dualpipe_jax._schedule.emit import emit
from dualpipe_jax._schedule.exchanges import add_exchanges
from dualpipe_jax._schedule.find_steady import SteadyPhase, find_steady
from dualpipe_jax._schedule.ir import TIMETABLES, Allocation, Program, Timeline
from dualpipe_jax._schedule.place import place_shortest
from dualpipe_jax._schedule.place_by_clock import place_by_clock
from dualpipe_jax._schedule.refine_opcodes import refine_opcodes
from dualpipe_jax._schedule.release import release
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._schedule.verify import (
    verify_allocation,
    verify_pairs,
    verify_program,
    verify_steady,
    verify_tables,
    verify_timeline,
)

# The patience of ranks, and the numbers of parts of the line of ranks, that are tried.
_PATIENCE = (np.inf, 2.0)
_PARTS = (1, 2, 4)
# A candidate must take less than this share of a simpler one's time: more parts make the program
# larger, and more ticks are more to skip.
_WORTH = 0.99
# Programs with more actions are not placed by the clock: that would take seconds.
_MOST_PLACED = 20_000
# The assumed time of an idle tick, in which the scan over ticks skips all actions, as a share of a
# stage's forward. It only decides between placements that are about as fast.
_IDLE_TICK = 0.02


@dataclass(frozen=True, eq=False)
class Compiled:
    """Holds the outcome of each pass."""

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
    durations: Durations | None = None,
) -> Compiled:
    """Compiles a program to tables, verifying the outcome of every pass; once for each choice.

    Args:
        program: The program.
        timetable: One of `TIMETABLES`.
        stash_deferred: Whether deferred weight grads share the stash; else their operands have
            slots of their own, since they recompute the rest, or since no other W stashes.
        full_backward: Whether an I and the W that directly follows it are a full backward, as
            `refine_opcodes` decides.
        whole_stages: Stages whose full backwards have no halves, but run in I's tick.
        durations: How long actions take: they are placed so that ranks wait less for each other, in
            programs of up to 20,000 actions. With None, or a timetable in which no transfer is
            urgent, each action takes a tick and runs as soon as it can.

    Raises:
        ScheduleError: if the program is not legal, or deadlocks.
        ValueError: if there is no timetable of that name.
    """
    require_timetable(timetable)
    whole = whole_stages if full_backward else frozenset()
    return _compile(program, timetable, stash_deferred, full_backward, whole, durations)


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
    whole_stages: frozenset[int],
    durations: Durations | None,
) -> Compiled:
    timeline, steady = _place(program, timetable, stash_deferred, full_backward, whole_stages)
    made = _lower(timeline, steady)
    if durations is None or made.tables.is_lazy or len(program.units) > _MOST_PLACED:
        made = replace(made, tables=add_exchanges(made.tables))
    else:
        made = _fastest(made, steady, durations)
        verify_timeline(made.timeline)
    verify_allocation(made.timeline, made.allocation)
    verify_tables(made.tables)
    verify_steady(made.tables)
    return made


def place_program(
    program: Program, *, timetable: str = "shortest", stash_deferred: bool = True
) -> tuple[Timeline, SteadyPhase | None]:
    """Gives each action a tick, without durations, and finds the steady phase; makes no tables.

    Arguments and errors are those of `compile_program`, which begins with this.
    """
    require_timetable(timetable)
    return _place(program, timetable, stash_deferred, False, frozenset())


# Compilations with several durations share them.
@lru_cache(maxsize=64)
def _place(
    program: Program,
    timetable: str,
    stash_deferred: bool,
    full_backward: bool,
    whole_stages: frozenset[int],
) -> tuple[Timeline, SteadyPhase | None]:
    verify_program(program)
    options = {
        "defers": not stash_deferred,
        "full_backward": full_backward,
        "whole_stages": whole_stages,
    }
    steady = None
    if timetable != "aligned":
        timeline = place_shortest(refine_opcodes(program, **options), timetable=timetable)
    else:
        aligned, steady = _align(program)
        refined = refine_opcodes(program, **options, aligned=aligned, steady=steady)
        timeline = release(aligned, steady, refined)
    verify_timeline(timeline)
    return timeline, steady


@lru_cache(maxsize=64)
def _align(program: Program) -> tuple[Timeline, SteadyPhase | None]:
    """Aligns the pairs of a program, and finds its steady phase."""
    timeline = place_shortest(program)
    verify_timeline(timeline)
    timeline = align(timeline)
    verify_timeline(timeline)
    verify_pairs(timeline)
    return timeline, find_steady(timeline)


def _lower(
    timeline: Timeline, steady: SteadyPhase | None, other: Allocation | None = None
) -> Compiled:
    """Makes tables of a timeline, without exchanges; `other` is as for `allocate`."""
    allocation = allocate(timeline, other)
    return Compiled(timeline.program, timeline, allocation, emit(timeline, allocation, steady))


def _is_same(one: Timeline, other: Timeline) -> bool:
    """Whether two timelines of a program act, and send, in the same ticks."""
    return bool((one.tick_of == other.tick_of).all() and (one.sent_in == other.sent_in).all())


def _fastest(made: Compiled, steady: SteadyPhase | None, durations: Durations) -> Compiled:
    """Places actions by the clock, in several ways, and takes the tables that replay fastest."""
    timeline, tables = made.timeline, made.tables
    work, placed = durations.work(tables), [made]
    after_steady = np.zeros(tables.num_ranks)
    if steady is not None:
        ends = replay(add_exchanges(tables), work, transfer=durations.transfer)
        after_steady = ends[steady.stop - 1]
    # A stage without layers may take no time at all.
    least_forward = min(filter(None, durations.of_opcode[FORWARD]), default=0.0)
    for patience in _PATIENCE:
        again, steady_then = place_by_clock(
            timeline,
            steady,
            took=work[timeline.tick_of, timeline.program.units.rank],
            after_steady=after_steady,
            transfer=durations.transfer,
            patience=patience,
        )
        if not any(_is_same(again, other.timeline) for other in placed):
            placed.append(_lower(again, steady_then, made.allocation))

    def time_of(tables: Tables, work: np.ndarray) -> float:
        return float(replay(tables, work, transfer=durations.transfer).max())

    fastest, least = made, np.inf
    for placement in placed:
        tables = placement.tables
        work = durations.work(tables)
        work[tables.opcode == IDLE] = _IDLE_TICK * least_forward
        # Merged sets of pairs, in however many parts, wait for no less than the pairs alone do.
        alone = time_of(add_exchanges(tables, most_sets=tables.num_ticks), work)
        for num_parts in _PARTS:
            if alone >= _WORTH * least:
                break
            tables = add_exchanges(placement.tables, num_parts=num_parts)
            if (time := time_of(tables, work)) < _WORTH * least:
                fastest, least = replace(placement, tables=tables), time
    return fastest
