"""A user's own schedule runs like ours; an impossible one is refused, showing where it breaks."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax.schedules import Schedule
from tests import table_interpreter
from tests.schedules_under_test import NAMES

# Refused texts, and the whole message, but for the name of the schedule at its start.
REFUSED = {
    "rank 1 takes microbatch 1 first": (
        """
        0F0,0B0,0F1,0B1
        1F1,1B1,1F0,1B0
        """,
        """
        deadlocks at 0I0 on rank 0 in tick 1: these ranks wait in a circle; reorder their rows:
          rank 0: 0I0 waits for 1I0 of rank 1, which comes after 1F1
          rank 1: 1F1 waits for 0F1 of rank 0, which comes after 0I0
          tick     0    1
          rank 0  0F0 [0I0]
          rank 1   .    .
        """,
    ),
    "ranks 0 and 1 wait for others, 2 and 3 for each other": (
        """
        0F0,0F1,0B0,0B1
        1F0,1F1,1B0,1B1
        2F0,2B0,2F1,2B1
        3F0,3F1,3B0,3B1
        """,
        """
        deadlocks at 2I0 on rank 2 in tick 3: these ranks wait in a circle; reorder their rows:
          rank 2: 2I0 waits for 3I0 of rank 3, which comes after 3F1
          rank 3: 3F1 waits for 2F1 of rank 2, which comes after 2I0
          tick     0    1    2    3
          rank 1   .   1F0  1F1   .
          rank 2   .    .   2F0 [2I0]
          rank 3   .    .    .   3F0
        """,
    ),
    "a rank waits for itself": (
        "1F0,0F0,1B0,0B0",
        """
        deadlocks at 1F0 on rank 0 in tick 0: these ranks wait in a circle; reorder their rows:
          rank 0: 1F0 waits for 0F0 of rank 0, which comes after 1F0
          tick     0
          rank 0 [1F0]
        """,
    ),
    "a weight grad is missing": (
        """
        0F0,0B0
        1F0,1I0
        """,
        """
        must have exactly one F, one I and one W (a B is both) of each (stage, microbatch):
          1W0 (no)
        the first is missing after 1I0 on rank 1 in tick 2:
          tick     0    1    2    3    4
          rank 0  0F0   .    .   0I0  0W0
          rank 1   .   1F0 [1I0]  .    .
        """,
    ),
    "the first forward is missing": (
        """
        0B0
        1F0,1B0
        """,
        """
        must have exactly one F, one I and one W (a B is both) of each (stage, microbatch):
          0F0 (no)
        the first is missing beside 0I0 on rank 0 in tick 2:
          tick     0    1    2    3
          rank 0   .    .  [0I0] 0W0
          rank 1  1F0  1I0  1W0   .
        """,
    ),
    "a forward comes twice": (
        """
        0F0,0B0,0F0
        1F0,1B0
        """,
        """
        must have exactly one F, one I and one W (a B is both) of each (stage, microbatch):
          0F0 (2 times, on rank 0, 0)
        the first is 0F0 on rank 0 in tick 5:
          tick     1    2    3    4    5
          rank 0   .    .   0I0  0W0 [0F0]
          rank 1  1F0  1I0  1W0   .    .
        """,
    ),
    "a backward comes before its forward": (
        """
        0F0,0F1,0B0,0B1
        1F0,1B0,1B1,1F1
        """,
        """
        must run F, then I, then W of a (stage, microbatch) on one rank:
          1I1 is before 1F1 on rank 1
        the first is 1I1 on rank 1 in tick 4:
          tick     0    1    2    3    4
          rank 0  0F0  0F1   .   0I0  0W0
          rank 1   .   1F0  1I0  1W0 [1I1]
        """,
    ),
    "two faults, of which the rank comes to the first only": (
        """
        0F0,0F1,0B0,0B1
        1B0,1F0,1F1,1I1,1W1,1W1
        """,
        """
        must have exactly one F, one I and one W (a B is both) of each (stage, microbatch):
          1W1 (2 times, on rank 1, 1)
        the first is 1W1, to which rank 1 does not come past 1I0 on rank 1 in tick 0:
          tick     0    1
          rank 0  0F0  0F1
          rank 1 [1I0]  .
        """,
    ),
    "forward and backward on different ranks": (
        """
        0F0,1B0
        1F0,0B0
        """,
        """
        must run F, then I, then W of a (stage, microbatch) on one rank:
          0F0 is on rank 0 and 0I0 on rank 1
          1F0 is on rank 1 and 1I0 on rank 0
        the first is 0I0 on rank 1 in tick 3:
          tick     0    1    2    3    4
          rank 0  0F0   .   1I0  1W0   .
          rank 1   .   1F0   .  [0I0] 0W0
        """,
    ),
    "a stage out of reach": (
        """
        0F0,0B0
        3F0,3B0
        1F0,1B0
        2F0,2B0
        """,
        """
        must have consecutive stages on the same or neighbouring ranks:
          microbatch 0 goes from rank 0 (stage 0) to rank 2
          microbatch 0 goes from rank 3 (stage 2) to rank 1
        the first is 1F0 on rank 2 in tick 1:
          tick     0    1    2    3    4    5
          rank 1   .    .    .   3F0  3I0  3W0
          rank 2   .  [1F0]  .    .    .    .
          rank 3   .    .   2F0   .    .   2I0
        """,
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_impossible_schedule_shows_where_it_breaks(case):
    csv, message = ("\n".join(map(str.strip, text.strip().split("\n"))) for text in REFUSED[case])
    with pytest.raises(ScheduleError) as error:
        Schedule.from_csv(csv, name="mine")
    found = "\n".join(map(str.strip, str(error.value).split("\n")))
    assert found == "schedule 'mine' " + message


def test_a_large_circle_is_cut_short():
    # Round the ring twice; every rank wants its second stage first.
    rows = [f"{20 + r}F0,{r}F0,{20 + r}B0,{r}B0" for r in range(20)]
    with pytest.raises(ScheduleError) as error:
        Schedule.from_csv("\n".join(rows), name="mine")
    lines = str(error.value).split("\n")
    assert lines[0].startswith("schedule 'mine' deadlocks at 20F0 on rank 0 in tick 0: these ranks")
    assert lines[1:3] == [
        "  rank 0: 20F0 waits for 19F0 of rank 19, which comes after 39F0",
        "  rank 19: 39F0 waits for 38F0 of rank 18",
    ]
    assert lines[8:10] == ["  rank 13: 33F0 waits for 32F0 of rank 12", "  and 12 ranks more"]


@given(st.sampled_from(NAMES), st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=150, deadline=None)
def test_swapped_cells_run_exactly_or_are_refused(name, num_ranks, num_microbatches, data):
    program = schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches).program
    rows = [list(map(str, row)) for row in program.rows]
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        a, b = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
        row[a], row[b] = row[b], row[a]
    text = "\n".join(map(",".join, rows))
    try:
        tables = Schedule.from_csv(text).compiled().tables
    except ScheduleError as error:
        message = str(error)
        assert " on rank " in message
        assert " in tick " in message
        assert "\n  tick  " in message
        return
    model = table_interpreter.random_model(tables.num_stages, tables.num_microbatches)
    loss, grads = table_interpreter.run(tables, *model)
    expected_loss, expected_grads = table_interpreter.loss_and_grads(*model)
    # Only the order of summation differs.
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-12)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_a_large_deadlock_is_refused_in_seconds():
    schedule = schedules.dualpipe(num_ranks=32, num_microbatches=256)
    rows = schedule.to_csv().split("\n")
    cells = rows[7].split(",")
    rows[7] = ",".join([cells[-40], *cells[:-40], *cells[-39:]])
    start = time.process_time()
    with pytest.raises(ScheduleError, match="on rank 7 in tick"):
        Schedule.from_csv("\n".join(rows))
    assert time.process_time() - start < 5  # of this process: other load does not count


def test_many_ranks_are_read_in_seconds():
    num_ranks = 30_000
    text = "\n".join(f"{rank}F0,{rank}B0" for rank in range(num_ranks))
    start = time.process_time()
    assert Schedule.from_csv(text).num_ranks == num_ranks
    assert time.process_time() - start < 10  # a table of its ticks would have 2 * 30,000^2 cells
