import pytest

from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.place import place_shortest
from dualpipe_jax.schedules import Schedule


def test_every_action_runs_as_soon_as_it_can():
    timeline = place_shortest(parse_program("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1", name="x"))
    assert [
        " ".join(action or "." for action in row) for row in zip(*timeline.actions, strict=True)
    ] == [
        "0F0 0F1 . 0I0 0W0 . 0I1 0W1",
        ". 1F0 1I0 1W0 1F1 1I1 1W1 .",
    ]


def test_a_deadlock_names_who_waits_for_what():
    csv = "0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0"  # rank 1 wants microbatch 1 first
    with pytest.raises(ScheduleError, match="schedule 'mine' deadlocks at tick 1") as error:
        Schedule.from_csv(csv, name="mine").timeline()
    assert "\n  rank 0: 0I0 waits for 1I0 of rank 1" in str(error.value)
    assert "\n  rank 1: 1F1 waits for 0F1 of rank 0" in str(error.value)
