"""The replay: small cases by hand, the timetable's own figures, and slow references."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.ir import FORWARD, INPUT_GRAD, WEIGHT_GRAD, Program, Tables
from dualpipe_jax._schedule.replay import as_full_backwards, replay, replay_dependencies
from dualpipe_jax._simulate import (
    Costs,
    Simulation,
    fastest_timetable,
    prefers_full_backward,
    simulate,
)
from dualpipe_jax.schedules import Schedule
from tests.schedule.test_random_programs import programs
from tests.schedules_under_test import NAMES, WIDE_SIZES

# Twice as many stages as ranks, down and up again: a V, and a ring that wraps.
V_SHAPED = Schedule.from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0", name="v")
LOOPED = Schedule.from_csv(
    "0F0,3F0,3B0,0B0\n1F0,4F0,4B0,1B0\n2F0,5F0,5B0,2B0",
    name="looped",
)


def make(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    """Makes a schedule, or skips the test where there is none of that size."""
    try:
        return schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    except ValueError as error:
        pytest.skip(str(error))


def run(name: str, num_ranks: int, num_microbatches: int, **options) -> Simulation:
    return simulate(make(name, num_ranks, num_microbatches), **options)


def work_of(tables: Tables, cost: np.ndarray) -> np.ndarray:
    return cost[tables.opcode, tables.stage]


def wait_as_told(tables: Tables, work: np.ndarray, transfer: float) -> float:
    """Runs ranks that await what the program's description says, found value by value.

    In the run: what a beat reads, if the run made it. After a permute: that neighbour.
    """
    P, S, num_ticks = tables.num_ranks, tables.num_stages, tables.num_ticks
    columns = [c.tolist() for c in (tables.opcode, tables.stage, tables.microbatch)]
    cells = list(itertools.product(range(num_ticks), range(P)))
    name_of = {(t, r): tuple(c[t][r] for c in columns) for t, r in cells}
    made_at = {name: cell for cell, name in name_of.items()}
    first, stop = (tables.steady.ticks.start, tables.steady.ticks.stop) if tables.steady else (0, 0)

    def producer(tick: int, rank: int) -> tuple[int, int] | None:
        opcode, stage, microbatch = name_of[tick, rank]
        if opcode == FORWARD and stage:
            return made_at[FORWARD, stage - 1, microbatch]
        if opcode == INPUT_GRAD:
            is_last = stage == S - 1
            return made_at[FORWARD if is_last else INPUT_GRAD, stage + (not is_last), microbatch]
        return None

    def awaited(tick: int, rank: int) -> list[tuple[int, int]]:
        if first < tick < stop:
            made = producer(tick, rank)
            return [made] if made and made[0] >= first else []
        if tick == stop > 0:
            later = [producer(t, rank) for t in range(stop, num_ticks)]
            return [made for made in later if made and first <= made[0] < stop]
        found = []
        for column, step in ((tables.from_left, -1), (tables.from_right, 1)):
            if (column[tick] >= 0).any() and (tables.wraps or 0 <= rank + step < P):
                found.append((tick - 1, (rank + step) % P))
        return found

    end: dict[tuple[int, int], float] = {}
    for tick, rank in cells:
        came = [end[cell] + transfer * (cell[1] != rank) for cell in awaited(tick, rank)]
        end[tick, rank] = max([0, end.get((tick - 1, rank), 0), *came]) + float(work[tick, rank])
    return max(end.values())


def follow_dependencies(program: Program, cost: np.ndarray, transfer: float) -> float:
    """Runs each rank's actions as soon as their producers' values are there; knows no tables."""
    rank_of = program.rank_of
    rows = [[a for cell in row for a in cell.unit_actions()] for row in program.rows]
    end: dict[tuple[str, int, int], float] = {}
    position, free = [0] * program.num_ranks, [0.0] * program.num_ranks
    while any(p < len(row) for p, row in zip(position, rows, strict=True)):
        for rank, row in enumerate(rows):
            if position[rank] == len(row):
                continue
            kind, stage, microbatch = row[position[rank]]
            needs = {
                "F": [("F", stage - 1)] if stage else [],
                "I": [("I", stage + 1) if stage < program.num_stages - 1 else ("F", stage)],
                "W": [("I", stage)],
            }[kind]
            keys = [(k, s, microbatch) for k, s in needs]
            if any(key not in end for key in keys):
                continue
            came = [end[key] + transfer * (rank_of[key[1], microbatch] != rank) for key in keys]
            free[rank] = max([free[rank], *came]) + cost["FIW".index(kind) + 1, stage]
            end[kind, stage, microbatch] = free[rank]
            position[rank] += 1
    return max(free)


# ---- by hand


def test_1f1b_by_hand() -> None:
    # rank 0  F0 F1 .  I0 W0 .  I1 W1
    # rank 1  .  F0 I0 W0 F1 I1 W1 .
    assert run("1f1b", 2, 2) == Simulation(
        schedule="1f1b",
        num_ranks=2,
        num_microbatches=2,
        timetable="shortest",
        makespan=8.0,
        dependency_makespan=8.0,
        work=(6.0, 6.0),
        recomputed=0.0,
        idle_share=0.25,
        bubble=2.0,
        published_bubble=3.0,
        peak_activations=2,
        peak_weight_activations=2,
        stage_share=1.0,
        parameter_copies=1.0,
        num_transfers=4,
    )


def test_gpipe_by_hand() -> None:
    # rank 0  F0 F1 .  .  I0 W0 I1 W1      F = 2: rank 1 begins at 2, its I0 at 6, and rank 0's
    # rank 1  .  F0 F1 I0 W0 I1 W1 .       I0 at 7; each later tick of both takes 1
    made = run("gpipe", 2, 2, costs=Costs(forward=2))
    assert (made.makespan, made.dependency_makespan, made.work) == (11.0, 11.0, (8.0, 8.0))
    assert (made.published_bubble, made.peak_activations, made.num_transfers) == (4.0, 2, 4)


def test_false_waits_by_hand() -> None:
    # F = 3, worked out in the docstring of `replay`.
    made = run("zb-h1", 2, 3, costs=Costs(forward=3))
    assert (made.makespan, made.dependency_makespan) == (20.0, 18.0)


def test_transfer_by_hand() -> None:
    # F0 0-1, F1 2-3, I1 3-4, I0 5-6, W0 6-7: nobody waits for W1, which sends nothing.
    made = run("1f1b", 2, 1, transfer=1.0)
    assert (made.makespan, made.dependency_makespan) == (7.0, 7.0)


def test_nobody_waits_where_nothing_is_sent_by_hand() -> None:
    # rank 0  F0 F1 .  I0 W0 .  I1 W1      W = 3: rank 0 does not wait for 1W0, from 3 to 6,
    # rank 1  .  F0 I0 W0 F1 I1 W1 .       before its own W0, from 4 to 7
    made = run("1f1b", 2, 2, costs=Costs(weight_grad=3))
    assert (made.makespan, made.dependency_makespan) == (12.0, 12.0)


@pytest.mark.parametrize(("transfer", "excess"), [(0, 0), (1, 0), (2, 0), (3, 1), (5, 3)])
def test_transfers_hide_in_the_run_by_hand(transfer: float, excess: float) -> None:
    # What F makes travels behind I and W, what I makes behind W and the next F: two ticks. On two
    # ranks odd beats send, and even ones keep what the head's gradient gave.
    tables = make("dualpipe", 2, 8).compiled(timetable="aligned").tables
    steady = tables.steady
    assert steady is not None
    ends = replay(tables, work_of(tables, np.ones((4, 2))), transfer=transfer)
    first_beat = ends[steady.first_tick + 2]
    assert (first_beat[0] == first_beat).all()
    run_end = first_beat + 3 * (steady.num_beats - 1) + excess * (steady.num_beats // 2 - 1)
    assert ends[steady.ticks.stop - 1].tolist() == run_end.tolist()
    # What the last F sent was on its way for two ticks, the last cotangent for one.
    after = ends[steady.ticks.stop] - ends[steady.ticks.stop - 1]
    assert after.tolist() == [1 + max(0, transfer - 1)] * 2


def test_head_and_embedding_by_hand() -> None:
    # Last stage: F = 1 + 1 + (1 + 2) of the head's gradient. First stage: F = 1 + 1, I = 1 + 2.
    made = run("1f1b", 2, 1, costs=Costs(weight_grad=2, embed=1, head=1))
    assert made.work == (2 + 3 + 2, 5 + 1 + 2)
    assert made.makespan == made.dependency_makespan == 2 + 5 + 1 + 3 + 2


def test_uneven_layers_by_hand() -> None:
    # Two layers and one, of two thirds of a rank's share each.
    made = run("1f1b", 2, 1, num_layers=3)
    np.testing.assert_allclose(made.work, [4.0, 2.0], rtol=1e-12)
    np.testing.assert_allclose(made.makespan, (2 + 1 + 1 + 2 + 2) * 2 / 3, rtol=1e-12)
    assert made.published_bubble is None


def test_smaller_stages_by_hand() -> None:
    made = simulate(V_SHAPED)
    # Stages of half a rank's share, one after the other: 0F 1F 2F 3F 3I 2I 2W 1I 0I 0W.
    assert made.makespan == made.dependency_makespan == 10 / 2
    assert made.work == (3.0, 3.0)
    assert (made.stage_share, made.parameter_copies) == (0.5, 1.0)
    assert (made.peak_activations, made.num_transfers) == (2, 4)


def test_forward_only_has_no_gradient_of_the_head() -> None:
    made = simulate(Schedule.from_csv("0F0\n1F0"), costs=Costs(head=3, embed=1))
    assert made.work == (2.0, 4.0)
    assert (made.makespan, made.peak_activations, made.published_bubble) == (6.0, 0, None)


# ---- what the schedules promise


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", WIDE_SIZES[::7])
def test_unit_costs_agree_with_the_timetable(name: str, size: tuple[int, int]) -> None:
    made = run(name, *size)
    schedule = make(name, *size)
    # A tick of F = I = W = 1 lasts as long as a stage.
    num_ticks = schedule.timeline().num_ticks * made.stage_share
    assert max(made.work) - 1e-9 <= made.dependency_makespan <= made.makespan <= num_ticks + 1e-9
    # 1e-12: sums of a few hundred halves or thirds.
    np.testing.assert_allclose(made.work, 3 * size[1], rtol=1e-12)
    np.testing.assert_allclose(made.bubble, made.idle_share * made.makespan, atol=1e-12)


def run_all(costs: Costs, num_layers: int | None = None) -> dict[str, Simulation]:
    """Runs every schedule that there is for 8 ranks and 20 microbatches."""
    made = {}
    for name in NAMES:
        try:
            schedule = schedules.make(name, num_ranks=8, num_microbatches=20)
        except ValueError:
            continue
        made[name] = simulate(schedule, costs=costs, num_layers=num_layers)
    return made


@pytest.mark.parametrize("num_layers", [None, 32, 37])
def test_schedules_share_the_same_work(num_layers: int | None) -> None:
    costs = Costs(forward=1.5, input_grad=2, weight_grad=0.5, embed=0.7, head=0.3)
    total = [sum(made.work) for made in run_all(costs, num_layers).values()]
    layers = 8 * 20 * (1.5 + 2 + 0.5)
    ends = 20 * (0.7 * (1 + 0.5 / 1.5) + 0.3 * (1 + 2.5 / 1.5))
    np.testing.assert_allclose(total, layers + ends, rtol=1e-12)


def test_published_figures() -> None:
    made = run_all(Costs())
    figures = {name: (s.bubble, s.published_bubble) for name, s in made.items()}
    # An input grad leaves before its weight grad here, so that we idle less than published.
    assert figures["gpipe"] == figures["1f1b"] == (14.0, 21.0)
    assert figures["dualpipe"] == (3.0, 6.0)
    assert {name: made[name].parameter_copies for name in ("gpipe", "1f1b", "dualpipe")} == {
        "gpipe": 1.0,
        "1f1b": 1.0,
        "dualpipe": 2.0,
    }
    assert made["dualpipe"].peak_activations == 9
    assert made["1f1b"].peak_activations == 8
    assert made["gpipe"].peak_activations == 20


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("interleaved-1f1b", (8, 24), 7 * 6 / 2),
        ("interleaved-1f1b", (8, 20), None),
        ("zb-h1", (8, 20), 7 * (2 + 4 - 2)),
        ("zb-h1", (8, 6), None),
        ("dualpipe", (8, 20), 3 * (2 + 2 * 4 - 3)),
        ("dualpipe", (7, 20), None),
        ("dualpipe", (8, 14), None),
        ("dualpipev", (4, 20), 3 * (2 + 2 * 4 - 3) / 2),
        ("dualpipev", (4, 7), None),
    ],
)
def test_formula_where_the_paper_has_one(
    name: str, size: tuple[int, int], expected: float | None
) -> None:
    if name not in NAMES:
        pytest.skip(f"{name} is not there yet")
    # F = 2, B = 4, W = 1
    costs = Costs(forward=2, input_grad=3, weight_grad=1)
    assert run(name, *size, costs=costs).published_bubble == expected
    assert run(name, *size, costs=Costs(head=1)).published_bubble is None


def test_chimera_has_a_formula_for_equal_forward_and_backward() -> None:
    if "chimera" not in NAMES:
        pytest.skip("chimera is not there yet")
    equal = Costs(forward=1, input_grad=0.5, weight_grad=0.5)
    assert run("chimera", 8, 8, costs=equal).published_bubble == 6.0
    assert run("chimera", 8, 8).published_bubble is None
    assert run("chimera", 8, 12, costs=equal).published_bubble is None


@pytest.mark.parametrize("size", [(4, 16), (8, 20), (16, 32)])
@pytest.mark.parametrize("timetable", ["shortest", "aligned"])
def test_dualpipe_idles_half_as_long_as_published(size: tuple[int, int], timetable: str) -> None:
    made = run("dualpipe", *size, timetable=timetable)
    assert made.makespan == 3 * size[1] + size[0] // 2 - 1
    assert made.published_bubble == 2 * made.bubble == size[0] - 2


def test_head_imbalance_shows() -> None:
    plain, headed = run("1f1b", 4, 16), run("1f1b", 4, 16, costs=Costs(head=1))
    assert headed.work[:3] == plain.work[:3]
    assert headed.work[3] == plain.work[3] + 16 * 3
    assert headed.makespan >= headed.work[3]
    assert headed.idle_share > plain.idle_share + 0.1


# ---- against the references

costs_strategy = st.floats(0, 8) | st.integers(0, 4).map(float)
all_costs = st.builds(
    Costs,
    forward=st.floats(0.1, 8),
    input_grad=costs_strategy,
    weight_grad=costs_strategy,
    embed=costs_strategy,
    head=costs_strategy,
)


@given(programs(), all_costs, costs_strategy, st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_replays_agree_with_the_references(
    program: Program, costs: Costs, transfer: float, more_layers: int
) -> None:
    tables = compile_program(program).tables
    num_layers = program.num_stages + more_layers
    layers = np.bincount(np.arange(num_layers) % program.num_stages)  # the first get one more
    cost = costs.of_stages(
        num_ranks=program.num_ranks, layers_of_stage=layers, forward_only=program.forward_only
    )
    made = simulate(Schedule(program), costs=costs, transfer=transfer, num_layers=num_layers)
    work = work_of(tables, cost)
    assert math.isclose(made.makespan, wait_as_told(tables, work, transfer), rel_tol=1e-12)
    expected = follow_dependencies(program, cost, transfer)
    assert math.isclose(made.dependency_makespan, expected, rel_tol=1e-12)
    assert made.dependency_makespan <= made.makespan * (1 + 1e-12)
    assert max(made.work) <= made.dependency_makespan * (1 + 1e-12)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@given(
    num_ranks=st.integers(1, 6),
    num_microbatches=st.integers(1, 24),
    transfer=costs_strategy,
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_aligned_replay_agrees_with_the_reference(
    name: str, num_ranks: int, num_microbatches: int, transfer: float, seed: int
) -> None:
    tables = make(name, num_ranks, num_microbatches).compiled(timetable="aligned").tables
    work = np.random.default_rng(seed).random(tables.opcode.shape) * (tables.opcode > 0)
    makespan = replay(tables, work, transfer=transfer).max()
    assert math.isclose(makespan, wait_as_told(tables, work, transfer), rel_tol=1e-12)
    least = replay_dependencies(tables, work, transfer=transfer).max()
    assert least <= makespan * (1 + 1e-12)


@pytest.mark.parametrize(("name", "size"), [("dualpipe", (8, 32)), ("dualpipev", (4, 17))])
def test_the_reference_meets_runs(name: str, size: tuple[int, int]) -> None:
    tables = make(name, *size).compiled(timetable="aligned").tables
    assert tables.steady is not None
    work = np.random.default_rng(0).random(tables.opcode.shape) * (tables.opcode > 0)
    for transfer in (0, 0.1, 3):
        makespan = replay(tables, work, transfer=transfer).max()
        assert math.isclose(makespan, wait_as_told(tables, work, transfer), rel_tol=1e-12)


@pytest.mark.parametrize("timetable", ["shortest", "aligned"])
@pytest.mark.parametrize("name", NAMES)
def test_full_backwards_are_the_same_work_and_waited_for(name: str, timetable: str) -> None:
    options = {"costs": Costs(forward=2, weight_grad=0.5), "timetable": timetable}
    for size in ((1, 2), (2, 8), (3, 12), (4, 16)):
        split = run(name, *size, **options)
        num_stages = make(name, *size).num_stages
        for num_layers in (None, num_stages):  # in halves, and at once
            full = run(name, *size, **options, full_backward=True, num_layers=num_layers)
            assert full.work == pytest.approx(split.work)
            assert full.makespan >= full.dependency_makespan >= split.dependency_makespan


def test_full_backwards_by_hand() -> None:
    # 1I0 and 1W0, then 0I0 and 0W0, where 1W0 ran beside 0I0.
    one = {"costs": Costs(forward=2, input_grad=3, weight_grad=5)}
    assert run("1f1b", 2, 1, **one).makespan == 2 + 2 + 3 + 3 + 5
    for num_layers in (None, 2, 4, 6):
        full = run("1f1b", 2, 1, **one, full_backward=True, num_layers=num_layers)
        assert full.makespan == pytest.approx(2 + 2 + (3 + 5) + (3 + 5))
    # Three layers a stage: an I's tick is that of two, 4, a W's of one, 2.
    options = {"costs": Costs(forward=3, input_grad=3, weight_grad=3), "num_layers": 6}
    # 0F0 | 0F1 1F0 | 1I0 | 1W0 | 0I0 1F1 | 0W0 1I1 | 1W1 | 0I1 | 0W1: of 0W0 and 1I1, 1I1 starts
    # when 1F1 is done, and 1W1 ends when both are.
    full = run("1f1b", 2, 2, **options, full_backward=True)
    assert full.makespan == pytest.approx(3 + 3 + 4 + 2 + (3 + 4 + 2) + 4 + 2)
    assert run("1f1b", 2, 2, **options).makespan == 24


def test_full_backwards_of_a_cost_of_their_own() -> None:
    apart = {"forward": 2, "input_grad": 3, "weight_grad": 5}
    # As above; 4 and not 3 + 5, in two halves of 2.
    costs = Costs(**apart, full_backward=4)
    assert costs.full_backward_share == 0.5
    assert run("1f1b", 2, 1, costs=costs, full_backward=True).makespan == 2 + 2 + 4 + 4
    # Halves apart do not ask for it, nor does a run of beats.
    assert run("1f1b", 2, 1, costs=costs) == run("1f1b", 2, 1, costs=Costs(**apart))
    times = [
        run("dualpipe", 4, 32, costs=each, full_backward=True, timetable="aligned").work
        for each in (costs, Costs(**apart))
    ]
    run_of_beats = (32 - 2 * 4) * (2 + 3 + 5)
    assert run_of_beats < min(times[0]) < min(times[1]) == 32 * (2 + 3 + 5)
    same = Costs(**apart, full_backward=8)
    assert same.full_backward_share == Costs(**apart).full_backward_share == 1
    assert Costs(input_grad=0, weight_grad=0, full_backward=0).full_backward_share == 1
    with pytest.raises(ValueError, match="full_backward=1: must be 0 or left out, as input_grad"):
        Costs(input_grad=0, weight_grad=0, full_backward=1)
    with pytest.raises(ValueError, match="full_backward=-1: a cost must be a finite number"):
        Costs(full_backward=-1)


def test_the_gradient_of_an_embedding_comes_last() -> None:
    """In W's tick of the first stage if that has a half, else in I's; and takes as long as ever."""
    costs = Costs(forward=2, input_grad=3, weight_grad=5, full_backward=4, embed=1)
    assert costs.embed_grad == 2.5
    for num_layers in (None, 2):
        made = run("1f1b", 2, 1, costs=costs, full_backward=True, num_layers=num_layers)
        assert made.makespan == (2 + 1) + 2 + 4 + (4 + 2.5)
    program = make("1f1b", 2, 3).program
    for whole_stages, ticks in ((frozenset(), (2, 2 + 2.5)), (frozenset({0, 1}), (4 + 2.5, 0))):
        tables = compile_program(program, full_backward=True, whole_stages=whole_stages).tables
        embeds = (tables.opcode == INPUT_GRAD) & (tables.stage == 0)
        full = as_full_backwards(
            tables,
            np.array([0, 2, 3, 5.0])[tables.opcode] + 2.5 * embeds,
            last_layers=np.full(2, 0.5),
            cost=0.5,
            embed_grad=2.5,
        )
        for opcode, expected in zip((INPUT_GRAD, WEIGHT_GRAD), ticks, strict=True):
            of_first = (tables.opcode == opcode) & (tables.stage == 0)
            assert set(full[of_first]) == {expected}


def test_one_stage_of_one_layer_is_no_cliff() -> None:
    """Eight stages of two layers, but for the last."""
    costs = Costs(input_grad=2, weight_grad=1)
    split, full = (
        run("1f1b", 8, 32, costs=costs, num_layers=15, full_backward=is_on).makespan
        for is_on in (False, True)
    )
    at_once = run("1f1b", 8, 32, costs=costs, num_layers=8, full_backward=True).makespan
    assert full < split < at_once


@pytest.mark.parametrize("name", ["1f1b", "zb-h1", "interleaved-1f1b"])
def test_halves_even_out_what_input_grads_take(name: str) -> None:
    """Ticks take as long as the longest of their actions."""
    even, uneven = (
        [
            run(name, 4, 16, costs=Costs(input_grad=i, weight_grad=w), full_backward=is_on).makespan
            for is_on in (False, True)
        ]
        for i, w in ((1, 1), (2, 1))
    )
    assert even[0] < even[1] < 1.06 * even[0]
    assert uneven[1] < uneven[0]


def test_beats_of_a_run_are_no_full_backwards() -> None:
    tables = make("dualpipe", 4, 16).compiled(timetable="aligned").tables
    assert tables.steady is not None
    work = np.array([0.0, 2, 3, 5])[tables.opcode]
    full = as_full_backwards(tables, work, last_layers=np.full(tables.num_stages, 0.5))
    ticks = tables.steady.ticks
    assert (full[ticks] == work[ticks]).all()
    assert (full[: ticks.start] != work[: ticks.start]).any()


def test_a_ring_waits_all_round() -> None:
    tables = LOOPED.compiled().tables
    assert tables.wraps
    # In tick 3 rank 0 reads what rank 2 made; rank 1 waits for rank 0, which sends it nothing.
    work = np.zeros(tables.opcode.shape)
    work[2] = [1, 2, 4]
    ends = replay(tables, work, transfer=0)
    assert tables.sends[2].tolist() == [True, False]
    assert ends[2:4].tolist() == [[1, 2, 4], [4, 2, 4]]
    assert ends.max() == wait_as_told(tables, work, 0) == 4


@given(programs(), st.randoms(use_true_random=False), costs_strategy, costs_strategy)
@settings(max_examples=100, deadline=None)
def test_replays_grow_with_costs(program: Program, random, transfer: float, more: float) -> None:
    tables = compile_program(program).tables
    work = np.array([[random.random() for _ in row] for row in tables.opcode])
    work[tables.opcode == 0] = 0
    longer = work.copy()
    longer[random.randrange(tables.num_ticks), random.randrange(tables.num_ranks)] += more
    for run_replay, (w, t) in itertools.product(
        (replay, replay_dependencies), ((longer, transfer), (work, transfer + more))
    ):
        before = run_replay(tables, work, transfer=transfer)
        assert (run_replay(tables, w, transfer=t) >= before - 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
@given(sizes=st.tuples(st.integers(1, 6), st.integers(1, 14)), costs=all_costs, more=costs_strategy)
@settings(max_examples=20, deadline=None)
def test_makespan_grows_with_every_cost(
    name: str, sizes: tuple[int, int], costs: Costs, more: float
) -> None:
    try:
        schedule = schedules.make(name, num_ranks=sizes[0], num_microbatches=sizes[1])
    except ValueError:
        return
    before = simulate(schedule, costs=costs)
    # Not `forward`: embedding and head go by the ratio of its backward to it.
    for field in ("input_grad", "weight_grad", "embed", "head"):
        raised = Costs(**{**vars(costs), field: getattr(costs, field) + more})
        after = simulate(schedule, costs=raised)
        assert after.makespan >= before.makespan * (1 - 1e-12)
        assert after.dependency_makespan >= before.dependency_makespan * (1 - 1e-12)


# ---- which timetable


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("dualpipe", (4, 6), "shortest"),
        ("dualpipe", (4, 8), "aligned"),
        ("dualpipe", (8, 16), "shortest"),  # equally fast: without a run
        ("dualpipe", (8, 32), "aligned"),
        ("dualpipe", (5, 20), "shortest"),  # of odd ranks, a run costs ticks
        ("dualpipe", (5, 40), "aligned"),
        ("dualpipev", (4, 8), "shortest"),
        ("dualpipev", (4, 16), "aligned"),
        ("dualpipe", (1, 1), "shortest"),
        ("1f1b", (4, 64), "shortest"),
        ("chimera", (4, 64), "shortest"),
    ],
)
def test_many_microbatches_are_faster_aligned(
    name: str, size: tuple[int, int], expected: str
) -> None:
    schedule = make(name, *size)
    assert fastest_timetable(schedule) == expected
    assert fastest_timetable(schedule, stash_deferred=False) == expected
    makespans = [
        simulate(schedule, transfer=0.1 * simulate(schedule).stage_share, timetable=t).makespan
        for t in schedules.timetables()
    ]
    # 1e-9: a few hundred sums of tenths.
    is_faster = makespans[1] < makespans[0] * (1 - 1e-9)
    assert is_faster == (expected == "aligned")


@pytest.mark.parametrize(
    ("name", "timetable", "expected"),
    [
        # Without rematerialisation and with it.
        ("gpipe", "shortest", (True, True)),
        ("1f1b", "shortest", (True, True)),
        ("interleaved-1f1b", "shortest", (True, True)),
        ("zb-h1", "shortest", (True, True)),
        ("chimera", "shortest", (False, True)),
        ("dualpipe", "shortest", (True, True)),
        ("dualpipe", "aligned", (False, False)),  # it has a run of beats
        ("dualpipev", "aligned", (False, False)),
    ],
)
def test_full_backwards_where_they_are_faster(
    name: str, timetable: str, expected: tuple[bool, bool]
) -> None:
    schedule = make(name, 4, 16)
    for recomputes, is_full in zip((False, True), expected, strict=True):
        options = {"timetable": timetable, "recomputes": recomputes}
        of_any_size = prefers_full_backward(schedule, **options)
        assert of_any_size == is_full
        num_layers = 2 * schedule.num_stages
        assert prefers_full_backward(schedule, **options, num_layers=num_layers) == is_full
        # Stages of one layer have no halves: all of a backward is in a tick. In GPipe, where all
        # ranks are backward at the same time, nobody waits for that.
        one = {"num_layers": schedule.num_stages, "layers_per_stage": (1,) * schedule.num_stages}
        assert prefers_full_backward(schedule, **options, **one) == (name == "gpipe")


def test_full_backwards_hang_on_sizes_and_stashes() -> None:
    def prefers(name: str, *size: int, **options: object) -> bool:
        return prefers_full_backward(make(name, *size), timetable="shortest", **options)

    uneven, even = (
        prefers("1f1b", 4, 16, recomputes=False, num_layers=8, layers_per_stage=sizes)
        for sizes in ((1, 2, 2, 3), (2, 2, 2, 2))
    )
    assert (uneven, even) == (False, True)
    # What is put off costs as much with full backwards: they matter less where it recomputes.
    keeps, recomputes = (
        prefers("zb-h1", 4, 8, recomputes=True, stash_deferred=stashes) for stashes in (True, False)
    )
    assert (keeps, recomputes) == (True, False)


def test_what_cannot_be_aligned_is_not() -> None:
    # 0I0 awaits 1I0, which needs the 0F1 of its own pair to have come back from rank 1.
    schedule = Schedule.from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1F1,1B0,1B1")
    assert fastest_timetable(schedule) == "shortest"
    assert simulate(schedule) == simulate(schedule, timetable="shortest")
    with pytest.raises(ValueError, match="cannot be aligned"):
        simulate(schedule, timetable="aligned")


@pytest.mark.parametrize(("transfer", "expected"), [(0.0, "shortest"), (0.1, "aligned")])
def test_simulate_takes_the_faster_at_these_costs(transfer: float, expected: str) -> None:
    schedule = make("dualpipe", 8, 64)
    made = simulate(schedule, transfer=transfer)
    assert made.timetable == expected
    assert made == simulate(schedule, transfer=transfer, timetable=expected)
    others = [
        simulate(schedule, transfer=transfer, timetable=each) for each in ("shortest", "aligned")
    ]
    assert made.makespan == min(other.makespan for other in others)


# ---- two ticks between ranks


def wait_lazily(tables: Tables, work: np.ndarray, transfer: float, *, meets: bool) -> float:
    """Runs ranks that send to both neighbours as a tick starts, and await both as it ends."""
    P = tables.num_ranks
    near = [
        [(r + step) % P for step in (-1, 1) if P > 1 and (tables.wraps or 0 <= r + step < P)]
        for r in range(P)
    ]
    free, end = [0.0] * P, [0.0] * P
    for took in work.tolist():
        start = [
            max([free[r], *(free[n] for n in near[r])]) if meets else free[r] for r in range(P)
        ]
        end = [start[r] + took[r] for r in range(P)]
        # As a rendezvous a transfer begins when both have come to it.
        begun = [[max(free[n], free[r]) if meets else free[n] for n in near[r]] for r in range(P)]
        free = [max([end[r], *(b + transfer for b in begun[r])]) for r in range(P)]
    return max(end)


@given(
    programs().filter(lambda program: not program.forward_only),
    costs_strategy,
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_two_tick_replay_agrees_with_the_reference(
    program: Program, transfer: float, meets: bool, seed: int
) -> None:
    tables = compile_program(program, timetable="two-tick").tables
    work = np.random.default_rng(seed).random(tables.opcode.shape) * (tables.opcode > 0)
    makespan = replay(tables, work, transfer=transfer, rendezvous=meets).max()
    expected = wait_lazily(tables, work, transfer, meets=meets)
    assert math.isclose(makespan, expected, rel_tol=1e-12)
    least = replay_dependencies(tables, work, transfer=transfer).max()
    assert least <= makespan * (1 + 1e-12)


@pytest.mark.parametrize("full_backward", [False, True])
@pytest.mark.parametrize(
    ("costs", "most", "late"),
    [
        (Costs(input_grad=1.14, weight_grad=0.857), 1.05, 1.05),
        # As under rematerialisation: of neighbours never more than a tick apart those wait longest
        # whose input grads and forwards alternate.
        (Costs(input_grad=2.08, weight_grad=0.923), 1.05, 1.11),
    ],
)
def test_two_ticks_take_hardly_more_than_the_order_needs(
    costs: Costs, most: float, late: float, full_backward: bool
) -> None:
    options = {"timetable": "two-tick", "costs": costs, "transfer": 0.1}
    options |= {"full_backward": full_backward}
    for name in NAMES:
        made = run(name, 8, 32, **options, rendezvous=False)
        limit = late if name in ("1f1b", "zb-h1") else most
        assert made.makespan <= limit * made.dependency_makespan, name
        # On TPUs, which refuse it.
        assert run(name, 8, 32, **options).makespan > made.makespan


def test_two_ticks_hide_longer_transfers() -> None:
    for name in NAMES:
        options = {"transfer": 0.5, "rendezvous": False}
        shortest, two_tick = (
            run(name, 8, 32, timetable=each, **options) for each in ("shortest", "two-tick")
        )
        assert two_tick.dependency_makespan == pytest.approx(shortest.dependency_makespan)
        assert two_tick.makespan <= 1.03 * two_tick.dependency_makespan
        assert two_tick.makespan <= shortest.makespan * (1 + 1e-12)


def test_two_ticks_are_never_taken_by_themselves() -> None:
    for name in NAMES:
        schedule = make(name, 8, 32)
        for rendezvous in (True, False):
            made = simulate(schedule, transfer=0.5, rendezvous=rendezvous)
            assert made.timetable != "two-tick"
        assert fastest_timetable(schedule, costs=Costs()) != "two-tick"


# ---- mistakes


def test_wrong_costs_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"forward=-1, head=nan: a cost must be a finite number"):
        Costs(forward=-1, head=math.nan)
    with pytest.raises(ValueError, match="forward=0: a forward must cost more than 0"):
        Costs(forward=0)


@pytest.mark.parametrize("transfer", [-1.0, math.inf, math.nan])
def test_wrong_transfer_is_refused(transfer: float) -> None:
    with pytest.raises(ValueError, match=f"transfer={transfer}: a cost must be a finite number"):
        simulate(V_SHAPED, transfer=transfer)


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_layers=3: must be at least the 4 stages of .*'v'"):
        simulate(V_SHAPED, num_layers=3)


def test_unknown_timetable_is_refused() -> None:
    with pytest.raises(ValueError, match="timetable='longest': must be one of"):
        simulate(V_SHAPED, timetable="longest")
