"""Simulations: small cases by hand, published figures, slow references, how long ranks wait."""

import math
import re
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe_jax import schedules
from dualpipe_jax._predict import Costs, Simulation, StageLayers, decide, simulate, usual_costs
from dualpipe_jax._predict.simulation import durations_of
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.ir import Program
from dualpipe_jax.schedules import Schedule
from tests.replay_references import follow_dependencies, wait_as_told
from tests.schedule.random_programs import programs
from tests.schedules_under_test import NAMES, WIDE_SIZES

# Twice as many stages as ranks, down and up again.
V_SHAPED = Schedule.from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0", name="v")

SPLIT, FULL = (Execution(split_backward=is_split) for is_split in (True, False))


def make(name: str, num_ranks: int, num_microbatches: int) -> Schedule:
    return schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)


def run(name: str, num_ranks: int, num_microbatches: int, **options) -> Simulation:
    return simulate(make(name, num_ranks, num_microbatches), **options)


# ---- by hand


def test_1f1b_by_hand() -> None:
    # rank 0  F0 F1 .  I0 W0 .  I1 W1
    # rank 1  .  F0 I0 W0 F1 I1 W1 .
    assert run("1f1b", 2, 2) == Simulation(
        schedule="1f1b",
        num_ranks=2,
        num_microbatches=2,
        execution=Execution(overlap=False, split_backward=True, deferred="store"),
        rendezvous=True,
        makespan=8.0,
        dependency_makespan=8.0,
        work=(6.0, 6.0),
        recomputed=0.0,
        copied=0.0,
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
    # F = 3. When each action ends, those in a column being in one tick:
    # rank 0  F0 3  F1 6  .     I0 8   W0 9  F2 12  I1 13  W1 14  I2 17  W2 18
    # rank 1  .     F0 6  I0 7  F1 10  I1 11 W1 12  F2 15  I2 16  W2 17  W0 18
    # Rank 1 keeps the value of 1I1, made at 11, and sends it at 12, when both ranks have ended an
    # action: nobody waits for a value that it does not read next.
    made = run("zb-h1", 2, 3, costs=Costs(forward=3))
    assert (made.makespan, made.dependency_makespan) == (18.0, 18.0)
    # With each action as early as it can be, rank 0 has the value of 1I1 to wait for before 0F2,
    # not after: from 9 to 11. 0F2 ends at 14, I1 15, W1 16; 1F2 at 17, I2 18; and 0I2 19, 0W2 20.
    placed_as_if_equal = run("zb-h1", 2, 3, costs=Costs(forward=3), placed_by=Costs())
    assert (placed_as_if_equal.makespan, placed_as_if_equal.dependency_makespan) == (20.0, 18.0)


def test_transfer_by_hand() -> None:
    # F0 0-1, F1 2-3, I1 3-4, I0 5-6, W0 6-7: nobody waits for W1, which sends nothing.
    made = run("1f1b", 2, 1, transfer=1.0)
    assert (made.makespan, made.dependency_makespan) == (7.0, 7.0)


def test_nobody_waits_where_nothing_is_sent_by_hand() -> None:
    # rank 0  F0 F1 .  I0 W0 .  I1 W1      W = 3: rank 0 does not wait for 1W0, from 3 to 6,
    # rank 1  .  F0 I0 W0 F1 I1 W1 .       before its own W0, from 4 to 7
    made = run("1f1b", 2, 2, costs=Costs(weight_grad=3))
    assert (made.makespan, made.dependency_makespan) == (12.0, 12.0)


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


# ---- the promises of the schedules


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
    """Runs every schedule with 8 ranks and 20 microbatches."""
    return {name: run(name, 8, 20, costs=costs, num_layers=num_layers) for name in NAMES}


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
    # F = 2, B = 4, W = 1
    costs = Costs(forward=2, input_grad=3, weight_grad=1)
    assert run(name, *size, costs=costs).published_bubble == expected
    assert run(name, *size, costs=Costs(head=1)).published_bubble is None


def test_chimera_has_a_formula_for_equal_forward_and_backward() -> None:
    equal = Costs(forward=1, input_grad=0.5, weight_grad=0.5)
    assert run("chimera", 8, 8, costs=equal).published_bubble == 6.0
    assert run("chimera", 8, 8).published_bubble is None
    assert run("chimera", 8, 12, costs=equal).published_bubble is None


@pytest.mark.parametrize("size", [(4, 16), (8, 20), (16, 32)])
@pytest.mark.parametrize("overlap", [False, True])
def test_dualpipe_idles_half_as_long_as_published(size: tuple[int, int], overlap: bool) -> None:
    made = run("dualpipe", *size, execution=replace(SPLIT, overlap=overlap))
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


@given(programs(), all_costs, costs_strategy, st.integers(0, 7), st.booleans())
@settings(max_examples=100, deadline=None)
def test_agrees_with_the_references(
    program: Program, costs: Costs, transfer: float, more_layers: int, rendezvous: bool
) -> None:
    num_layers = program.num_stages + more_layers
    layers = np.bincount(np.arange(num_layers) % program.num_stages)  # the first get one more
    options = {"transfer": transfer, "rendezvous": rendezvous}
    schedule = Schedule(program)
    made = simulate(schedule, costs=costs, num_layers=num_layers, **options)
    cut = StageLayers.cut(layers.tolist())
    durations = durations_of(schedule, costs, layers=cut, transfer=transfer)
    tables = compile_program(program, durations=durations).tables
    cost = costs.of_stages(layers, num_ranks=program.num_ranks, forward_only=program.forward_only)
    told = wait_as_told(tables, cost[tables.opcode, tables.stage], **options)
    assert math.isclose(made.makespan, told.max(), rel_tol=1e-12)
    expected = follow_dependencies(program, cost, transfer)
    assert math.isclose(made.dependency_makespan, expected, rel_tol=1e-12)
    assert made.dependency_makespan <= made.makespan * (1 + 1e-12)
    assert max(made.work) <= made.dependency_makespan * (1 + 1e-12)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_full_backwards_are_the_same_work_and_waited_for(name: str, overlap: bool) -> None:
    costs = Costs(forward=2, weight_grad=0.5)
    apart, as_one = (replace(each, overlap=overlap) for each in (SPLIT, FULL))
    for size in ((1, 2), (2, 8), (3, 12), (4, 16)):
        split = run(name, *size, costs=costs, execution=apart)
        num_stages = make(name, *size).num_stages
        for num_layers in (None, num_stages):  # in two ticks, and in one
            full = run(name, *size, costs=costs, execution=as_one, num_layers=num_layers)
            assert full.work == pytest.approx(split.work)
            assert full.makespan >= full.dependency_makespan >= split.dependency_makespan


def test_full_backwards_by_hand() -> None:
    # 1I0 and 1W0, then 0I0 and 0W0, where 1W0 ran beside 0I0.
    one = {"costs": Costs(forward=2, input_grad=3, weight_grad=5)}
    assert run("1f1b", 2, 1, **one).makespan == 2 + 2 + 3 + 3 + 5
    for num_layers in (None, 2, 4, 6):
        full = run("1f1b", 2, 1, **one, execution=FULL, num_layers=num_layers)
        assert full.makespan == pytest.approx(2 + 2 + (3 + 5) + (3 + 5))
    # Three layers a stage: an I's tick is that of two, 4, a W's of one, 2.
    options = {"costs": Costs(forward=3, input_grad=3, weight_grad=3), "num_layers": 6}
    # 0F0 | 0F1 1F0 | 1I0 | 1W0 | 0I0 1F1 | 0W0 1I1 | 1W1 | 0I1 | 0W1: of 0W0 and 1I1, 1I1 starts
    # when 1F1 is done, and 1W1 ends when both are.
    full = run("1f1b", 2, 2, **options, execution=FULL)
    assert full.makespan == pytest.approx(3 + 3 + 4 + 2 + (3 + 4 + 2) + 4 + 2)
    assert run("1f1b", 2, 2, **options).makespan == 24


def test_full_backwards_of_a_cost_of_their_own() -> None:
    apart = {"forward": 2, "input_grad": 3, "weight_grad": 5}
    # As above; 4 and not 3 + 5, in two halves of 2.
    costs = Costs(**apart, full_backward=4)
    assert costs.full_backward_share == 0.5
    assert run("1f1b", 2, 1, costs=costs, execution=FULL).makespan == 2 + 2 + 4 + 4
    # Split backwards do not ask for it, nor does a steady phase.
    assert run("1f1b", 2, 1, costs=costs) == run("1f1b", 2, 1, costs=Costs(**apart))
    times = [
        run("dualpipe", 4, 32, costs=each, execution=replace(FULL, overlap=True)).work
        for each in (costs, Costs(**apart))
    ]
    steady_phase = (32 - 2 * 4) * (2 + 3 + 5)
    assert steady_phase < min(times[0]) < min(times[1]) == 32 * (2 + 3 + 5)
    same = Costs(**apart, full_backward=8)
    assert same.full_backward_share == Costs(**apart).full_backward_share == 1
    assert Costs(input_grad=0, weight_grad=0, full_backward=0).full_backward_share == 1
    with pytest.raises(ValueError, match="full_backward=1: must be 0 or left out, as input_grad"):
        Costs(input_grad=0, weight_grad=0, full_backward=1)
    with pytest.raises(ValueError, match="full_backward=-1: a cost must be a finite number"):
        Costs(full_backward=-1)


def test_the_gradient_of_an_embedding_comes_last() -> None:
    """In W's tick of the first stage if W runs layers of it, else in I's; and takes as long."""
    costs = Costs(forward=2, input_grad=3, weight_grad=5, full_backward=4, embed=1)
    assert costs.embed_grad == 2.5
    for num_layers in (None, 2):
        made = run("1f1b", 2, 1, costs=costs, execution=FULL, num_layers=num_layers)
        assert made.makespan == (2 + 1) + 2 + 4 + (4 + 2.5)


def test_one_stage_of_one_layer_is_no_cliff() -> None:
    """Eight stages of two layers, but for the last, are no slower than eight of two."""
    costs = Costs(input_grad=2, weight_grad=1)
    uneven, even = (
        run("1f1b", 8, 32, costs=costs, num_layers=num_layers, execution=FULL).makespan
        for num_layers in (15, 16)
    )
    # All of a rank's share is one, so that a layer takes more of it if there are fewer.
    assert uneven * 15 <= even * 16 * (1 + 1e-12)


@pytest.mark.parametrize(("input_grad", "weight_grad"), [(1, 1), (2, 1)])
@pytest.mark.parametrize("full_backward", [False, True])
def test_without_transfers_bubbles_are_those_by_hand(
    input_grad: float, weight_grad: float, full_backward: bool
) -> None:
    """Filling and draining the pipeline, three ranks from end to end, and no other waits.

    A cotangent reaches the next rank after an input grad, or after a full backward; ZB-H1 has a
    weight grad for each of the gaps; stages are half as large where a rank has two.
    """
    comes_after = input_grad + weight_grad * full_backward
    expected = {
        "gpipe": 3 * (1 + comes_after),
        "1f1b": 3 * (1 + comes_after),
        "zb-h1": 3 * (1 + comes_after - weight_grad),
        "interleaved-1f1b": 3 * (1 + comes_after) / 2,
    }
    costs = Costs(input_grad=input_grad, weight_grad=weight_grad)
    for name, bubble in expected.items():
        made = run(name, 4, 16, costs=costs, execution=FULL if full_backward else SPLIT)
        assert made.bubble == pytest.approx(bubble), name


# The costs of a transformer, beside its forward: without rematerialisation, and with it.
TRANSFORMERS = (
    Costs(forward=1, input_grad=1.14, weight_grad=0.857),
    Costs(forward=1, input_grad=2.08, weight_grad=0.923),
)


@pytest.mark.parametrize(
    ("name", "split", "full"),
    [
        ("gpipe", 1.09, 1.053),
        ("1f1b", 1.06, 1.05),
        ("interleaved-1f1b", 1.20, 1.20),
        ("zb-h1", 1.101, 1.05),
        ("chimera", 1.05, 1.05),
        ("dualpipe", 1.06, 1.06),
        ("dualpipev", 1.09, 1.09),
    ],
)
def test_ranks_hardly_wait_for_nothing(name: str, split: float, full: float) -> None:
    """Placed by the clock, a step takes little more than if ranks waited for values alone."""
    for execution, bar in ((SPLIT, split), (FULL, full)):
        for size in ((4, 16), (8, 32)):
            for costs in TRANSFORMERS:
                made = run(name, *size, costs=costs, transfer=0.1, execution=execution)
                assert made.makespan <= bar * made.dependency_makespan, (size, costs)


def test_placed_by_costs_is_with_the_transfer_of_a_step() -> None:
    """A tenth of the forward, whatever that is; the program's own transfers may take longer."""
    schedule = make("gpipe", 4, 6)
    tenth = durations_of(schedule, Costs(), transfer=0.1)
    tables = compile_program(schedule.program, durations=tenth).tables
    told = wait_as_told(tables, 1.0 * (tables.opcode > 0), transfer=1).max()
    for factor in (1, 10):
        placed_by = _times(factor, Costs())
        assert simulate(schedule, transfer=1, placed_by=placed_by).makespan == told
    assert simulate(schedule, transfer=1).makespan < told


def test_placement_knows_no_platform() -> None:
    """Where senders do not wait, the same program runs."""
    schedule = make("dualpipev", 3, 6)
    costs = Costs(forward=6, input_grad=2, weight_grad=2)
    options = {"execution": replace(SPLIT, overlap=False)}
    durations = durations_of(schedule, costs, transfer=1)
    tables = compile_program(schedule.program, durations=durations).tables
    work = np.array([0.0, 3, 1, 1])[tables.opcode]
    made = [
        simulate(schedule, costs=costs, transfer=1, rendezvous=rendezvous, **options).makespan
        for rendezvous in (False, True)
    ]
    told = [
        wait_as_told(tables, work, transfer=1, rendezvous=rendezvous).max()
        for rendezvous in (False, True)
    ]
    assert made == told
    assert made[0] < made[1]


@pytest.mark.parametrize("name", NAMES)
def test_placed_by_the_costs_of_the_program_is_as_without(name: str) -> None:
    options = {"costs": TRANSFORMERS[1], "transfer": 0.1}
    plain = run(name, 4, 16, **options)
    assert run(name, 4, 16, **options, placed_by=TRANSFORMERS[1]) == plain
    # By others it is placed worse, or by chance as well; its work is the same.
    other = run(name, 4, 16, **options, placed_by=Costs(input_grad=0.3, weight_grad=3))
    assert other.makespan >= plain.makespan * (1 - 1e-12)
    if other.execution == plain.execution:
        assert other.work == plain.work
        assert math.isclose(other.dependency_makespan, plain.dependency_makespan, rel_tol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(sizes=st.tuples(st.integers(1, 6), st.integers(1, 14)), costs=all_costs, more=costs_strategy)
@settings(max_examples=20, deadline=None)
def test_makespan_grows_with_every_cost(
    name: str, sizes: tuple[int, int], costs: Costs, more: float
) -> None:
    schedule = make(name, *sizes)
    before = simulate(schedule, costs=costs, placed_by=costs)
    # Not `forward`: embedding and head go by the ratio of its backward to it.
    for field in ("input_grad", "weight_grad", "embed", "head"):
        raised = Costs(**{**vars(costs), field: getattr(costs, field) + more})
        # Placed as before: by other costs it may happen to be placed better.
        after = simulate(schedule, costs=raised, placed_by=costs)
        assert after.makespan >= before.makespan * (1 - 1e-12)
        assert after.dependency_makespan >= before.dependency_makespan * (1 - 1e-12)


# ---- decided


def decided(
    schedule: Schedule,
    costs: Costs,
    *,
    layers: tuple[int, ...] | None = None,
    overlap: bool | None = None,
    deferred: Any = None,
    split_backward: bool | None = None,
) -> Execution:
    """Decides at a transfer of a tenth of a forward, as steps do."""
    return decide(
        schedule,
        Execution(overlap=overlap, deferred=deferred, split_backward=split_backward),
        costs=costs,
        transfer=0.1 * costs.forward,
        layers=None if layers is None else StageLayers.cut(layers),
        recomputes=costs.recompute > 0,
    )


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("dualpipe", (4, 6), False),
        ("dualpipe", (4, 8), True),
        ("dualpipe", (8, 16), False),  # equally fast: without a steady phase
        ("dualpipe", (8, 32), True),
        ("dualpipe", (5, 10), False),
        ("dualpipe", (5, 20), True),
        ("dualpipe", (5, 40), True),
        ("dualpipev", (4, 8), False),
        ("dualpipev", (4, 16), True),
        ("dualpipe", (1, 1), False),
        ("1f1b", (4, 64), False),
        ("chimera", (4, 64), False),
    ],
)
def test_many_microbatches_are_faster_aligned(
    name: str, size: tuple[int, int], expected: bool
) -> None:
    schedule = make(name, *size)
    # At these costs, and at ten times as much of all.
    plain = usual_costs(recomputes=False)
    assert decided(schedule, plain).overlap == expected
    assert decided(schedule, _times(10, plain)).overlap == expected
    makespans = [
        simulate(
            schedule, costs=plain, transfer=0.1, execution=replace(SPLIT, overlap=overlap)
        ).makespan
        for overlap in (False, True)
    ]
    # 1e-9: a few hundred sums of tenths.
    is_faster = makespans[1] < makespans[0] * (1 - 1e-9)
    assert is_faster == expected


def _times(factor: float, costs: Costs) -> Costs:
    return Costs.of(value and value * factor for value in costs.numbers)


def test_overlap_hangs_on_costs_and_layers() -> None:
    schedule = make("dualpipe", 4, 11)
    plain, remat = (usual_costs(recomputes=recomputes) for recomputes in (False, True))
    assert [decided(schedule, costs).overlap for costs in (plain, remat)] == [False, True]
    assert decided(schedule, remat, layers=(1, 1, 2, 2)).overlap is False
    assert decided(schedule, _times(0.05, remat)).overlap is True
    for factor in (1, 10):
        assert decided(make("chimera", 4, 16), _times(factor, remat)).split_backward


def test_given_options_are_unchanged() -> None:
    schedule, costs = make("dualpipe", 4, 16), usual_costs(recomputes=True)
    for overlap in (False, True):
        for is_split in (False, True):
            given: dict[str, Any] = {
                "overlap": overlap,
                "split_backward": is_split,
                "deferred": "store",
            }
            assert decided(schedule, costs, **given) == Execution(**given)
    # But there is nothing to recompute, and no steady phase.
    assert decided(schedule, replace(costs, recompute=0), deferred="recompute").deferred == "store"
    assert decided(schedule, costs).deferred == "recompute"
    assert decided(make("dualpipe", 4, 4), costs, overlap=True).overlap is False


@pytest.mark.parametrize(
    ("name", "overlap", "expected"),
    [
        # Without rematerialisation and with it.
        ("gpipe", False, (True, True)),
        ("1f1b", False, (True, True)),
        ("interleaved-1f1b", False, (True, True)),
        ("zb-h1", False, (True, True)),
        ("chimera", False, (False, False)),
        ("dualpipe", False, (True, True)),
        ("dualpipe", True, (False, False)),  # it has a steady phase
        ("dualpipev", True, (False, False)),
    ],
)
def test_full_backwards_where_they_are_faster(
    name: str, overlap: bool, expected: tuple[bool, bool]
) -> None:
    schedule = make(name, 4, 16)
    for recomputes, is_full in zip((False, True), expected, strict=True):
        costs = usual_costs(recomputes=recomputes)
        found = [
            decided(schedule, costs, layers=layers, overlap=overlap).split_backward
            for layers in (None, (2,) * schedule.num_stages, (1,) * schedule.num_stages)
        ]
        # Stages of one layer are not divided: all of a backward is in one tick.
        of_one = recomputes if name == "chimera" else is_full
        assert found == [not is_full, not is_full, not of_one]


def test_full_backwards_hang_on_sizes_and_stashes() -> None:
    # The longest stage, which has something to do at all times, gains a tenth of its backwards.
    plain, remat = (usual_costs(recomputes=recomputes) for recomputes in (False, True))
    found = [
        decided(make("chimera", 4, 16), plain, layers=sizes).split_backward
        for sizes in ((1, 1, 1, 5), (2, 2, 2, 2))
    ]
    assert found == [False, True]
    # Deferred weight grads that recompute fill the gaps that full backwards make.
    found = [
        decided(make("zb-h1", 4, 5), remat, deferred=deferred).split_backward
        for deferred in ("store", "recompute")
    ]
    assert found == [True, False]


def test_full_backwards_as_fast_are_not_preferred() -> None:
    """Equal sums in different orders differ in their last bits."""
    schedule, costs = make("chimera", 2, 4), Costs()
    split, full = (
        simulate(schedule, costs=costs, transfer=0.1, execution=each).makespan
        for each in (SPLIT, FULL)
    )
    assert math.isclose(split, full, rel_tol=1e-12)
    assert decided(schedule, costs).split_backward


def test_an_order_that_cannot_be_aligned_is_not_aligned() -> None:
    # 0I0 awaits 1I0, which needs the 0F1 of its own pair to have come back from rank 1.
    schedule = Schedule.from_csv("0F0,(0F1;0B0)OVERLAP_F_B,0B1\n1F0,1F1,1B0,1B1")
    assert decided(schedule, Costs()).overlap is False
    assert simulate(schedule) == simulate(schedule, execution=replace(SPLIT, overlap=False))
    with pytest.raises(ValueError, match="cannot be aligned"):
        simulate(schedule, execution=replace(SPLIT, overlap=True))


@pytest.mark.parametrize(("transfer", "expected"), [(0.0, False), (0.1, True)])
def test_simulate_takes_the_faster_at_these_costs(transfer: float, expected: bool) -> None:
    schedule = make("dualpipe", 8, 64)
    made = simulate(schedule, transfer=transfer)
    assert made.execution.overlap == expected
    others = [
        simulate(schedule, transfer=transfer, execution=replace(SPLIT, overlap=each))
        for each in (False, True)
    ]
    assert made == others[expected]
    assert made.makespan == min(other.makespan for other in others)
    # All of it decided, full backwards too.
    of_all = [
        simulate(schedule, transfer=transfer, execution=replace(each, overlap=overlap)).makespan
        for each, overlap in ((SPLIT, expected), (FULL, False))
    ]
    assert simulate(schedule, transfer=transfer, execution=Execution()).makespan in of_all


# ---- two ticks between ranks


@pytest.mark.parametrize("full_backward", [False, True])
@pytest.mark.parametrize(
    ("costs", "most", "late"),
    [
        (Costs(input_grad=1.14, weight_grad=0.857), 1.06, 1.06),
        # As under rematerialisation: among neighbours never more than a tick from each other those
        # wait longest whose input grads and forwards alternate.
        (Costs(input_grad=2.08, weight_grad=0.923), 1.06, 1.11),
    ],
)
def test_two_ticks_take_hardly_more_than_the_order_needs(
    costs: Costs, most: float, late: float, full_backward: bool
) -> None:
    execution = Execution(overlap="two-tick", split_backward=not full_backward)
    options = {"execution": execution, "costs": costs, "transfer": 0.1}
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
            run(name, 8, 32, execution=replace(SPLIT, overlap=each), **options)
            for each in (False, "two-tick")
        )
        assert two_tick.dependency_makespan == pytest.approx(shortest.dependency_makespan)
        assert two_tick.makespan <= 1.03 * two_tick.dependency_makespan
        assert two_tick.makespan <= shortest.makespan * (1 + 1e-12)


def test_two_ticks_are_never_taken_by_themselves() -> None:
    for name in NAMES:
        schedule = make(name, 8, 32)
        for rendezvous in (True, False):
            made = simulate(schedule, transfer=0.5, rendezvous=rendezvous)
            assert made.execution.overlap != "two-tick"
        assert decided(schedule, Costs()).overlap != "two-tick"


# ---- mistakes


def test_wrong_costs_are_all_named() -> None:
    with pytest.raises(ValueError, match=r"forward=-1, head=nan: a cost must be a finite number"):
        Costs(forward=-1, head=math.nan)
    with pytest.raises(ValueError, match="forward=0: a forward must cost more than 0"):
        Costs(forward=0)


def test_numbers_may_be_arrays_of_one() -> None:
    plain = simulate(V_SHAPED, costs=Costs(forward=2), transfer=0.5)
    two, half = np.array(2.0), Decimal("0.5")
    assert simulate(V_SHAPED, costs=Costs(forward=two), transfer=half) == plain  # pyrefly: ignore
    with pytest.raises(ValueError, match=r"embed=1e\+90, head=0.0: their gradients"):
        Costs(forward=1e-90, weight_grad=1e90, embed=1e90)


def test_a_step_of_any_costs_takes_finite_time() -> None:
    """Costs so large, or so small, that a makespan would be inf or 0 are refused."""
    largest = Costs(forward=1e100, input_grad=1e100, weight_grad=1e100, full_backward=1e100)
    for costs in (largest, Costs(forward=1e-100, input_grad=0, weight_grad=0)):
        for execution in (Execution(), FULL):
            made = simulate(V_SHAPED, costs=costs, transfer=costs.forward, execution=execution)
            assert 0 < made.makespan < math.inf
    several: tuple[dict[str, Any], ...] = (
        {"forward": 1e101},
        {"forward": 1e-101},
        {"input_grad": 0.0, "weight_grad": 1e-50, "full_backward": 1e60},
    )
    for wrong in several:
        with pytest.raises(ValueError, match=f"{list(wrong)[-1]}=.* at (most|least) 1e"):
            Costs(**wrong)


@pytest.mark.parametrize("transfer", [-1.0, math.inf, math.nan, 1e308])
def test_wrong_transfer_is_refused(transfer: float) -> None:
    message = re.escape(f"transfer={transfer}: a cost must be a finite number")
    with pytest.raises(ValueError, match=message):
        simulate(V_SHAPED, transfer=transfer)


def test_too_few_or_too_many_layers_are_refused() -> None:
    few = r"num_layers=3: must be at least the 4 stages of .*'v'.*layers_per_stage"
    with pytest.raises(ValueError, match=few):
        simulate(V_SHAPED, num_layers=3)
    assert simulate(V_SHAPED, num_layers=3, layers_per_stage=(1, 0, 2, 0)).makespan > 0
    with pytest.raises(ValueError, match=r"num_layers=1.*at most 1,000,000,000,000"):
        simulate(V_SHAPED, num_layers=10**26)
    with pytest.raises(ValueError, match=r"at most 1,000,000,000,000"):
        simulate(V_SHAPED, layers_per_stage=(1, 1, 1, 10**26))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "1f1b"}, r"schedule='1f1b': must be a .*schedules.make\('1f1b', num_ranks="),
        ({"costs": {"forward": 1}}, "costs=.*: must be a dualpipe_jax.Costs, or None"),
        ({"placed_by": 3}, "placed_by=3: must be a dualpipe_jax.Costs, or None"),
        ({"transfer": "1"}, "transfer='1': must be a number"),
        ({"transfer": np.ones(2)}, "transfer=array.*: must be a number"),
        ({"num_layers": 2.5}, "num_layers=2.5: must be an integer, or None"),
        ({"num_layers": True}, "num_layers=True: must be an integer, or None"),
        ({"execution": "full"}, "execution='full': must be a dualpipe_jax.Execution"),
    ],
)
def test_wrong_types_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"schedule": make("1f1b", 2, 2), **change}
    with pytest.raises(TypeError, match=message):
        simulate(**arguments)


def test_costs_are_numbers_of_some_size() -> None:
    for value in ("1", None, [1.0]):
        with pytest.raises(TypeError, match=r"forward=.*: must be a number"):
            Costs(forward=value)  # pyrefly: ignore
    with pytest.raises(ValueError, match="input_grad: must be finite"):
        Costs(input_grad=10**400)


def test_copies_to_the_host_hide_behind_one_action_in_a_tick() -> None:
    schedule = schedules.make("1f1b", num_ranks=4, num_microbatches=16)

    def makespan(slots: int | str | None, **costs: Any) -> float:
        execution = Execution(overlap=False, split_backward=True, slots_on_device=slots)
        return simulate(schedule, costs=Costs(**costs), execution=execution).makespan

    # Half of an activation, as two of four slots stay.
    assert makespan(2, spill=2, fill=2) == makespan(None)
    assert makespan(4, spill=99, fill=99) == makespan(None)
    assert makespan(2, spill=3, fill=2) == makespan(None, forward=1.5)
    assert makespan(2, spill=2, fill=4) == makespan(None, input_grad=2, weight_grad=2)
    assert makespan("8B", spill=3, activation_bytes=4) == makespan(2, spill=3)


def test_copies_to_the_host_hide_behind_three_actions_in_a_beat() -> None:
    schedule = schedules.make("dualpipe", num_ranks=4, num_microbatches=16)
    tables = schedule.compiled(overlap=True).tables
    assert tables.steady is not None

    def beats(**costs: Any) -> np.ndarray:
        durations = durations_of(schedule, Costs(**costs), transfer=0, slots_on_device=2)
        return durations.work(tables)[tables.steady.ticks].reshape(-1, 3, 4).sum(axis=1)

    # Two of five slots stay.
    np.testing.assert_allclose(beats(spill=4, fill=5), 3)
    np.testing.assert_allclose(beats(spill=4, fill=10), 6)
    np.testing.assert_allclose(beats(spill=12, fill=10), 7.2)


def test_copies_of_unknown_bytes_are_refused() -> None:
    schedule = schedules.make("1f1b", num_ranks=2, num_microbatches=4)
    execution = Execution(slots_on_device="1GiB")
    assert simulate(schedule, execution=execution).makespan > 0  # no copy takes time
    with pytest.raises(ValueError, match=r"slots_on_device='1GiB'.*activation_bytes"):
        simulate(schedule, costs=Costs(spill=1), execution=execution)
