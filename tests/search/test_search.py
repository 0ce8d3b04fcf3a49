"""Searches: the evaluator against the library's, limits, kept beats, arguments, and the command."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import dualpipe_jax as dpj
from dualpipe_jax import _cli, schedules
from dualpipe_jax._errors import ScheduleError
from dualpipe_jax._schedule.generators import GENERATORS
from dualpipe_jax._search import loops
from dualpipe_jax._search.arguments import make_problem
from dualpipe_jax._search.bounds import lower_bound
from dualpipe_jax._search.problem import PLACEMENTS, Problem, routes_of
from dualpipe_jax._search.seeds import list_seeds, named_programs, named_seeds

BYTES = dpj.Costs(activation_bytes=100, stash_bytes=60)
COSTS = {
    "unit": (dpj.Costs(), 0.0),
    "remat": (dpj.Costs(input_grad=2.08, weight_grad=0.923, head=0.3, embed=0.1), 0.1),
    "bytes": (BYTES, 0.0),
    "recomputing": (dpj.Costs(input_grad=2.0, weight_grad=0.9, recompute=2.0), 0.2),
}
SIZES = ((1, 3), (2, 1), (3, 4), (4, 8))


def problem_of(placement: str, P: int, N: int, costs: str = "unit", **more: Any) -> Problem:
    of_actions, transfer = COSTS[costs]
    arguments = {
        "num_stages_per_rank": None,
        "layers_per_stage": None,
        "layout": None,
        "max_activations": None,
        "memory": None,
        **more,
    }
    return make_problem(
        num_ranks=P,
        num_microbatches=N,
        costs=of_actions,
        transfer=transfer,
        placement=placement,
        **arguments,
    )


def replayed(problem: Problem, rows: np.ndarray) -> float:
    return loops.replay(rows, problem.lanes, problem.make_times(), loops.NEVER, 0.0)


def simulated(problem: Problem, schedule: dpj.Schedule, layers: Any = None) -> dpj.Simulation:
    return dpj.simulate(
        schedule,
        costs=problem.costs,
        transfer=problem.transfer,
        layers_per_stage=layers,
        execution=dpj.Execution(split_backward=True),
    )


def search(**given: Any) -> dpj.Schedule:
    arguments: dict[str, Any] = {"num_ranks": 4, "num_microbatches": 8, "moves": 200, **given}
    return schedules.search(**arguments)


@pytest.mark.parametrize("costs", ["remat", "recomputing"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_replay_is_that_of_the_library(placement: str, costs: str) -> None:
    for P, N in SIZES:
        problem = problem_of(placement, P, N, costs, max_activations=10**6)
        programs = named_programs(problem)
        assert programs
        for program in programs:
            rows = problem.rows_of(program)
            # Its weight grads may be those of other microbatches.
            again = dpj.Schedule.from_csv(problem.program_of(rows, name="x").to_csv())
            made = simulated(problem, again)
            assert replayed(problem, rows) == pytest.approx(made.dependency_makespan, rel=1e-12)
            peak = made.peak_weight_activations * made.stage_share
            assert problem.peak_of(rows) == pytest.approx(peak)
            if not problem.costs.recompute:
                same = simulated(problem, dpj.Schedule(program))
                assert made.dependency_makespan == pytest.approx(same.dependency_makespan)
        rng = np.random.default_rng(0)
        for seed in list_seeds(problem, rng, num_tried=3):
            schedule = dpj.Schedule.from_csv(problem.program_of(seed.rows, name="x").to_csv())
            expected = simulated(problem, schedule).dependency_makespan
            assert seed.makespan == pytest.approx(expected, rel=1e-12)
            assert seed.makespan >= lower_bound(problem) - 1e-9


def test_layers_of_kinds_have_their_costs_and_all_take_memory() -> None:
    layers = {"layers_per_stage": (4, 1, 3), "layout": ("dense",) * 3 + ("moe",) * 5}
    costs = dpj.Costs(recompute=0.5, layer={"dense": 0.25, "moe": 1.0})
    made = schedules.zb_h1(num_ranks=3, num_microbatches=5)
    problem = make_problem(
        num_ranks=3,
        num_microbatches=5,
        costs=costs,
        transfer=0.1,
        placement="linear",
        num_stages_per_rank=None,
        max_activations=None,
        memory=None,
        **layers,
    )
    execution = dpj.Execution(split_backward=True)
    expected = dpj.simulate(made, costs=costs, transfer=0.1, execution=execution, **layers)
    rows = problem.rows_of(made.program)
    assert replayed(problem, rows) == pytest.approx(expected.dependency_makespan)
    assert problem.peak_of(rows) == pytest.approx(3 * 4 * 3 / 8)  # of three microbatches


def test_every_named_schedule_has_a_placement() -> None:
    for P, N in ((2, 4), (4, 8)):
        found = {
            program.name
            for placement in PLACEMENTS
            for program in named_programs(problem_of(placement, P, N, max_activations=10**6))
        }
        assert len(found) == len(GENERATORS)


@pytest.mark.parametrize("waits", ["program", "values"])
@pytest.mark.parametrize(
    ("placement", "limit"), [("linear", 3), ("v", 3.5), ("interleaved", 4), ("bidirectional", 2)]
)
def test_found_orders_keep_the_limit_and_are_as_fast_as_the_named(
    placement: str, limit: float, waits: str
) -> None:
    for costs in ("remat", "recomputing"):
        of_actions, transfer = COSTS[costs]
        sizes = {"num_ranks": 3, "num_microbatches": 6, "placement": placement, "moves": 100}
        sizes |= {"costs": of_actions, "transfer": transfer}
        made = search(**sizes, max_activations=limit, waits=waits)
        assert made == search(**sizes, max_activations=limit, waits=waits)
        assert dpj.Schedule.from_csv(made.to_csv(), made.name) == made
        problem = problem_of(placement, 3, 6, costs, max_activations=limit)
        found = simulated(problem, made)
        assert found.peak_weight_activations * found.stage_share <= limit
        for seed in named_seeds(problem, keep_beats=False):
            named = dpj.Schedule(problem.program_of(seed.rows, name="named"))
            if waits == "values":
                assert found.dependency_makespan <= seed.makespan + 1e-9
            else:
                assert found.makespan <= simulated(problem, named).makespan + 1e-9


def test_a_search_finds_the_proven_optimum() -> None:
    """27 at equal costs, 4 ranks and 8 microbatches is optimal (by a constraint solver)."""
    made = search(waits="values", max_activations=4)
    assert dpj.simulate(made).dependency_makespan == 27
    # Below their memory no named order fits but v-half, and the costs are not those it is made for.
    costs, transfer = COSTS["remat"]
    found = search(placement="v", costs=costs, transfer=transfer, max_activations=2, waits="values")
    problem = problem_of("v", 4, 8, "remat", max_activations=2)
    assert not named_seeds(problem, keep_beats=False)
    one_by_one = replayed(problem, problem.rows_one_by_one())
    assert simulated(problem, found).dependency_makespan < 0.5 * one_by_one


def test_no_order_holds_less_than_one_by_one() -> None:
    for placement in PLACEMENTS:
        problem = problem_of(placement, 3, 4, max_activations=1)
        rows = problem.rows_one_by_one()
        dpj.Schedule.from_csv(problem.program_of(rows, name="x").to_csv())
        assert problem.peak_of(rows) == 1
        # An activation of all stages of a rank, and the stash of one.
        sizes = {"num_ranks": 3, "num_microbatches": 4, "placement": placement}
        memory = 100 + 60 * 3 // problem.num_stages
        made = search(**sizes, costs=BYTES, memory=f"{memory}B")
        with pytest.raises(ValueError, match=rf"memory={memory - 1}: must be at least {memory} b"):
            search(**sizes, costs=BYTES, memory=memory - 1)
        assert simulated(problem, made).peak_weight_activations * problem.num_ranks == (
            problem.num_stages
        )


def test_uneven_stages_count_by_their_layers() -> None:
    layers = [3, 2, 2, 2, 2, 2, 2, 1]
    costs, transfer = COSTS["remat"]
    problem = problem_of("interleaved", 4, 8, "remat", layers_per_stage=layers)
    made = search(
        placement="interleaved",
        costs=costs,
        transfer=transfer,
        layers_per_stage=layers,
        waits="values",
        moves=600,
    )
    named, *_ = named_seeds(problem, keep_beats=False)
    assert simulated(problem, made, layers).dependency_makespan < 0.995 * named.makespan
    rows = problem.rows_of(made.program)
    assert problem.peak_of(rows) <= problem.max_activations + 1e-9
    assert problem.max_activations == problem.peak_of(named.rows)
    assert replayed(problem, rows) == pytest.approx(
        simulated(problem, made, layers).dependency_makespan, rel=1e-12
    )


@pytest.mark.parametrize(("name", "placement"), [("dualpipe", "bidirectional"), ("dualpipev", "v")])
def test_beats_are_kept(name: str, placement: str) -> None:
    costs, transfer = COSTS["remat"]
    sizes = {"num_ranks": 4, "num_microbatches": 12}
    arguments = {**sizes, "placement": placement, "costs": costs, "transfer": transfer}
    steady = schedules.make(name, **sizes).compiled(overlap=True).tables.steady
    assert steady is not None
    made = search(**arguments, waits="values", moves=400)
    kept = made.compiled(overlap=True).tables.steady
    assert kept is not None
    assert kept.num_beats >= steady.num_beats - 2
    named = dpj.simulate(schedules.make(name, **sizes), costs=costs, transfer=transfer)
    found = dpj.simulate(made, costs=costs, transfer=transfer)
    assert found.dependency_makespan < named.dependency_makespan
    # The run is in the rows as it stands in the named order.
    run = 3 * (steady.num_beats - 1)
    problem = problem_of(placement, 4, 12, "remat")
    before, after = (
        [
            "".join(map(chr, row[:length]))
            for row, length in zip(problem.rows_of(program), problem.lanes.length, strict=True)
        ]
        for program in (schedules.make(name, **sizes).program, made.program)
    )
    seed, *_ = named_seeds(problem, keep_beats=True)
    for old, new, places in zip(before, after, seed.pairs, strict=True):
        assert len(places) > run
        assert old[places.start : places.stop] == new[places.start : places.stop]
    free = named_seeds(problem, keep_beats=False)
    assert not any(seed.pairs for seed in free)
    # A named order that is not improved stays as it is published, with its pairs.
    unmoved = search(**arguments, moves=0)
    assert unmoved.to_csv() in {
        schedules.make(each, **sizes).to_csv() for each in schedules.names()
    }


def test_bounds_meet_the_optimum_where_it_is_known() -> None:
    # ZB-H1 and DualPipeV at equal costs: nobody waits but for the first x.
    assert lower_bound(problem_of("linear", 4, 8, max_activations=8)) == 27
    assert lower_bound(problem_of("v", 4, 8, max_activations=8)) == 25.5
    # By hand: stage s holds half a rank's layers for 8.5 - s, stage 7 - s for 1.5 + s.
    assert lower_bound(problem_of("v", 4, 8, max_activations=1)) == 8 * (8.5 + 1.5) / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"placement": "V"}, ValueError, "placement='V': must be 'linear', 'v', 'interleaved'"),
        ({"placement": 3}, TypeError, "placement=3: must be"),
        ({"num_stages_per_rank": 2}, ValueError, "is for placement='interleaved', not for 'lin"),
        ({"costs": 1.0}, TypeError, "costs=1.0: must be a dualpipe_jax.Costs, or None"),
        ({"transfer": -1}, ValueError, "transfer=-1.0: a cost must be"),
        ({"max_activations": 0.9}, ValueError, "must be at least 1, which a rank holds of a si"),
        ({"max_activations": float("nan")}, ValueError, "max_activations=nan: must be at least"),
        (
            {"memory": "1GiB"},
            ValueError,
            "memory='1GiB': must come with the bytes of an ac",
        ),
        (
            {"memory": 1, "max_activations": 2},
            ValueError,
            "memory=1, max_activations=2: must not",
        ),
        ({"memory": "1XB", "costs": BYTES}, ValueError, "memory='1XB': '1XB' is not a size"),
        ({"layers_per_stage": [1]}, ValueError, "of placement 'linear' on 4 ranks"),
        ({"keep_beats": 1}, TypeError, "keep_beats=1: must be True or False"),
        ({"waits": "ideal"}, ValueError, "waits='ideal': must be 'program', 'values'"),
        ({"moves": -1}, ValueError, "moves=-1: must be an integer, 0 or more"),
        ({"seed": 0.5}, TypeError, "seed=0.5: must be an integer"),
        ({"num_ranks": 0}, ValueError, "num_ranks=0: must be an integer of at least 1"),
    ],
)
def test_mistakes_are_explained(change: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        search(**change)


def test_slots_are_those_of_the_fullest_rank_of_each_buffer() -> None:
    # Rank 0 holds two activations, rank 1 two stashes: 2 x 100 + 2 x 60 bytes.
    rows = np.array([[0, 0, 1, 2, 1, 2], [3, 4, 3, 4, 5, 5]])
    for memory, is_within in ((320, True), (319, False)):
        problem = problem_of("linear", 2, 2, costs="bytes", memory=memory)
        peaks = np.zeros((2, 2))
        for rank in range(2):
            assert loops.is_legal(rows[rank], 6, problem.lanes, peaks[rank])
        assert peaks.tolist() == problem.peaks_of(rows).tolist() == [[2, 1], [2, 2]]
        assert problem.peak_of(rows) == pytest.approx(3.2)
        assert loops.fits(peaks, problem.lanes) == is_within


def test_illegal_rows_are_refused_by_the_loops() -> None:
    problem = problem_of("linear", 2, 2, max_activations=1)
    rows = problem.rows_one_by_one()
    peaks = problem.peaks_of(rows)
    assert loops.is_legal(rows[0], 6, problem.lanes, peaks[0])
    for order in ([1, 0, 2, 0, 1, 2], [0, 2, 1, 0, 1, 2], [0, 0, 1, 2, 1, 2]):
        assert not loops.is_legal(np.array(order), 6, problem.lanes, peaks[0])
    crossed = np.array([[0, 1, 2, 0, 1, 2], [3, 3, 4, 5, 4, 5]])
    assert replayed(problem, crossed) == loops.NEVER
    with pytest.raises(ScheduleError):
        dpj.Schedule.from_csv(problem.program_of(crossed, name="x").to_csv())


def test_routes_of_placements() -> None:
    two = {"num_ranks": 2, "num_stages_per_rank": 3}
    assert routes_of("interleaved", num_microbatches=1, **two)[0] == ((0, 1, 0, 1, 0, 1),)
    both = routes_of("bidirectional", num_microbatches=3, **two)
    assert both == (((0, 1), (1, 0)), (range(2), range(2, 3)))
    assert routes_of("bidirectional", num_microbatches=1, **two) == (((0, 1),), (range(1),))


def test_command_writes_the_order(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    command = "search --placement v --ranks 2 --microbatches 4 --max-activations 1.5 --moves 50"
    costs = "--costs F=1,I=2,W=1 --transfer 0.1"
    result = CliRunner().invoke(_cli.main, f"{command} {costs} --output {path}".split())
    assert result.exit_code == 0, result.stderr
    made = schedules.search(
        num_ranks=2,
        num_microbatches=4,
        placement="v",
        costs=dpj.Costs(input_grad=2),
        transfer=0.1,
        max_activations=1.5,
        moves=50,
    )
    assert path.read_text() == made.to_csv()
    assert result.stderr.startswith("search-v: makespan ")
    # The same limit in bytes.
    in_bytes = command.replace("--max-activations 1.5", "--memory 1.5GiB --activation-bytes 1GiB")
    printed = CliRunner().invoke(_cli.main, f"{in_bytes} {costs}".split())
    assert printed.stdout == made.to_csv()
    assert printed.stderr.startswith(result.stderr.splitlines()[0] + ", 1.5 GiB\n")
    refused = CliRunner().invoke(_cli.main, [*command.split(), "--layers-per-stage", "1;2"])
    assert (refused.exit_code, refused.stdout) == (2, "")


def test_compiled_and_plain_loops_make_the_same_order() -> None:
    """The suite runs them plain (tests/conftest.py), a process of its own compiled."""
    given = "num_ranks=4, num_microbatches=8, placement='v', max_activations=3, moves=300"
    code = f"from dualpipe_jax import schedules as s; print(s.search({given}).to_csv(), end='')"
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_DISABLE_JIT"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout == search(placement="v", max_activations=3, moves=300).to_csv()
