"""Whom ranks wait for, and why: the sums are the replay's, and the reasons those of the tables."""

import numpy as np
import pytest

from dualpipe_jax._predict.waits import (
    EARLY,
    MERGED,
    NEXT,
    RECEIVER,
    TRANSFER,
    Wait,
    Waits,
    explain_waits,
)
from dualpipe_jax._schedule.actions import IDLE
from dualpipe_jax._schedule.exchanges import add_exchanges
from dualpipe_jax._schedule.replay import replay, replay_dependencies
from dualpipe_jax._schedule.tables import Tables
from tests.schedules_under_test import NAMES, compiled

SIZES = ((1, 3), (2, 5), (3, 4), (4, 16), (8, 16))


def random_work(tables: Tables) -> np.ndarray:
    """Makes whole numbers, whose sums are the same in any order."""
    random = np.random.default_rng(0).integers(1, 9, tables.opcode.shape)
    return np.where(tables.opcode == IDLE, 0, random).astype(float)


def waits_of(made: Waits) -> list[tuple[int, Wait]]:
    return [(tick.number, wait) for tick in made.ticks for wait in tick.waits]


@pytest.mark.parametrize("rendezvous", [True, False])
@pytest.mark.parametrize("full_backward", [False, True])
@pytest.mark.parametrize("timetable", ["shortest", "aligned"])
@pytest.mark.parametrize("name", NAMES)
def test_waits_and_work_add_up_to_the_replay(
    name: str, timetable: str, full_backward: bool, rendezvous: bool
) -> None:
    for num_ranks, num_microbatches in SIZES:
        try:
            tables = compiled(
                name, num_ranks, num_microbatches, timetable, full_backward=full_backward
            ).tables
        except ValueError:
            continue  # none of that size
        work = random_work(tables)
        for transfer in (0.0, 2.0):
            options = {"transfer": transfer, "rendezvous": rendezvous}
            made = explain_waits(tables, work, **options)
            ends = replay(tables, work, **options)[-1]
            total = work.sum(axis=0) + made.in_run
            for _, wait in waits_of(made):
                assert wait.time > 0
                total[wait.rank] += wait.time
            assert total.tolist() == ends.tolist()
            assert (ends + made.finished == ends.max()).all()
            assert min(made.in_run) >= 0
            idle = tables.num_ranks * ends.max() - work.sum()
            assert sum(made.by_reason().values()) == idle - sum(made.in_run + made.finished)


def stored(tables: Tables, tick: int) -> set[tuple[int, int]]:
    """The (source, target) of the values of a tick that are stored in the next one."""
    num_ranks = tables.num_ranks
    return {
        ((target + step) % num_ranks, target)
        for column, step in ((tables.from_left, -1), (tables.from_right, 1))
        for target in range(num_ranks)
        if tick + 1 < tables.num_ticks and column[tick + 1, target] >= 0
    }


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_reasons_are_those_of_the_tables(name: str, num_parts: int) -> None:
    tables = compiled(name, 4, 8).tables
    tables = add_exchanges(tables, num_parts=num_parts, most_sets=2 * num_parts)
    found = set()
    for tick, wait in waits_of(explain_waits(tables, random_work(tables), transfer=0.5)):
        found.add(wait.reason)
        received, sent = (wait.other, wait.rank), (wait.rank, wait.other)
        match wait.reason:
            case "reads it next" | "early":
                assert received in stored(tables, tick)
                assert wait.read_in is not None
                acts = np.flatnonzero(tables.opcode[tick + 1 :, wait.rank] != IDLE) + tick + 1
                assert wait.read_in in acts
                assert tables.read[wait.read_in, wait.rank] >= 0
                assert (wait.read_in == acts[0]) == (wait.reason == NEXT)
            case "for its receiver":
                assert sent in stored(tables, tick)
            case "merged":
                parts = zip(tables.exchanges, tables.exchange[tick], strict=True)
                pairs = {p for of_part, n in parts for side in of_part[n] for p in side}
                assert (pairs & {received, sent}) - stored(tables, tick)
    assert {NEXT, RECEIVER, TRANSFER} <= found
    assert EARLY in found or name == "gpipe"


@pytest.mark.parametrize("name", NAMES)
def test_without_false_waits_nothing_is_slower_than_dependencies(name: str) -> None:
    made = compiled(name, 4, 8)
    tables = made.tables
    for work in (random_work(tables), (tables.opcode != IDLE).astype(float)):
        waits = explain_waits(tables, work, transfer=0.0).by_reason()
        false_waits = waits[EARLY] + waits[RECEIVER] + waits[MERGED]
        makespan = replay(tables, work, transfer=0.0).max()
        least = replay_dependencies(made.timeline, work, transfer=0.0).max()
        assert makespan == least if false_waits == 0 else makespan >= least


def test_ranks_wait_for_transfers_that_merging_added() -> None:
    tables = compiled("1f1b", 4, 8).tables
    work = random_work(tables)
    assert explain_waits(tables, work, transfer=1.0).by_reason()[MERGED] == 0
    merged = add_exchanges(tables, most_sets=1)
    assert explain_waits(merged, work, transfer=1.0).by_reason()[MERGED] > 0


def test_a_false_wait_is_charged_with_the_time_that_it_adds() -> None:
    # After the first tick each of two ranks sends the other an x, which that reads at once.
    tables = compiled("dualpipe", 2, 4).tables
    assert tables.exchanges[0][tables.exchange[0, 0]] == (((0, 1),), ((1, 0),))
    work = np.where(tables.opcode == IDLE, 0.0, 1.0)
    work[0] = 5, 1
    waits = explain_waits(tables, work, transfer=0.25).ticks[0].waits
    assert [(wait.rank, wait.reason, wait.time) for wait in waits] == [
        (0, TRANSFER, 0.25),
        (1, NEXT, 4.0),
        (1, TRANSFER, 0.25),
    ]
