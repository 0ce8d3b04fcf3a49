"""Loss and gradients of the compiled pipeline equal those of the sequential model, in float64.

A covering set: every schedule, P in {1, 2, 3, 4, 8}, N odd, < P, = P, 2P, 4P, and every feature
with every schedule. That the tables are right at every size is the business of tests/schedule.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from dualpipe_jax._kinds import blocks_of
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._simulate import simulate, simulation, usual_costs
from dualpipe_jax._simulate.simulation import durations_of
from tests.models import (
    assert_close,
    make_batch,
    make_mesh,
    make_model,
    make_params,
    sequential_value_and_grad,
)


class Case(NamedTuple):
    schedule: str
    num_ranks: int
    num_microbatches: int
    num_layers: int
    features: str = ""
    remat: Any = "none"
    execution: dpj.Execution = dpj.Execution(split_backward=False)

    def __str__(self) -> str:
        name = f"{self.schedule}-P{self.num_ranks}-N{self.num_microbatches}-L{self.num_layers}"
        options = {
            "remat": self.remat != "none",
            "store": self.execution.deferred == "store",
            "loop": self.execution.unroll is False,
            "by two": self.execution.unroll == 2,
            "split": self.execution.split_backward,
            "two-tick": self.execution.overlap == "two-tick",
        }
        return "-".join(
            [name, *self.features.split(), *(o for o, is_on in options.items() if is_on)]
        )


SPLIT = dpj.Execution(split_backward=True)
SPLIT_LOOP = dpj.Execution(split_backward=True, unroll=False)
LOOP = dpj.Execution(split_backward=False, unroll=False)
BY_TWO = dpj.Execution(split_backward=False, unroll=2)
SPLIT_BY_TWO = dpj.Execution(split_backward=True, unroll=2)
STORE = dpj.Execution(split_backward=False, deferred="store")
ALL = "dropout weight block_has_aux has_aux pytree"
DOTS = jax.checkpoint_policies.dots_saveable
CASES = [
    Case("dualpipe", 1, 1, 1),
    Case("dualpipe", 1, 4, 3, "dropout weight", execution=SPLIT),
    Case("dualpipe", 2, 4, 4, ALL, execution=SPLIT),
    Case("dualpipe", 2, 5, 3, "pytree block_has_aux", "block"),
    Case("dualpipe", 2, 8, 12, "weight has_aux", execution=SPLIT),  # six layers a stage: in a loop
    Case("dualpipe", 3, 2, 3, "has_aux"),
    Case("dualpipe", 3, 6, 7, ALL, execution=SPLIT),
    Case("dualpipe", 3, 12, 3, "weight", DOTS, execution=STORE),
    Case("dualpipe", 4, 3, 6, "dropout"),
    Case("dualpipe", 4, 4, 4, "block_has_aux"),
    Case("dualpipe", 4, 8, 8, ALL, "block", execution=SPLIT),
    Case("dualpipe", 4, 9, 4, "pytree", execution=SPLIT),
    Case("dualpipe", 4, 16, 9, "weight block_has_aux"),
    Case("dualpipe", 8, 5, 8, "dropout has_aux"),
    Case("dualpipe", 8, 8, 11, "pytree weight"),
    Case("dualpipe", 8, 16, 8, ALL, execution=SPLIT),  # values sent later
    Case("1f1b", 1, 2, 2, "has_aux pytree"),
    Case("1f1b", 2, 4, 5, ALL, "block", BY_TWO),
    Case("1f1b", 3, 5, 3, "weight", execution=SPLIT),
    Case("1f1b", 4, 4, 8, "dropout block_has_aux", execution=SPLIT),
    Case("1f1b", 4, 16, 4, ALL),
    Case("1f1b", 8, 3, 8, "pytree"),
    Case("gpipe", 1, 3, 2, "weight"),
    Case("gpipe", 2, 1, 4, ALL, execution=SPLIT),
    Case("gpipe", 3, 6, 5, "block_has_aux dropout", "block", execution=SPLIT),
    Case("gpipe", 4, 8, 4, "pytree has_aux"),
    Case("gpipe", 8, 8, 9, ALL),
    Case("dualpipev", 1, 3, 4, "weight pytree"),  # two stages on one rank
    Case("dualpipev", 2, 4, 8, ALL, execution=SPLIT),
    Case("dualpipev", 3, 2, 6, "has_aux", "block"),
    Case("dualpipev", 4, 8, 12, "dropout block_has_aux"),  # stages of two layers and of one
    Case("interleaved-1f1b", 2, 3, 5, ALL, execution=SPLIT),
    Case("interleaved-1f1b", 3, 2, 6, "weight"),
    Case("interleaved-1f1b", 4, 8, 8, "pytree has_aux", "block"),
    Case("zb-h1", 2, 5, 4, "weight block_has_aux"),
    Case("zb-h1", 3, 4, 3, "has_aux", execution=SPLIT),
    Case("zb-h1", 3, 6, 7, "pytree", "block"),
    Case("zb-h1", 3, 2, 4, "pytree", "block", execution=STORE),
    Case("zb-h1", 4, 8, 4, ALL, "block", execution=SPLIT),
    Case("chimera", 2, 1, 3, "has_aux weight"),
    Case("chimera", 3, 6, 3, ALL, execution=SPLIT),
    Case("chimera", 4, 4, 8, "dropout pytree", "block"),
]
# Sizes with a straight-line run of beats: layers unrolled, in one loop, and in loops of their own.
RUN_CASES = [
    case._replace(execution=replace(case.execution, overlap=True))
    for case in (
        Case("dualpipe", 2, 8, 4, ALL),
        # Six layers a stage.
        Case("dualpipe", 2, 8, 12, "weight has_aux pytree", "block", SPLIT_BY_TWO),
        Case("dualpipe", 3, 12, 6, "pytree weight", DOTS, execution=STORE),
        # Unlike stages.
        Case("dualpipe", 4, 8, 11, "dropout block_has_aux pytree", execution=BY_TWO),
        Case("dualpipe", 4, 10, 8, ALL, execution=LOOP),
        Case("dualpipe", 8, 18, 8, "weight has_aux", "block", execution=STORE),
        Case("dualpipev", 1, 4, 4, "dropout block_has_aux"),  # a rank that is its own neighbour
        Case("dualpipev", 2, 5, 8, ALL, "block"),
        Case("dualpipev", 3, 9, 8, "weight pytree", "block", execution=SPLIT),  # unlike stages
        Case("dualpipev", 4, 10, 16, "has_aux", execution=SPLIT_LOOP),
    )
]
# Every schedule, on two to four ranks, an odd number of microbatches.
TWO_TICK_CASES = [
    case._replace(execution=replace(case.execution, overlap="two-tick"))
    for case in (
        Case("gpipe", 3, 5, 4, "weight"),
        Case("1f1b", 4, 7, 8, "dropout"),
        Case("1f1b", 2, 3, 12, "has_aux", execution=SPLIT),  # six layers a stage: in a loop
        Case("interleaved-1f1b", 3, 5, 6, "pytree"),  # round the ring
        Case("zb-h1", 4, 5, 8, "weight", "block"),
        Case("chimera", 2, 5, 4, "pytree block_has_aux"),
        Case("dualpipe", 3, 7, 7, "has_aux weight", execution=SPLIT),
        Case("dualpipev", 4, 9, 8, ALL),
    )
]


def test_covering_set_covers() -> None:
    """At most 45 compiled cases; every schedule at odd, small and uneven sizes, all features."""
    assert len(CASES) <= 45
    assert {case.num_ranks for case in CASES} == {1, 2, 3, 4, 8}
    for name in dpj.schedules.names():
        mine = [case for case in CASES if case.schedule == name]
        assert {feature for case in mine for feature in case.features.split()} == set(ALL.split())
        assert any(case.remat == "block" for case in mine)
        assert not all(case.execution.deferred for case in mine if case.remat == "block")
        stages = {"dualpipev": 2, "interleaved-1f1b": 2}.get(name, 1)
        assert any(case.num_layers % (case.num_ranks * stages) for case in mine)
        assert any(case.num_microbatches % 2 for case in mine)
        assert any(case.num_microbatches < case.num_ranks for case in mine)
        assert {case.execution.split_backward for case in mine} == {True, False}
    # What is put off is kept, in slots among others or its own, or recomputed.
    put_off = [case for case in CASES if case.schedule in ("dualpipe", "zb-h1")]
    found = {
        (case.execution.split_backward, case.remat, case.execution.deferred) for case in put_off
    }
    assert found >= {(is_split, "none", None) for is_split in (True, False)}
    assert found >= {(is_split, "block", None) for is_split in (True, False)}
    assert (False, "block", "store") in found


def test_runs_have_beats() -> None:
    """What is said to cover runs has one; every way to loop, rematerialise and stash is met."""
    for case in RUN_CASES:
        sizes = {"num_ranks": case.num_ranks, "num_microbatches": case.num_microbatches}
        made = dpj.schedules.make(case.schedule, **sizes)
        assert made.compiled(overlap=True).tables.steady is not None, case
        assert made.compiled().tables.steady is None, case
    assert {case.num_ranks for case in RUN_CASES} == {1, 2, 3, 4, 8}
    for name in ("dualpipe", "dualpipev"):
        mine = [case for case in RUN_CASES if case.schedule == name]
        assert {feature for case in mine for feature in case.features.split()} == set(ALL.split())
        assert {case.execution.unroll for case in mine} >= {None, False}
        assert {case.execution.split_backward for case in mine} == {True, False}
        stages = {"dualpipev": 2}.get(name, 1)
        assert any(case.num_layers % (case.num_ranks * stages) for case in mine)
    assert {(case.execution.unroll, case.execution.split_backward) for case in RUN_CASES} >= {
        (unroll, is_split) for unroll in (None, False, 2) for is_split in (True, False)
    }
    kept = {(case.remat, case.execution.deferred) for case in RUN_CASES}
    assert kept == {("none", None), ("block", None), ("block", "store"), (DOTS, "store")}


def test_two_tick_cases_cover() -> None:
    assert {case.schedule for case in TWO_TICK_CASES} == set(dpj.schedules.names())
    assert {case.num_ranks for case in TWO_TICK_CASES} == {2, 3, 4}
    assert all(case.num_microbatches % 2 for case in TWO_TICK_CASES)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *RUN_CASES, *TWO_TICK_CASES], ids=str)
def test_equals_sequential(case: Case) -> None:
    model = make_model(frozenset(case.features.split()))
    params, batch = make_params(case.num_layers), make_batch(case.num_microbatches)
    rng = jax.random.key(7) if "dropout" in case.features else None
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(case.num_ranks),
        num_microbatches=case.num_microbatches,
        schedule=case.schedule,
        remat=case.remat,
        execution=case.execution,
    )
    result, grads = jax.jit(grad_fn)(params, batch, rng=rng)
    want, want_grads = sequential_value_and_grad(model, case.num_microbatches)(
        params, batch, rng=rng
    )
    assert_close(result, want)
    assert_close(grads, want_grads)
    # A gradient that the model does not have is zero, not small.
    assert not np.asarray(grads["blocks"]["unused"]).any()
    assert not np.asarray(grads["ends"]["unused"]).any()
    assert np.abs(grads["blocks"]["up"]).min(axis=(1, 2)).min() > 0  # no layer was dropped
    is_even = case.num_layers % case.num_ranks == 0
    assert grads["blocks"]["up"].sharding.is_fully_replicated == (
        not is_even or case.num_ranks == 1
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tables, Any]]:
    """Collects the tables that are compiled for steps, and by which durations; the last are run."""
    tables: list[tuple[Tables, Any]] = []

    def compile_and_keep(*args: Any, **options: Any) -> Compiled:
        compiled = compile_program(*args, **options)
        tables.append((compiled.tables, options["durations"]))
        return compiled

    monkeypatch.setattr(simulation, "compile_program", compile_and_keep)
    return tables


@pytest.mark.slow
def test_placed_by_odd_costs_is_as_exact(made: list[tuple[Tables, Any]]) -> None:
    # Stages of three layers, two and two.
    schedule = dpj.schedules.dualpipe(num_ranks=3, num_microbatches=6)
    costs = dpj.Costs(forward=0.3, input_grad=5, weight_grad=0.01, embed=2, head=7)
    model, params, batch = (
        make_model(frozenset(["pytree", "weight"])),
        make_params(7),
        make_batch(6),
    )
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(3),
        num_microbatches=6,
        schedule=schedule,
        execution=dpj.Execution(split_backward=False),
        costs=costs,
    )
    got = jax.jit(grad_fn)(params, batch)
    assert_close(got, sequential_value_and_grad(model, 6)(params, batch))
    # That is another program than one placed as if all took as long.
    plain = compile_program(schedule.program, full_backward=True).tables
    assert made[-1][0].num_ticks > plain.num_ticks


@pytest.mark.parametrize(
    ("costs", "remat", "sizes"),
    [
        (None, "none", None),
        (None, "block", None),
        (dpj.Costs(forward=1, input_grad=3, weight_grad=2), "none", None),
        (dpj.Costs(forward=3, input_grad=1, weight_grad=2), "block", (2, 1, 2, 1)),
    ],
)
def test_steps_are_placed_by_costs_as_simulate_has_them(
    costs: dpj.Costs | None,
    remat: str,
    sizes: tuple[int, ...] | None,
    made: list[tuple[Tables, Any]],
) -> None:
    """And in the timetable that is the faster at these."""
    schedule = dpj.schedules.dualpipe(num_ranks=4, num_microbatches=8)
    params, batch = make_params(6), make_batch(8)
    grad_fn = dpj.value_and_grad(
        make_model(),
        mesh=make_mesh(4),
        num_microbatches=8,
        schedule=schedule,
        layers_per_stage=sizes,
        remat=remat,
        execution=dpj.Execution(split_backward=True),
        costs=costs,
    )
    jax.jit(grad_fn).trace(params, batch)
    tables, placed_by = made[-1]
    if costs is None:
        costs = usual_costs(recomputes=remat == "block")
    sizes = sizes or (2, 2, 1, 1)
    options = {"costs": costs, "transfer": 0.1 * costs.forward, "layers_per_stage": sizes}
    assert placed_by == durations_of(
        schedule, costs, transfer=options["transfer"], layers_of_stage=sizes
    )
    # `simulate` is told by the costs what is recomputed, and a step by `remat`.
    deferred = "store" if remat == "none" else "recompute"
    split = dpj.Execution(split_backward=True, deferred=deferred)
    expected = simulate(schedule, **options, execution=split)
    assert (tables.steady is None) == (expected.execution.overlap is False)
    if costs.recompute > 0 or remat == "none":
        ends = replay(tables, placed_by.work(tables), transfer=options["transfer"])
        np.testing.assert_allclose(ends.max(), expected.makespan, rtol=1e-12)


def test_both_overlaps_are_met_above() -> None:
    schedule = dpj.schedules.dualpipe(num_ranks=4, num_microbatches=8)
    costs = dpj.Costs(forward=1, input_grad=3, weight_grad=2)
    found = [
        simulate(schedule, costs=each, transfer=0.1 * each.forward).execution.overlap
        for each in (usual_costs(recomputes=False), costs)
    ]
    assert found == [True, False]


# Written by hand: two half-size stages a rank, there and back, and round the ring.
ROWS = {
    "there and back": """
        0F0, 0F1, 3F0, 3F1, 3B0, 3B1, 0B0, 0B1
        1F0, 1F1, 2F0, 2F1, 2I0, 2I1, 2W0, 1I0, 2W1, 1I1, 1W0, 1W1""",
    "round the ring": """
        0F0, 0F1, 2F0, 2F1, 2B0, 2B1, 0B0, 0B1
        1F0, 1F1, 3F0, 3F1, 3B0, 3B1, 1B0, 1B1""",
}


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "num_layers"), [("there and back", 6), ("round the ring", 4)])
def test_schedule_of_the_users_own(rows: str, num_layers: int) -> None:
    """More stages than ranks: layers travel by permutes, and no rank is given the whole stack."""
    schedule = dpj.Schedule.from_csv(ROWS[rows].strip())
    model, params = make_model(frozenset(ALL.split())), make_params(num_layers)
    batch, rng = make_batch(2), jax.random.key(5)
    grad_fn = dpj.value_and_grad(
        model, mesh=make_mesh(2), num_microbatches=2, schedule=schedule, remat="block"
    )
    blocks = jax.device_put(params["blocks"], jax.NamedSharding(make_mesh(2), jax.P("pipe")))
    params = {**params, "blocks": blocks}
    program = jax.jit(grad_fn).lower(params, batch, rng=rng).compile()
    want = sequential_value_and_grad(model, 2)(make_params(num_layers), batch, rng=rng)
    assert_close(program(params, batch, rng=rng), want)
    assert "all-gather" not in str(program.as_text())


# As DualPipe on two ranks, but with more on its way before the first pair.
PAIRS = """
    0F0,0F1,1F3,1F4,(0F2;1B3)OVERLAP_F_B,(1F5;0B0)OVERLAP_F_B,1B4,0B1,1B5,0B2
    0F3,0F4,1F0,1F1,(0F5;1B0)OVERLAP_F_B,(1F2;0B3)OVERLAP_F_B,1B1,0B4,1B2,0B5"""


@pytest.mark.slow
def test_pairs_of_the_users_own() -> None:
    schedule = dpj.Schedule.from_csv(PAIRS.strip())
    assert schedule.compiled(overlap=True).tables.steady is not None
    model, params = make_model(frozenset(["weight", "block_has_aux"])), make_params(4)
    batch = make_batch(6)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(2),
        num_microbatches=6,
        schedule=schedule,
        execution=dpj.Execution(overlap=True),
    )
    want = sequential_value_and_grad(model, 6)(params, batch)
    assert_close(jax.jit(grad_fn)(params, batch), want)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 2), (3, 4), (4, 7), (4, 8)])
def test_evaluate_equals_sequential(num_ranks: int, num_microbatches: int) -> None:
    model = make_model(frozenset(ALL.split()))
    params, batch, rng = make_params(7), make_batch(num_microbatches), jax.random.key(3)
    mesh = make_mesh(num_ranks)
    evaluate = dpj.evaluate(model, mesh=mesh, num_microbatches=num_microbatches)
    want = jax.jit(dpj.sequential(model, num_microbatches=num_microbatches))
    assert_close(jax.jit(evaluate)(params, batch, rng=rng), want(params, batch, rng=rng))


def test_sequential_is_the_plain_meaning() -> None:
    """Against a Python loop that spells out section by section what the contract says."""
    num_layers, num_microbatches = 3, 2
    features = frozenset(ALL.split())
    model, params, batch = make_model(features), make_params(num_layers), make_batch(2)
    rng = jax.random.key(11)
    total = weight = aux_total = 0.0
    metrics = {"hits": 0, "loss": 0.0}
    for m in range(num_microbatches):
        rows = slice(2 * m, 2 * m + 2)
        microbatch = jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch)
        k = jax.random.fold_in(rng, m)

        def ctx(position: int, layer: Any = None, k: Any = k, microbatch: Any = microbatch) -> Any:
            return dpj.Context(
                microbatch=microbatch, layer=layer, rng=jax.random.fold_in(k, position)
            )

        x = model.embed(params["ends"], ctx(num_layers))
        for layer in range(num_layers):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            x, aux = blocks_of(model)[None](block, x, ctx(layer, jnp.int32(layer)))
            aux_total += aux
        loss, more = model.head(params["ends"], x, ctx(num_layers + 1))
        total += loss
        weight += (microbatch["tokens"] > 0).sum()
        metrics = jax.tree.map(lambda a, b: a + b, metrics, more)
    loss, got = dpj.sequential(model, num_microbatches=num_microbatches)(params, batch, rng=rng)
    np.testing.assert_allclose(loss, total / weight + aux_total / num_microbatches, rtol=1e-13)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-13)
    assert got["hits"] == metrics["hits"]


def test_same_gradients_without_jit_from_any_sharding_and_mesh_type() -> None:
    model = make_model(frozenset(["pytree"]))
    params, batch = make_params(4), make_batch(4)
    mesh = make_mesh(2)
    auto = jax.make_mesh(
        (2,), ("pipe",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2]
    )
    want = sequential_value_and_grad(model, 4)(params, batch)
    over_pipe = jax.sharding.PartitionSpec("pipe")
    for each in (mesh, auto):
        grad_fn = dpj.value_and_grad(model, mesh=each, num_microbatches=4)
        assert_close(grad_fn(params, batch), want)
        sharding = jax.sharding.NamedSharding(each, over_pipe)
        sharded = {**params, "blocks": jax.device_put(params["blocks"], sharding)}
        assert_close(grad_fn(sharded, jax.device_put(batch, sharding)), want)


def test_model_is_traced_as_often_as_the_users_jit() -> None:
    """What a model's function reads besides its arguments is not frozen by an earlier jit."""
    scale = [1.0]
    plain = make_model()
    model = dpj.Model(
        embed=plain.embed,
        block=lambda params, x, ctx: blocks_of(plain)[None](params, x, ctx) * scale[0],
        head=plain.head,
    )
    params, batch = make_params(2), make_batch(2)
    grad_fn = dpj.value_and_grad(model, mesh=make_mesh(2), num_microbatches=2)
    losses = []
    for scale[0] in (1.0, 2.0):
        loss = jax.jit(lambda params, batch: grad_fn(params, batch)[0])(params, batch)
        want = dpj.sequential(model, num_microbatches=2)(params, batch)
        np.testing.assert_allclose(loss, want, rtol=1e-12)
        losses.append(float(loss))
    assert losses[0] != losses[1]


def test_sequential_takes_what_a_step_hands_back() -> None:
    model, params, batch, mesh = make_model(), make_params(4), make_batch(4), make_mesh(2)
    want = sequential_value_and_grad(model, 4)(params, batch)
    over_pipe = jax.NamedSharding(mesh, jax.P("pipe"))
    params = {**params, "blocks": jax.device_put(params["blocks"], over_pipe)}
    assert_close(
        sequential_value_and_grad(model, 4)(params, jax.device_put(batch, over_pipe)), want
    )


def test_closing_over_an_array_on_the_mesh_is_explained() -> None:
    mesh, plain = make_mesh(2), make_model()
    table = jax.device_put(jnp.ones(4), jax.NamedSharding(mesh, jax.P()))

    def with_table(table: Any) -> Any:
        def block(params: Any, x: Any, ctx: dpj.Context) -> Any:
            return blocks_of(plain)[None](params, x, ctx) * table

        model = dpj.Model(embed=plain.embed, block=block, head=plain.head)
        grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2)
        return jax.eval_shape(grad_fn, make_params(2), make_batch(2))

    with pytest.raises(ValueError, match=r"closes over an array .* params or batch, .* NumPy"):
        with_table(table)
    with_table(np.asarray(table))


def test_batch_axes() -> None:
    """Data parallel beside the pipeline; every shard has keys of its own."""
    num_microbatches, num_shards = 4, 2
    features = frozenset(["weight", "block_has_aux", "has_aux"])
    model, params = make_model(features), make_params(4)
    batch = make_batch(num_microbatches * num_shards)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(2, data=num_shards),
        num_microbatches=num_microbatches,
        batch_axes="data",
    )
    # Without dropout, shards of N microbatches are the same as one batch of more microbatches.
    want = sequential_value_and_grad(model, num_microbatches * num_shards)(params, batch)
    assert_close(jax.jit(grad_fn)(params, batch), want)
    evaluate = dpj.evaluate(
        model, mesh=make_mesh(2, data=num_shards), num_microbatches=4, batch_axes="data"
    )
    assert_close(jax.jit(evaluate)(params, batch), want[0])

    noisy = make_model(frozenset(["dropout"]))
    grad_fn = dpj.value_and_grad(
        noisy, mesh=make_mesh(2, data=num_shards), num_microbatches=1, batch_axes=("data",)
    )
    one = make_batch(1)
    twice = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), one)
    loss, _ = jax.jit(grad_fn)(params, twice, rng=jax.random.key(0))
    alone = [_loss_of_shard(noisy, params, one, jax.random.key(0), shard) for shard in range(2)]
    assert alone[0] != alone[1]
    np.testing.assert_allclose(loss, np.mean(alone), rtol=1e-12)


def _loss_of_shard(model: dpj.Model, params: Any, batch: Any, rng: Any, shard: int) -> Any:
    """The loss of one microbatch of one shard: the shard's index is folded into each key last."""
    num_layers = len(params["blocks"]["up"])
    k = jax.random.fold_in(rng, 0)

    def ctx(position: int, layer: Any = None) -> dpj.Context:
        key = jax.random.fold_in(jax.random.fold_in(k, position), shard)
        return dpj.Context(microbatch=batch, layer=layer, rng=key)

    x = model.embed(params["ends"], ctx(num_layers))
    for layer in range(num_layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
        x = blocks_of(model)[None](block, x, ctx(layer, jnp.int32(layer)))
    return model.head(params["ends"], x, ctx(num_layers + 1))


@pytest.mark.parametrize(
    "types", ["Auto Auto", "Explicit Explicit", "Auto Explicit", "Explicit Auto"]
)
def test_other_axes_are_left_to_the_partitioner(types: str) -> None:
    """Parameters over one more axis, and a dim of the batch that is not its rows."""
    model, params, batch = make_model(), make_params(4), make_batch(4)
    mesh = jax.make_mesh(
        (2, 2),
        ("pipe", "model"),
        axis_types=tuple(getattr(jax.sharding.AxisType, name) for name in types.split()),
        devices=jax.devices()[:4],
    )
    want = sequential_value_and_grad(model, 4)(params, batch)

    def put(leaf: jax.Array, *spec: str | None) -> jax.Array:
        return jax.device_put(leaf, jax.NamedSharding(mesh, jax.P(*spec)))

    blocks = {**params["blocks"], "down": put(params["blocks"]["down"], "pipe", None, "model")}
    ends = {**params["ends"], "table": put(params["ends"]["table"], None, "model")}
    batch = {**batch, "side": put(batch["side"], None, "model")}
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=4)
    got = jax.jit(grad_fn)({"ends": ends, "blocks": blocks}, batch)
    assert_close(got, want)
    if types == "Explicit Explicit":
        assert jax.typeof(got[1]["blocks"]["down"]).sharding.spec == jax.P("pipe", None, "model")
        assert jax.typeof(got[1]["ends"]["table"]).sharding.spec == jax.P(None, "model")


@pytest.mark.parametrize("types", ["Auto Explicit", "Explicit Auto"])
def test_batch_axes_on_a_mesh_of_mixed_types(types: str) -> None:
    model, params, batch = make_model(), make_params(2), make_batch(4)
    mesh = jax.make_mesh(
        (2, 2),
        ("pipe", "data"),
        axis_types=tuple(getattr(jax.sharding.AxisType, name) for name in types.split()),
        devices=jax.devices()[:4],
    )
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2, batch_axes="data")
    want = sequential_value_and_grad(model, 4)(params, batch)
    assert_close(jax.jit(grad_fn)(params, batch), want)


def test_grad_dtype_and_accumulation_in_float32() -> None:
    """bfloat16 parameters: gradients are summed in float32 and cast once, at the end."""
    model, batch = make_model(), make_batch(8)
    params = make_params(2, dtype=jnp.bfloat16)
    batch = {**batch, "side": batch["side"].astype(jnp.bfloat16)}
    mesh = make_mesh(2)
    exact_fn = jax.jit(
        dpj.value_and_grad(model, mesh=mesh, num_microbatches=8, grad_dtype=jnp.float32)
    )
    loss, exact = exact_fn(params, batch)
    assert loss.dtype == jnp.float32
    assert exact["blocks"]["up"].dtype == jnp.float32
    _, cast = jax.jit(dpj.value_and_grad(model, mesh=mesh, num_microbatches=8))(params, batch)
    assert cast["blocks"]["up"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(cast["blocks"]["up"], exact["blocks"]["up"].astype(jnp.bfloat16))
    # A sum of eight gradients that was not rounded on the way has more bits than bfloat16.
    assert (
        np.asarray(exact["blocks"]["up"].astype(jnp.bfloat16), np.float32)
        != np.asarray(exact["blocks"]["up"])
    ).mean() > 0.5
