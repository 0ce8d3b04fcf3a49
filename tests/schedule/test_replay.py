"""The replay: small cases by hand, and slow references."""

import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._schedule.actions import (
    FORWARD,
    IDLE,
    INPUT_GRAD,
    WEIGHT_GRAD,
    unit_of,
)
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.exchanges import add_exchanges
from dualpipe_jax._schedule.grammar import parse_program
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax._schedule.replay import as_full_backwards, replay, replay_dependencies
from dualpipe_jax._schedule.tables import Tables
from tests.replay_references import follow_dependencies, wait_as_told, wait_lazily
from tests.schedule.random_programs import programs
from tests.schedules_under_test import compiled

# Twice as many stages as ranks, on a ring that wraps.
LOOPED = parse_program("0F0,3F0,3B0,0B0\n1F0,4F0,4B0,1B0\n2F0,5F0,5B0,2B0", name="looped")

durations = st.floats(0, 8) | st.integers(0, 4).map(float)
# (num_parts, most_sets): as compiled, in parts, and with so few sets that most waits are false.
EXCHANGES = ((1, 12), (2, 12), (4, 12), (1, 1), (2, 4))


def work_at_random(tables: Tables, seed: int) -> np.ndarray:
    """Draws how long each action takes; idle ticks take none."""
    return np.random.default_rng(seed).random(tables.opcode.shape) * (tables.opcode > 0)


def assert_replays_as_told(made: Compiled, *, transfer: float, seed: int = 0) -> None:
    """Compares when each tick ends on each rank, whether senders wait or not."""
    tables, work = made.tables, work_at_random(made.tables, seed)
    least = replay_dependencies(made.timeline, work, transfer=transfer)
    waits_less = None
    for rendezvous in (False, True):
        ends = replay(tables, work, transfer=transfer, rendezvous=rendezvous)
        told = wait_as_told(tables, work, transfer=transfer, rendezvous=rendezvous)
        # 1e-12: sums of some hundred terms, in the same order but for maxima.
        np.testing.assert_allclose(ends, told, rtol=1e-12)
        # Who waits for less is done sooner, at every tick.
        for sooner in (least, waits_less):
            assert sooner is None or (sooner <= ends + 1e-12 * ends.max()).all()
        waits_less = ends


# ---- by hand


def test_a_sender_waits_for_its_receiver_by_hand() -> None:
    # rank 0  F0 F1 F2 .  .  ...      rank 1's forwards take 4: it comes to the exchange of tick 1
    # rank 1  .  F0 F1 F2 I0 ...      at 1 + 4, to that of tick 2 at 5 + 4
    tables = compiled("gpipe", 2, 3).tables
    work = 1.0 * (tables.opcode != IDLE)
    work[tables.opcode[:, 1] == FORWARD, 1] = 4
    meet = replay(tables, work, transfer=0)
    assert meet[:4].tolist() == [[1, 0], [2, 5], [6, 9], [9, 13]]
    # Else rank 0 goes on, and only rank 1 waits for it.
    alone = replay(tables, work, transfer=0, rendezvous=False)
    assert alone[:4].tolist() == [[1, 0], [2, 5], [3, 9], [3, 13]]


def test_who_is_in_no_pair_waits_for_nobody_by_hand() -> None:
    # 0F1 | 1F0 -> 2F0: in tick 2 of three ranks only rank 1 sends, to rank 2.
    tables = compiled("1f1b", 3, 2).tables
    assert tables.exchanges[0][tables.exchange[2, 0]] == (((1, 2),), ())
    work = np.zeros(tables.opcode.shape)
    work[2, 1] = 5
    assert replay(tables, work, transfer=0)[3].tolist() == [0, 5, 5]
    # With one set of pairs to the right, rank 0 is in a pair with rank 1.
    merged = add_exchanges(tables, most_sets=1)
    assert replay(merged, work, transfer=0)[3].tolist() == [5, 5, 5]


def test_parts_come_one_after_the_other_by_hand() -> None:
    # Ticks 0 and 1: rank 0 sends x of microbatches 0 and 1, in tick 1 rank 1 that of 0 to rank 2.
    tables = compiled("1f1b", 3, 2).tables
    work = np.zeros(tables.opcode.shape)
    for num_parts, expected in ((1, [2, 2, 2]), (2, [2, 3, 3])):
        cut = add_exchanges(tables, num_parts=num_parts)
        ends = replay(cut, work, transfer=1)
        assert ends[1].tolist() == [1, 1, 0]
        # In one part both values are under way from 1 to 2; in two, rank 1 begins to send at 2.
        assert ends[2].tolist() == expected


@pytest.mark.parametrize(("transfer", "excess"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 3)])
def test_transfers_hide_in_the_run_by_hand(transfer: float, excess: float) -> None:
    # An F's value travels behind I and W, an I's behind W and the next F: two ticks. On two
    # ranks odd beats send, and even ones keep the cotangent that the head gave.
    tables = compiled("dualpipe", 2, 8, "aligned").tables
    steady = tables.steady
    assert steady is not None
    ends = replay(tables, 1.0 * (tables.opcode > 0), transfer=transfer)
    first_beat = ends[steady.first_tick + 2]
    assert (first_beat[0] == first_beat).all()
    run_end = first_beat + 3 * (steady.num_beats - 1) + excess * (steady.num_beats // 2 - 1)
    assert ends[steady.ticks.stop - 1].tolist() == run_end.tolist()
    # The value of the last F was on its way for two ticks, the last cotangent for one.
    after = ends[steady.ticks.stop] - ends[steady.ticks.stop - 1]
    assert after.tolist() == [1 + max(0, transfer - 1)] * 2


def test_a_sender_in_the_run_waits_where_its_transfer_starts_by_hand() -> None:
    # Two ranks swap values in odd beats. Rank 1's F of such a beat takes 5 more.
    tables = compiled("dualpipe", 2, 8, "aligned").tables
    steady = tables.steady
    assert steady is not None
    assert steady.x_pairs[1] == ((0, 1), (1, 0))
    work = np.zeros(tables.opcode.shape)
    forward = steady.first_tick + 3
    work[forward, 1] = 5
    # Rank 0 has to send, so it waits before its I; alone it would before the next beat's F.
    meet, alone = (replay(tables, work, transfer=0, rendezvous=m) for m in (True, False))
    assert meet[forward : forward + 4, 0].tolist() == [0, 5, 5, 5]
    assert alone[forward : forward + 4, 0].tolist() == [0, 0, 0, 5]


def test_a_ring_waits_only_where_it_hands_on_by_hand() -> None:
    tables = compile_program(LOOPED).tables
    assert tables.wraps
    # In tick 3 rank 0 reads rank 2's value of tick 2; rank 1 is in no pair with either.
    assert tables.exchanges[0][tables.exchange[2, 0]] == (((2, 0),), ())
    work = np.zeros(tables.opcode.shape)
    work[2] = [1, 2, 4]
    assert replay(tables, work, transfer=0)[2:4].tolist() == [[1, 2, 4], [4, 2, 4]]


def test_beats_of_a_run_are_no_full_backwards() -> None:
    tables = compiled("dualpipe", 4, 16, "aligned", full_backward=True).tables
    assert tables.steady is not None
    work = np.array([0.0, 2, 3, 5])[unit_of(tables.opcode)]
    full = as_full_backwards(tables, work, upper_share=np.full(tables.num_stages, 0.5))
    ticks = tables.steady.ticks
    assert (full[ticks] == work[ticks]).all()
    assert (full[: ticks.start] != work[: ticks.start]).any()


def test_the_gradient_of_an_embedding_comes_last() -> None:
    """In W's tick of the first stage if W runs layers of it, else in I's."""
    program = schedules.make("1f1b", num_ranks=2, num_microbatches=3).program
    for whole_stages, ticks in ((frozenset(), (2, 2 + 2.5)), (frozenset({0, 1}), (4 + 2.5, 0))):
        tables = compile_program(program, full_backward=True, whole_stages=whole_stages).tables
        unit = unit_of(tables.opcode)
        embeds = (unit == INPUT_GRAD) & (tables.stage == 0)
        full = as_full_backwards(
            tables,
            np.array([0, 2, 3, 5.0])[unit] + 2.5 * embeds,
            upper_share=np.full(2, 0.5),
            cost=0.5,
            embed_grad=2.5,
        )
        for acts, expected in zip((INPUT_GRAD, WEIGHT_GRAD), ticks, strict=True):
            of_first = (unit == acts) & (tables.stage == 0)
            assert set(full[of_first]) == {expected}


# ---- against the references


@given(programs(), st.sampled_from(EXCHANGES), durations, st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_random_programs_replay_as_told(
    program: Program, exchanges: tuple[int, int], transfer: float, seed: int
) -> None:
    num_parts, most_sets = exchanges
    made = compile_program(program)
    tables = add_exchanges(made.tables, num_parts=num_parts, most_sets=most_sets)
    assert_replays_as_told(replace(made, tables=tables), transfer=transfer, seed=seed)
    # Exactly: `compile` tries no exchanges of a placement that is too slow without any merging.
    work = work_at_random(tables, seed)
    alone = add_exchanges(made.tables, most_sets=tables.num_ticks)
    ends, ends_alone = (replay(each, work, transfer=transfer) for each in (tables, alone))
    assert (ends_alone <= ends).all()


@given(programs(), durations, st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_random_programs_follow_dependencies(program: Program, transfer: float, seed: int) -> None:
    timeline = compile_program(program).timeline
    cost = np.random.default_rng(seed).random((4, program.num_stages))
    cost[IDLE] = 0
    ends = replay_dependencies(timeline, cost[timeline.opcode, timeline.stage], transfer=transfer)
    assert math.isclose(ends.max(), follow_dependencies(program, cost, transfer), rel_tol=1e-12)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@given(
    num_ranks=st.integers(1, 6),
    num_microbatches=st.integers(1, 24),
    full_backward=st.booleans(),
    exchanges=st.sampled_from(EXCHANGES),
    transfer=durations,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_aligned_tables_replay_as_told(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    full_backward: bool,
    exchanges: tuple[int, int],
    transfer: float,
    seed: int,
) -> None:
    made = compiled(name, num_ranks, num_microbatches, "aligned", full_backward=full_backward)
    num_parts, most_sets = exchanges
    tables = add_exchanges(made.tables, num_parts=num_parts, most_sets=most_sets)
    assert_replays_as_told(replace(made, tables=tables), transfer=transfer, seed=seed)


@pytest.mark.parametrize(("name", "size"), [("dualpipe", (8, 32)), ("dualpipev", (4, 17))])
def test_the_reference_meets_runs(name: str, size: tuple[int, int]) -> None:
    made = compiled(name, *size, "aligned")
    assert made.tables.steady is not None
    for transfer in (0, 0.1, 3):
        assert_replays_as_told(made, transfer=transfer)


@given(
    programs().filter(lambda program: not program.forward_only),
    durations,
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_two_tick_replay_agrees_with_the_reference(
    program: Program, transfer: float, meets: bool, seed: int
) -> None:
    made = compile_program(program, timetable="two-tick")
    tables = made.tables
    work = np.random.default_rng(seed).random(tables.opcode.shape) * (tables.opcode > 0)
    makespan = replay(tables, work, transfer=transfer, rendezvous=meets).max()
    expected = wait_lazily(tables, work, transfer, meets=meets)
    assert math.isclose(makespan, expected, rel_tol=1e-12)
    least = replay_dependencies(made.timeline, work, transfer=transfer).max()
    assert least <= makespan * (1 + 1e-12)


@given(programs(), st.randoms(use_true_random=False), durations, durations)
@settings(max_examples=100, deadline=None)
def test_replays_grow_with_costs(program: Program, random, transfer: float, more: float) -> None:
    made = compile_program(program)
    tables = made.tables
    work = np.array([[random.random() for _ in row] for row in tables.opcode])
    work[tables.opcode == 0] = 0
    longer = work.copy()
    longer[random.randrange(tables.num_ticks), random.randrange(tables.num_ranks)] += more
    replays = partial(replay, tables), partial(replay_dependencies, made.timeline)
    for run_replay, (w, t) in itertools.product(
        replays, ((longer, transfer), (work, transfer + more))
    ):
        before = run_replay(work, transfer=transfer)
        assert (run_replay(w, transfer=t) >= before - 1e-12).all()
