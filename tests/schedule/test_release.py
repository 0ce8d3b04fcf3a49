"""Released timelines: the steady phase is kept, and no action after it waits without need."""

import numpy as np
import pytest

from dualpipe_jax._schedule.align import align
from dualpipe_jax._schedule.dependencies import find_dependencies
from dualpipe_jax._schedule.find_steady import SteadyPhase, find_steady
from dualpipe_jax._schedule.ir import Timeline
from dualpipe_jax._schedule.release import release
from dualpipe_jax._schedule.verify import verify_timeline
from tests.schedules_under_test import PAIRED, WIDE_GRID, compiled

CASES = [case for case in WIDE_GRID if case[0] in PAIRED]


def released(
    name: str, num_ranks: int, num_microbatches: int
) -> tuple[Timeline, Timeline, SteadyPhase | None]:
    aligned = align(compiled(name, num_ranks, num_microbatches).timeline)
    run = find_steady(aligned)
    return aligned, release(aligned, run), run


@pytest.mark.parametrize("num_ranks", [2, 4, 6, 8, 10, 16, 24, 32])
def test_dualpipe_has_its_run_in_the_fewest_ticks(num_ranks: int) -> None:
    P = num_ranks
    for N in (2 * P + 2, 2 * P + 4, 3 * P, 5 * P):
        tables = compiled("dualpipe", P, N, "aligned").tables
        assert tables.num_ticks == compiled("dualpipe", P, N).tables.num_ticks
        assert tables.num_ticks == 3 * N + P // 2 - 1
        num_beats = tables.steady.num_beats if tables.steady else 0
        assert N - 2 * P <= num_beats <= N - 2 * P + 2
        # The price of it is one x or cotangent more that waits.
        shortest = compiled("dualpipe", P, N).tables.num_slots
        most = {**shortest, "received": shortest["received"] + 1}
        assert all(tables.num_slots[buffer] <= count for buffer, count in most.items())


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8, 12])
def test_dualpipev_has_its_run_in_the_fewest_ticks(num_ranks: int) -> None:
    for num_microbatches in (2 * num_ranks + 1, 3 * num_ranks, 5 * num_ranks):
        tables = compiled("dualpipev", num_ranks, num_microbatches, "aligned").tables
        assert tables.steady is not None
        shortest = compiled("dualpipev", num_ranks, num_microbatches).tables
        assert tables.num_ticks == shortest.num_ticks


def test_the_run_and_all_before_it_stay_as_they_were() -> None:
    has_steady = 0
    for case in CASES:
        aligned, timeline, run = released(*case)
        if run is None:
            continue
        has_steady += 1
        is_kept = aligned.tick_of < run.stop
        np.testing.assert_array_equal(timeline.tick_of[is_kept], aligned.tick_of[is_kept])
        assert (timeline.tick_of[~is_kept] >= run.stop).all()
        assert (timeline.tick_of <= aligned.tick_of).all()
        again = find_steady(timeline)
        assert again is not None
        assert (again.first_tick, again.num_beats) == (run.first_tick, run.num_beats)
    assert has_steady > 50


def test_no_action_after_the_steady_phase_could_come_earlier() -> None:
    for case in CASES[::3]:
        _, timeline, run = released(*case)
        verify_timeline(timeline)
        units, tick_of = timeline.program.units, timeline.tick_of.tolist()
        needs = find_dependencies(timeline.program)
        stop = run.stop if run else 0
        for i in range(len(units)):
            if tick_of[i] < stop:
                continue
            before = [i - 1] if i and units.rank[i] == units.rank[i - 1] else []
            needed = [int(p) for p in (needs.payload[i], needs.own[i]) if p >= 0]
            earliest = max([tick_of[j] + 1 for j in before + needed], default=0)
            assert tick_of[i] == max(earliest, stop), (case, units.name(i))


def test_without_a_run_it_is_the_shortest() -> None:
    for case in (("dualpipe", 8, 8), ("dualpipe", 5, 3), ("dualpipev", 4, 4)):
        aligned, timeline, run = released(*case)
        assert run is None
        shortest = compiled(*case).timeline
        np.testing.assert_array_equal(timeline.tick_of, shortest.tick_of)
        assert timeline.timetable == aligned.timetable == "aligned"
