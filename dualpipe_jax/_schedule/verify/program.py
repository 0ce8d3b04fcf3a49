"""Verifies a Program before it is placed; a user's CSV is judged here first."""

from itertools import islice

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.actions import FORWARD, INPUT_GRAD, WEIGHT_GRAD, letter_of
from dualpipe_jax._schedule.dependencies import find_dependencies, run_in_order
from dualpipe_jax._schedule.excerpt import show_action
from dualpipe_jax._schedule.ir import Program

_MOST_NAMED = 8
# Up to so many (stage, microbatch)s the missing actions are named, however few there are.
_ALWAYS_SHOWN = 1_000_000
_ORDER = (FORWARD, INPUT_GRAD), (INPUT_GRAD, WEIGHT_GRAD)


def verify_program(program: Program) -> None:
    """Checks that a program could be placed, were it not for deadlocks.

    - There is a row for each rank, and every action names a stage and a microbatch that exist.
    - Each (stage, microbatch) has exactly one F, one I and one W (of a B or by themselves); in a
      forward-only program one F and nothing else.
    - They run on one rank: I after F, W after I.
    - Consecutive stages of a microbatch are on the same rank or on neighbours in the ring.

    Raises:
        ScheduleError: naming the offending actions, and rank and tick of the first of them, and
            showing the ticks around.
    """
    if len(program.rows) != program.num_ranks:
        raise ScheduleError(
            f"schedule {program.name!r} has {len(program.rows)} rows for {program.num_ranks} ranks"
        )
    _check_numbers(program)
    _check_size(program)
    _check_completeness(program)
    _check_rows(program)
    _check_neighbours(program)


def _check_numbers(program: Program) -> None:
    units = program.units
    known = (units.stage >= 0) & (units.stage < program.num_stages)
    known &= (units.microbatch >= 0) & (units.microbatch < program.num_microbatches)
    _raise_for(
        program,
        [f"{units.name(i)} on rank {units.rank[i]}" for i in np.flatnonzero(~known).tolist()],
        f"must name stages in 0..{program.num_stages - 1} and microbatches in "
        f"0..{program.num_microbatches - 1}",
    )
    # A gap is named before the numbers size an array: a typing error may be a huge one.
    faults, num_faults = [], 0
    for name, number, used in (
        ("stage", program.num_stages, units.stage),
        ("microbatch", program.num_microbatches, units.microbatch),
    ):
        present = set(used.tolist())
        missing = (n for n in range(number) if n not in present)
        faults += [f"{name} {n} has none" for n in islice(missing, _MOST_NAMED)]
        num_faults += number - len(present)
    rule = "must have actions of each stage and microbatch, counting from 0"
    _raise_for(program, faults, rule, num_faults=num_faults)


def _check_size(program: Program) -> None:
    """Refuses a program of so few actions that an array of the missing ones may not fit."""
    num_actions, num_places = len(program.units), program.num_stages * program.num_microbatches
    if num_places > max(num_actions, _ALWAYS_SHOWN):
        raise ScheduleError(
            f"schedule {program.name!r} has {num_actions:,} actions, fewer than its "
            f"{program.num_stages:,} stages x {program.num_microbatches:,} microbatches, each of "
            "which must have its own; mind that cells are <stage><F|I|W|B><microbatch>"
        )


def _check_completeness(program: Program) -> None:
    units = program.units
    count = np.zeros((4, program.num_stages, program.num_microbatches), np.int64)
    np.add.at(count, (units.opcode, units.stage, units.microbatch), 1)
    wanted = np.zeros((4, 1, 1), np.int64)
    wanted[[FORWARD] if program.forward_only else [FORWARD, INPUT_GRAD, WEIGHT_GRAD]] = 1
    faults, wrong = [], np.argwhere(count != wanted).tolist()
    at, relation = None, "is"
    for opcode, stage, microbatch in wrong[:_MOST_NAMED]:
        same = (units.stage == stage) & (units.microbatch == microbatch)
        ranks = units.rank[same & (units.opcode == opcode)]
        on = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", .." if len(ranks) > _MOST_NAMED else "")
        found = f"{len(ranks)} times, on rank {on}" if len(ranks) else "no"
        faults.append(f"{stage}{letter_of(opcode)}{microbatch} ({found})")
        if at is None:
            at, relation = _find_place(program, opcode, stage, microbatch)
    kinds = "F and nothing else" if program.forward_only else "F, one I and one W (a B is both)"
    rule = f"must have exactly one {kinds} of each (stage, microbatch)"
    _raise_for(program, faults, rule, num_faults=len(wrong), at=at, relation=relation)


def _find_place(
    program: Program, opcode: int, stage: int, microbatch: int
) -> tuple[int | None, str]:
    """Finds the place where an action is once too often, or beside which it is missing."""
    units = program.units
    of_microbatch = units.microbatch == microbatch
    here, before = of_microbatch & (units.stage == stage), units.stage == stage - 1
    there = np.flatnonzero(here & (units.opcode == opcode))
    if len(there):
        return int(there[-1]), "is"
    earlier = here & (units.opcode < opcode)
    earlier |= of_microbatch & before & (units.opcode == FORWARD) & (opcode == FORWARD)
    if earlier.any():
        return int(np.flatnonzero(earlier)[-1]), "is missing after"
    if of_microbatch.any():
        return int(np.flatnonzero(of_microbatch)[0]), "is missing beside"
    return None, "is"


def _check_rows(program: Program) -> None:
    units = program.units
    index = np.zeros((4, program.num_stages, program.num_microbatches), np.int64)
    index[units.opcode, units.stage, units.microbatch] = np.arange(len(units))
    faults, at = [], []
    for before, after in () if program.forward_only else _ORDER:
        first, second = index[before], index[after]
        apart = units.rank[first] != units.rank[second]
        for i, j in zip(first[apart], second[apart], strict=True):
            ranks = f"on rank {units.rank[i]} and {units.name(j)} on rank {units.rank[j]}"
            faults.append(f"{units.name(i)} is {ranks}")
            at.append(int(j))
        swapped = ~apart & (first > second)
        for i, j in zip(first[swapped], second[swapped], strict=True):
            faults.append(f"{units.name(j)} is before {units.name(i)} on rank {units.rank[i]}")
            at.append(int(j))
    rule = "must run F, then I, then W of a (stage, microbatch) on one rank"
    _raise_for(program, faults, rule, at=at[0] if at else None)


def _check_neighbours(program: Program) -> None:
    units, rank_of, num_ranks = program.units, program.rank_of, program.num_ranks
    step = (rank_of[1:] - rank_of[:-1]) % num_ranks
    apart = np.argwhere((step > 1) & (step < num_ranks - 1)).tolist()
    faults = [
        f"microbatch {m} goes from rank {rank_of[s, m]} (stage {s}) to rank {rank_of[s + 1, m]}"
        for s, m in apart
    ]
    at = None
    if apart:
        stage, microbatch = apart[0]
        arrives = (units.opcode == FORWARD) & (units.stage == stage + 1)
        at = int(np.flatnonzero(arrives & (units.microbatch == microbatch))[0])
    rule = "must have consecutive stages on the same or neighbouring ranks"
    _raise_for(program, faults, rule, at=at)


def _raise_for(
    program: Program,
    faults: list[str],
    rule: str,
    *,
    num_faults: int | None = None,
    at: int | None = None,
    relation: str = "is",
) -> None:
    """Raises for faults, if any; there may be more, `num_faults`, than were written down.

    `at` is the action of the first of them, or one in a `relation` to it: the ticks around it are
    drawn, of the program run as far as it goes.
    """
    if not faults:
        return
    num_more = (num_faults or len(faults)) - _MOST_NAMED
    more = f"\n  and {num_more} more" if num_more > 0 else ""
    listed = "".join(f"\n  {fault}" for fault in faults[:_MOST_NAMED])
    first = ""
    if at is not None:
        tick_of = run_in_order(program, find_dependencies(program))
        where, excerpt = show_action(program, tick_of, at)
        first = f"\nthe first {relation} {where}:{excerpt}"
    raise ScheduleError(f"schedule {program.name!r} {rule}:{listed}{more}{first}")
