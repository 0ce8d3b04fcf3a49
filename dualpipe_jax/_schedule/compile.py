"""Program -> Compiled: runs every pass and its verifier."""

from dataclasses import dataclass
from functools import lru_cache

from dualpipe_jax._schedule.allocate import allocate
from dualpipe_jax._schedule.emit import emit
from dualpipe_jax._schedule.ir import Allocation, Program, Tables, Timeline
from dualpipe_jax._schedule.place import place_shortest
from dualpipe_jax._schedule.verify import (
    verify_allocation,
    verify_program,
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


@lru_cache(maxsize=64)
def compile_program(program: Program, *, stash_deferred: bool = True) -> Compiled:
    """Compiles a program to tables, verifying the outcome of every pass.

    Args:
        program: The program.
        stash_deferred: Whether every I stashes for its W; else an I whose W is deferred keeps in
            slots of another kind what that W cannot recompute.

    Raises:
        ScheduleError: if the program is not legal, or deadlocks.
    """
    verify_program(program)
    timeline = place_shortest(program)
    verify_timeline(timeline)
    allocation = allocate(timeline, stash_deferred=stash_deferred)
    verify_allocation(timeline, allocation)
    tables = emit(timeline, allocation)
    verify_tables(tables)
    return Compiled(program, timeline, allocation, tables)
