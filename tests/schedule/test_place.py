import numpy as np
import pytest
from hypothesis import given, settings

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.dependencies import NEVER, find_dependencies, run_in_order
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.place import place_shortest
from dualpipe_jax.schedules import Schedule
from tests.schedule.random_programs import programs


def test_every_action_runs_as_soon_as_it_can():
    timeline = place_shortest(parse_program("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1", name="x"))
    assert [
        " ".join(action or "." for action in row) for row in zip(*timeline.actions, strict=True)
    ] == [
        "0F0 0F1 . 0I0 0W0 . 0I1 0W1",
        ". 1F0 1I0 1W0 1F1 1I1 1W1 .",
    ]


def tick_by_tick(program: Program, lag: int) -> list[int]:
    """Runs every rank's next action in the first tick in which its values are there."""
    units, needs = program.units, find_dependencies(program)
    tick_of = [NEVER] * len(units)
    upcoming = units.row_start[:-1].tolist()
    for tick in range(3 * len(units)):
        for rank in range(program.num_ranks):
            action = upcoming[rank]
            if action == units.row_start[rank + 1]:
                continue
            payload, own = int(needs.payload[action]), int(needs.own[action])
            after = lag if payload >= 0 and units.rank[payload] != rank else 1
            if all(
                needed < 0 or (tick_of[needed] < NEVER and tick_of[needed] + gap <= tick)
                for needed, gap in ((payload, after), (own, 1))
            ):
                tick_of[action] = tick
                upcoming[rank] += 1
    return tick_of


@given(programs())
@settings(max_examples=60, deadline=None)
def test_ticks_are_those_of_a_run_tick_by_tick(program):
    for lag in (1, 2):
        found = run_in_order(program, find_dependencies(program), lag=lag)
        assert found.tolist() == tick_by_tick(program, lag)


def test_ranks_that_wait_for_ever_have_no_ticks():
    program = parse_program("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0", name="x")
    found = run_in_order(program, find_dependencies(program))
    assert found.tolist() == tick_by_tick(program, 1)
    assert np.flatnonzero(found != NEVER).tolist() == [0]


def test_tables_that_no_memory_holds_are_refused():
    made = Schedule.from_csv("\n".join(f"{rank}F0,{rank}B0" for rank in range(20_000)))
    message = r"'csv' takes 40,001 ticks on 20,000 ranks, but must take at most 60,000,000"
    with pytest.raises(ScheduleError, match=message):
        made.timeline()
