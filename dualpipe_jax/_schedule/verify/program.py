"""Verifies a Program before it is placed; a user's CSV is judged here first."""

from itertools import islice

import numpy as np

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.ir import FORWARD, INPUT_GRAD, OPCODE_LETTERS, WEIGHT_GRAD, Program

_MOST_NAMED = 8
_ORDER = (FORWARD, INPUT_GRAD), (INPUT_GRAD, WEIGHT_GRAD)


def verify_program(program: Program) -> None:
    """Checks that a program could be placed, were it not for deadlocks.

    - There is a row for each rank, and every action names a stage and a microbatch that exist.
    - Each (stage, microbatch) has exactly one F, one I and one W (of a B or by themselves); in a
      forward-only program one F and nothing else.
    - They stand on one rank: I after F, W after I.
    - Consecutive stages of a microbatch are on the same rank or on neighbours in the ring.

    Raises:
        ScheduleError: naming the offending actions.
    """
    if len(program.rows) != program.num_ranks:
        raise ScheduleError(
            f"schedule {program.name!r} has {len(program.rows)} rows for {program.num_ranks} ranks"
        )
    _check_numbers(program)
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
    for what, number, used in (
        ("stage", program.num_stages, units.stage),
        ("microbatch", program.num_microbatches, units.microbatch),
    ):
        present = set(used.tolist())
        missing = (n for n in range(number) if n not in present)
        faults += [f"{what} {n} has none" for n in islice(missing, _MOST_NAMED)]
        num_faults += number - len(present)
    rule = "must have actions of each stage and microbatch, counting from 0"
    _raise_for(program, faults, rule, num_faults=num_faults)


def _check_completeness(program: Program) -> None:
    units = program.units
    count = np.zeros((4, program.num_stages, program.num_microbatches), np.int64)
    np.add.at(count, (units.opcode, units.stage, units.microbatch), 1)
    wanted = np.zeros((4, 1, 1), np.int64)
    wanted[[FORWARD] if program.forward_only else [FORWARD, INPUT_GRAD, WEIGHT_GRAD]] = 1
    faults, wrong = [], np.argwhere(count != wanted).tolist()
    for opcode, stage, microbatch in wrong[:_MOST_NAMED]:
        ranks = units.rank[
            (units.opcode == opcode) & (units.stage == stage) & (units.microbatch == microbatch)
        ]
        found = f"{len(ranks)} times, on rank {', '.join(map(str, ranks))}" if len(ranks) else "no"
        faults.append(f"{stage}{OPCODE_LETTERS[opcode]}{microbatch} ({found})")
    kinds = "F and nothing else" if program.forward_only else "F, one I and one W (a B is both)"
    rule = f"must have exactly one {kinds} of each (stage, microbatch)"
    _raise_for(program, faults, rule, num_faults=len(wrong))


def _check_rows(program: Program) -> None:
    units = program.units
    index = np.zeros((4, program.num_stages, program.num_microbatches), np.int64)
    index[units.opcode, units.stage, units.microbatch] = np.arange(len(units))
    faults = []
    for before, after in () if program.forward_only else _ORDER:
        first, second = index[before], index[after]
        apart = units.rank[first] != units.rank[second]
        for i, j in zip(first[apart], second[apart], strict=True):
            ranks = f"on rank {units.rank[i]} and {units.name(j)} on rank {units.rank[j]}"
            faults.append(f"{units.name(i)} is {ranks}")
        swapped = ~apart & (first > second)
        for i, j in zip(first[swapped], second[swapped], strict=True):
            faults.append(f"{units.name(j)} is before {units.name(i)} on rank {units.rank[i]}")
    _raise_for(program, faults, "must run F, then I, then W of a (stage, microbatch) on one rank")


def _check_neighbours(program: Program) -> None:
    rank_of, num_ranks = program.rank_of, program.num_ranks
    step = (rank_of[1:] - rank_of[:-1]) % num_ranks
    faults = [
        f"microbatch {m} goes from rank {rank_of[s, m]} (stage {s}) to rank {rank_of[s + 1, m]}"
        for s, m in np.argwhere((step > 1) & (step < num_ranks - 1))
    ]
    _raise_for(program, faults, "must have consecutive stages on the same or neighbouring ranks")


def _raise_for(
    program: Program, faults: list[str], rule: str, *, num_faults: int | None = None
) -> None:
    """Raises for faults, if any; there may be more, `num_faults`, than were written down."""
    if faults:
        num_more = (num_faults or len(faults)) - _MOST_NAMED
        more = f"\n  and {num_more} more" if num_more > 0 else ""
        listed = "".join(f"\n  {fault}" for fault in faults[:_MOST_NAMED])
        raise ScheduleError(f"schedule {program.name!r} {rule}:{listed}{more}")
