"""Loss and gradients of the compiled pipeline equal those of the sequential model, in float64.

Every pair of options is covered: schedules, sizes, layers and kinds, all ways to execute, all
features of a model. That the tables are right at every size is the business of tests/schedule.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from dualpipe_jax._executor import offload
from dualpipe_jax._model.kinds import blocks_of
from dualpipe_jax._predict import StageLayers, simulate, simulation, usual_costs
from dualpipe_jax._predict.simulation import durations_of
from dualpipe_jax._schedule.compile import Compiled, compile_program
from dualpipe_jax._schedule.replay import replay
from dualpipe_jax._schedule.tables import Tables
from tests.cheap_keys import make_key
from tests.kinds import make_kinds
from tests.kinds import make_params as make_kinds_params
from tests.models import (
    FEATURES,
    assert_close,
    make_batch,
    make_mesh,
    make_model,
    make_params,
    make_shared,
    offload_policy,
    sequential_value_and_grad,
)
from tests.pairwise import cover
from tests.schedules_under_test import NAMES, PAIRED, has_steady

# The most that is said of each option: the pairs of all of them are met below.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "schedule": NAMES,
    "num_ranks": (1, 2, 3, 4),
    "microbatches": ("fewer than ranks", "as many", "odd", "many"),
    # A stage's: two, which are unrolled; two or one; five, in a loop; any, or none, as given.
    "layers": ("two", "uneven", "five", "given"),
    "kinds": ("one", "by turns", "one after the other"),
    "overlap": (False, True, "two-tick"),
    "unroll": (None, False, 2),
    "remat": ("none", "block", "dots", "offload"),
    "slots_on_device": (None, 1),
    "split_backward": (False, True),
    "deferred": (None, "store"),
    "frozen": (False, True),
    "num_shards": (1, 2),
    "metrics": (False, True),
    "shared": (False, True),
    **dict.fromkeys(FEATURES, (False, True)),
}
RULES: list[Callable[..., bool]] = [
    # A steady phase is had by schedules of pairs, from some microbatches on.
    lambda schedule, overlap: overlap is not True or schedule in PAIRED,
    lambda schedule, num_ranks, microbatches, overlap: (
        overlap is not True
        or has_steady(schedule, num_ranks, num_microbatches(num_ranks, microbatches), overlap)
    ),
    # The kinds of tests/kinds.py know neither; a shard of the batch has keys of its own.
    lambda kinds, pytree: kinds == "one" or not pytree,
    lambda kinds, metrics: kinds == "one" or not metrics,
    lambda num_shards, dropout: num_shards == 1 or not dropout,
]


def num_microbatches(num_ranks: int, microbatches: str) -> int:
    return {
        "fewer than ranks": max(num_ranks - 1, 1),
        "as many": num_ranks,
        "odd": 2 * num_ranks + 1,
        "many": 4 * num_ranks,
    }[microbatches]


def layers_of_stages(layers: str, num_stages: int) -> list[int]:
    return {
        "two": [2] * num_stages,
        "uneven": [2] * (num_stages // 2 + 1) + [1] * (num_stages - num_stages // 2 - 1),
        "five": [5] * num_stages,
        "given": [2, 0, 3, 0, 1, 2, 1, 0][:num_stages] if num_stages != 3 else [0, 3, 2],
    }[layers]


CASES = cover(OPTIONS, rules=RULES)
PLAINEST = {name: values[0] for name, values in OPTIONS.items()}
# Eight ranks, some of whose values are sent later than made.
CASES.append(
    PLAINEST
    | {"schedule": "dualpipe", "num_ranks": 8, "microbatches": "many", "layers": "uneven"}
    | {"split_backward": True, **dict.fromkeys(FEATURES, True)}
)


def name_of(case: dict[str, Any]) -> str:
    """Names the options that are not the plainest."""
    shown = ["schedule", "num_ranks", "microbatches", "layers"]
    parts = [f"{case[name]}".replace(" ", "_") for name in shown]
    for name, value in case.items():
        if name not in shown and value != PLAINEST[name]:
            parts.append(name if value is True else f"{name}={value}".replace(" ", "_"))
    return "-".join(parts)


def test_rules_leave_out_no_value() -> None:
    """That all pairs are met but those is for test_pairwise.py."""
    for name, values in OPTIONS.items():
        assert {case[name] for case in CASES} >= set(values)
    assert {case["schedule"] for case in CASES if case["overlap"] is True} == set(PAIRED)
    assert len(CASES) <= 47


REMATS = {"dots": jax.checkpoint_policies.dots_saveable, "offload": offload_policy()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_equals_sequential(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST_BYTES", 0)
    P, N = case["num_ranks"], num_microbatches(case["num_ranks"], case["microbatches"])
    schedule = dpj.schedules.make(case["schedule"], num_ranks=P, num_microbatches=N)
    stages = layers_of_stages(case["layers"], schedule.num_stages)
    features = frozenset(name for name in (*FEATURES, "metrics", "shared") if case[name])
    if case["kinds"] == "one":
        model, params = make_model(features), make_params(sum(stages))
    else:
        letters = "".join(itertools.islice(itertools.cycle("DM"), sum(stages)))
        if case["kinds"] == "one after the other":
            letters = "".join(sorted(letters[:-1])) + "S"  # the last without parameters
        model, params = make_kinds(letters, features), make_kinds_params(letters)
    if case["shared"]:
        params["shared"] = make_shared()
    trainable = jax.tree.map_with_path(
        lambda path, _: not (case["frozen"] and path[-1] == jax.tree_util.DictKey("down")), params
    )
    num_shards = case["num_shards"]
    batch = make_batch(N * num_shards)
    rng = make_key(7) if case["dropout"] else None
    more: dict[str, Any] = {"batch_axes": "data"} if num_shards > 1 else {}
    if case["layers"] == "given":
        more["layers_per_stage"] = stages
    grad_fn = dpj.value_and_grad(
        model,
        mesh=make_mesh(P, **({"data": num_shards} if num_shards > 1 else {})),
        num_microbatches=N,
        schedule=schedule,
        remat=REMATS.get(case["remat"], case["remat"]),
        trainable=trainable,
        execution=dpj.Execution(
            **{name: case[name] for name in dpj.Execution.__dataclass_fields__}
        ),
        **more,
    )
    result, grads = jax.jit(grad_fn)(params, batch, rng=rng)
    plain = sequential_value_and_grad(model, N * num_shards, has_metrics=case["metrics"])
    want, want_grads = plain(params, batch, rng=rng)
    want_grads = jax.tree.map(
        lambda grad, is_wanted: grad if is_wanted else np.zeros_like(grad), want_grads, trainable
    )
    assert_close(result, want)
    assert_close(grads, want_grads)
    if case["metrics"]:
        # Once a microbatch, in each layer: not again where a backward recomputes.
        metrics = result[1].blocks
        np.testing.assert_array_equal(metrics["one"], [N * num_shards] * sum(stages))
        assert (metrics["dead"].dtype, metrics["any"].dtype) == (jnp.int64, jnp.int32)
        is_replicated = metrics["dead"].sharding.is_fully_replicated
        assert is_replicated == (P == 1 or sum(stages) % P != 0)
    # A gradient that the model does not have is zero, not small; and no layer was dropped. Each
    # stack is sharded over the ranks if its own layers divide.
    assert not np.asarray(grads["ends"]["unused"]).any()
    blocks = grads["blocks"]
    if case["kinds"] == "one":
        stacks = [blocks["up"]]
        assert not np.asarray(blocks["unused"]).any()
    else:
        leaves = (("dense", "up"), ("moe", "router"))
        stacks = [blocks[kind][name] for kind, name in leaves if kind in blocks]
    for leaf in stacks:
        assert np.abs(leaf).reshape(len(leaf), -1).max(axis=1).min() > 0
        assert leaf.sharding.is_fully_replicated == (P == 1 or len(leaf) % P != 0)


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
        schedule, costs, transfer=options["transfer"], layers=StageLayers.cut(sizes)
    )
    # `simulate` is told by the costs whether a backward recomputes, and a step by `remat`.
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
    model, params = make_model(frozenset(FEATURES)), make_params(num_layers)
    batch, rng = make_batch(2), make_key(5)
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
    model = make_model(frozenset(FEATURES))
    params, batch, rng = make_params(7), make_batch(num_microbatches), make_key(3)
    mesh = make_mesh(num_ranks)
    evaluate = dpj.evaluate(model, mesh=mesh, num_microbatches=num_microbatches)
    want = jax.jit(dpj.sequential(model, num_microbatches=num_microbatches))
    assert_close(jax.jit(evaluate)(params, batch, rng=rng), want(params, batch, rng=rng))


def test_sequential_is_the_plain_meaning() -> None:
    """Against a Python loop that spells out the contract section by section."""
    num_layers, num_microbatches = 3, 2
    features = frozenset(FEATURES)
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
    """Values that a model's function reads besides its arguments are not frozen by a jit."""
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


def test_sequential_takes_the_params_that_a_step_returns() -> None:
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


@pytest.mark.slow
def test_a_found_order_is_as_exact() -> None:
    """Below the memory of every named order, with a W that follows another I than its own."""
    schedule = dpj.schedules.search(
        num_ranks=4,
        num_microbatches=5,
        placement="v",
        costs=dpj.Costs(input_grad=2.08, weight_grad=0.923),
        transfer=0.1,
        max_activations=2,
        waits="values",
        moves=300,
    )
    schedule = dpj.Schedule.from_csv(schedule.to_csv())
    model, params, batch = make_model(), make_params(11), make_batch(5)
    grad_fn = dpj.value_and_grad(
        model, mesh=make_mesh(4), num_microbatches=5, schedule=schedule, remat="block"
    )
    got = jax.jit(grad_fn)(params, batch)
    assert_close(got, sequential_value_and_grad(model, 5)(params, batch))
