"""Predictions of `choose`: a rank's memory by hand, a transformer's sizes, the order."""

import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import dualpipe_jax as dpj
from dualpipe_jax import schedules
from dualpipe_jax._model.types import Aux
from dualpipe_jax._predict import (
    Candidate,
    Choice,
    Costs,
    LayerBytes,
    ParameterBytes,
    StageLayers,
    Transformer,
    choices_of,
    in_order,
    memory_of,
    simulate,
)
from dualpipe_jax._predict.simulation import durations_of
from dualpipe_jax._schedule.compile import compile_program
from dualpipe_jax._schedule.execution import Execution
from dualpipe_jax._schedule.stage_sizes import spread_evenly
from dualpipe_jax._schedule.tables import Tables
from dualpipe_jax._split_vjp import split_vjp
from tests.hlo import AS_EVER
from tests.schedules_under_test import NAMES, PAIRED

LAYER = LayerBytes(x=1, residual=10, weight_residual=100, stash=1_000, deferred=10_000, working=7)
PARAMETERS = ParameterBytes(layer=1, ends=5, parameter=2, gradient=30, optimizer=400)


def tables_of(name: str, num_ranks: int, num_microbatches: int, **options) -> Tables:
    made = schedules.make(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    return compile_program(made.program, **options).tables


SIZES = {"layer": LAYER, "parameters": PARAMETERS}
STORE, RECOMPUTE = (
    Execution(overlap=False, split_backward=True, deferred=each) for each in ("store", "recompute")
)
FULL = Execution(overlap=False, split_backward=False, deferred="store")


def terms_of(tables: Tables, num_layers: int, execution: Execution = STORE) -> dict[str, float]:
    sizes = spread_evenly(num_layers, tables.num_stages)
    terms = memory_of(tables, execution, sizes=sizes, **SIZES)
    return {term.name: term.num_bytes for term in terms}


# ---- memory


def test_1f1b_by_hand() -> None:
    # Two ranks of three layers. Slots: 1 received (a cotangent, or an x), 2 of residuals, 1 stash.
    assert terms_of(tables_of("1f1b", 2, 4), 6) == {
        "weights": 3 * 2,  # the shard that a rank has anyway
        "gradients": 3 * 30,
        "optimizer": 3 * 400,
        "ends": 5 * 432,
        "received": (2 + 1 + 2) * 1,
        "residual": 2 * 3 * 10,
        "weight residual": 2 * 3 * 100,
        "stash": 1 * 3 * 1_000,
        "deferred": 0,
        "working": 7,
    }


def test_a_second_copy_takes_weights_and_gradients_but_no_optimizer_state() -> None:
    plain, both = (terms_of(tables_of(name, 4, 8), 8) for name in ("1f1b", "chimera"))
    assert both["weights"] == 2 * plain["weights"]
    assert both["gradients"] == 2 * plain["gradients"]
    assert both["optimizer"] == plain["optimizer"]


def test_uneven_layers_are_held_by_all_and_take_the_room_of_the_largest_stage() -> None:
    terms = terms_of(tables_of("1f1b", 2, 4), 5)
    assert terms["weights"] == (5 + 3) * 2
    assert terms["optimizer"] == 5 * 400
    assert terms["gradients"] == 3 * 30
    assert terms["residual"] == 2 * 3 * 10


def test_deferred_weight_grads_keep_less_if_they_recompute() -> None:
    keeps = tables_of("zb-h1", 4, 8)
    recomputes = tables_of("zb-h1", 4, 8, stash_deferred=False)
    assert terms_of(keeps, 4)["stash"] == keeps.num_slots["stash"] * 1_000 == 4_000
    assert terms_of(keeps, 4)["deferred"] == 0
    terms = terms_of(recomputes, 4, RECOMPUTE)
    assert terms["stash"] == 1_000
    assert terms["deferred"] == recomputes.num_slots["deferred"] * 10_000


@pytest.mark.parametrize(("timetable", "arrays"), [("shortest", 1), ("aligned", 2)])
def test_slots_on_the_host_leave_in_whole_values(timetable: str, arrays: int) -> None:
    """An array for each chunk in a steady phase, one for both in ticks."""
    x = 2**20
    layer = LayerBytes(x=x, residual=x, weight_residual=2 * x, stash=0, deferred=0, working=0)
    tables = tables_of("dualpipe", 4, 16, timetable=timetable)
    slots = tables.num_slots
    assert (slots["residual"], slots["weight_residual"]) == (5, 5)

    def residuals(layer: LayerBytes) -> dict[str, float]:
        execution = replace(STORE, slots_on_device=3)
        terms = memory_of(tables, execution, sizes=(2,) * 4, layer=layer, parameters=PARAMETERS)
        return {term.name: term.num_bytes / x for term in terms if "residual" in term.name}

    # Six values in two layers: at least 2.4 of them leave, where three of five slots stay.
    assert residuals(layer) == {
        "residual": 5 * 2 / 2,
        "weight residual": 5 * 4 / 2,
        "residual on the host": arrays * 5 * 2 / 2,
        "weight residual on the host": arrays * 5 * 4 / 2,
    }
    with pytest.raises(ValueError, match="slots_on_device=3: must be left out"):
        residuals(LAYER)


@pytest.mark.parametrize("name", NAMES)
def test_slots_of_smaller_stages_take_fewer_layers(name: str) -> None:
    tables = tables_of(name, 4, 8)
    terms = terms_of(tables, 16)
    of_stage = 16 // tables.num_stages
    assert terms["weight residual"] == tables.num_slots["weight_residual"] * of_stage * 100
    assert terms["gradients"] == tables.num_chunks * of_stage * 30


# ---- a transformer


def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    return (x * scale).astype(jnp.bfloat16)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def kernel(*arguments: jax.Array, out: tuple) -> list[jax.Array]:
    """Stands for a kernel, in which nobody can look."""
    return jax.pure_callback(lambda *_: None, list(out), *arguments)


@jax.custom_vjp
def fused_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return fused_forward(q, k, v)[0]


def fused_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple:
    log_sum_exp = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    out, scale = kernel(q, k, v, out=(jax.ShapeDtypeStruct(q.shape, q.dtype), log_sum_exp))
    return out, (q, k, v, out, scale)


def fused_backward(kept: tuple, cotangent: jax.Array) -> tuple:
    out = tuple(jax.ShapeDtypeStruct(value.shape, value.dtype) for value in kept[:3])
    return tuple(kernel(*kept, cotangent, out=out))


fused_attention.defvjp(fused_forward, fused_backward)


@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("attention", ["fused", "plain"])
def test_layer_bytes_are_those_of_the_split(attention: str, remat: str) -> None:
    size = {"width": 128, "context": 256, "heads": 8, "microbatch_size": 2}
    B, T, D, H = 2, 256, 128, 8
    attend = fused_attention if attention == "fused" else plain_attention

    def block(params, x, ctx):
        del ctx
        normed = norm(params["norm"], x)
        q, k, v = ((normed @ params[n]).reshape(B, T, H, D // H) for n in "qkv")
        x = x + attend(q, k, v).reshape(B, T, D) @ params["o"]
        hidden = jax.nn.gelu(norm(params["norm2"], x) @ params["up"])
        return x + hidden @ params["down"], Aux()

    shapes = dict.fromkeys("qkvo", (D, D)) | {"up": (D, 4 * D), "down": (4 * D, D)}
    params = {n: jax.ShapeDtypeStruct(s, jnp.bfloat16) for n, s in shapes.items()}
    params |= {n: jax.ShapeDtypeStruct((D,), jnp.float32) for n in ("norm", "norm2")}
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    is_block = remat == "block"
    checked = jax.checkpoint(block) if is_block else block
    split = split_vjp(checked, params, x, None, recomputes=is_block)
    model = Transformer(layers=1, vocabulary=1, attention=attention, remat=remat, **size)
    assert model.layer_parameters == sum(math.prod(p.shape) for p in params.values())
    for name in ("residual", "weight_residual", "stash", "deferred"):
        actual = sum(math.prod(v.shape) * v.dtype.itemsize for v in getattr(split, name))
        # Beside them a scale for each token, and for each query, in float32.
        small = (2 + H) * B * T * 4 + 4 * D * 4
        expected = getattr(model.layer_bytes, name)
        assert expected <= actual <= expected + small, name


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "block"])
@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_memory_is_about_that_of_the_program(name: str, remat: str) -> None:
    P, N, L, T, D, H, V = 2, 8, 8, 128, 64, 2, 64

    def block(params, x, ctx):
        del ctx
        heads = (*x.shape[:-1], H, D // H)
        q, k, v = ((x @ params[n]).reshape(heads) for n in "qkv")
        x = x + plain_attention(q, k, v).reshape(x.shape) @ params["o"]
        return x + jax.nn.gelu(jnp.tanh(x) @ params["up"]) @ params["down"]

    model = dpj.Model(
        embed=lambda ends, ctx: ends["embed"][ctx.microbatch],
        block=block,
        head=lambda ends, x, ctx: jax.nn.logsumexp(x @ ends["head"], axis=-1).mean(),
    )
    mesh = jax.make_mesh((P,), ("pipe",))
    shapes = dict.fromkeys("qkvo", (D, D)) | {"up": (D, 4 * D), "down": (4 * D, D)}

    def aval(shape: tuple[int, ...], *spec: str) -> jax.ShapeDtypeStruct:
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {
        "ends": {"embed": aval((V, D)), "head": aval((D, V))},
        "blocks": {n: aval((L, *shape), "pipe") for n, shape in shapes.items()},
    }
    step = dpj.value_and_grad(
        model,
        mesh=mesh,
        num_microbatches=N,
        schedule=name,
        remat=remat,
        execution=Execution(split_backward=True),
    )
    program = jax.jit(step).lower(params, jax.ShapeDtypeStruct((N, T), jnp.int32)).compile(AS_EVER)
    memory = program.memory_analysis()
    assert memory is not None
    sizes = {"layers": L, "width": D, "context": T, "microbatch_size": 1, "vocabulary": V}
    transformer = Transformer(**sizes, heads=H, attention="plain", remat=remat, activation_bytes=4)
    parameters = ParameterBytes(
        layer=12 * D**2, ends=2 * V * D, parameter=4, gradient=4, optimizer=0
    )
    terms = memory_of(
        tables_of(name, P, N, stash_deferred=remat == "none"),
        STORE if remat == "none" else RECOMPUTE,
        sizes=spread_evenly(L, P),
        layer=transformer.layer_bytes,
        parameters=parameters,
    )
    predicted = sum(term.num_bytes for term in terms)
    actual = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    # The rest is XLA's own beside the buffers, on CPU: gathered layers, results, masks.
    assert 0.9 * predicted <= actual <= 1.8 * predicted


def test_costs_count_multiplications() -> None:
    sizes = {"width": 64, "context": 32, "microbatch_size": 2, "vocabulary": 100, "heads": 1}
    made = Transformer(layers=6, **sizes).costs(num_ranks=3)
    weights, attention = 2 * 32 * 12 * 64**2, 2 * 2 * 32 * 32 * 64
    forward = 2 * (weights + attention)  # of two layers
    assert made.forward == 1
    assert made.input_grad == pytest.approx(2 * (weights + 2 * attention) / forward)
    assert made.weight_grad == pytest.approx(2 * weights / forward)
    assert made.head == pytest.approx(2 * 32 * 64 * 100 / forward)
    assert made.recompute == 0
    again = Transformer(layers=6, remat="block", **sizes).costs(num_ranks=3)
    assert again.input_grad == pytest.approx(1 + made.input_grad)
    assert again.recompute == again.input_grad


# ---- the order


def choices_with(
    schedule: schedules.Schedule,
    costs: Costs,
    *,
    num_layers: int,
    limit: float = math.inf,
    remat: str = "none",
) -> list[Choice]:
    candidate = Candidate(
        schedule=schedule, num_layers=num_layers, remat=remat, costs=costs, transfer=0.1
    )
    terms_of = partial(memory_of, **SIZES)
    return choices_of(candidate, terms_of=terms_of, limit=limit)


def choose(names=NAMES, *, limit: float = math.inf, costs: Costs | None = None) -> list[Choice]:
    choices = []
    for name in names:
        made = schedules.make(name, num_ranks=4, num_microbatches=16)
        choices += choices_with(made, costs or Costs(), num_layers=8, limit=limit)
    return in_order(choices)


def test_the_fastest_comes_first_with_a_run_of_beats_and_without() -> None:
    choices = choose()
    # In order but for the last bits of sums.
    makespans = [float(f"{choice.simulation.makespan:.9g}") for choice in choices]
    assert makespans == sorted(makespans)
    assert (choices[0].schedule, choices[0].execution.overlap) == ("dualpipe", True)
    found = {(c.schedule, c.execution.overlap) for c in choices}
    assert found == {(name, False) for name in NAMES} | {(name, True) for name in PAIRED}
    assert all(choice.fits for choice in choices)


def test_slots_are_those_of_the_program_that_is_timed() -> None:
    """Placed by its costs, a program may have more values on their way."""
    made = schedules.make("dualpipe", num_ranks=4, num_microbatches=16)
    costs = Costs(input_grad=2.08, weight_grad=0.84)
    durations = durations_of(made, costs, transfer=0.1, layers=StageLayers.cut((4,) * 4))
    (choice,) = (
        each
        for each in choices_with(made, costs, num_layers=16)
        if each.execution.overlap and each.execution.split_backward
    )
    placed, plain = (
        compile_program(made.program, timetable="aligned", durations=each).tables
        for each in (durations, None)
    )
    assert placed.num_slots["received"] > plain.num_slots["received"]
    (received,) = (term.num_bytes for term in choice.terms if term.name == "received")
    assert received == terms_of(placed, 16)["received"]


def test_choices_that_do_not_fit_come_last_and_say_which_term() -> None:
    most = max(choice.num_bytes for choice in choose(("1f1b",)))
    choices = choose(limit=most)
    fits = [choice.fits for choice in choices]
    assert fits == sorted(fits, reverse=True)
    *_, gpipe = (c for c in choices if c.schedule == "gpipe")
    assert not gpipe.fits
    assert "too large: most of it is " in gpipe.why
    last = max(gpipe.terms, key=lambda term: term.num_bytes)
    assert last.name in gpipe.why
    assert last.why in gpipe.why


def test_full_backwards_are_chosen_where_they_are_faster_or_smaller() -> None:
    """With four layers a stage; stages of one have none."""

    def kinds(costs: Costs, num_layers: int = 16) -> dict[bool, Choice]:
        made = schedules.make("1f1b", num_ranks=4, num_microbatches=16)
        choices = choices_with(made, costs, num_layers=num_layers)
        return {not choice.execution.split_backward: choice for choice in choices}

    # 16 microbatches and three ranks from end to end: 16 * 3 + 3 * (1 + 1) beside 16 * 3 + 3 * (1 +
    # 2) without transfers; if a full backward costs a tenth less, 16 * 4 + 3 * (1 + 2) beside
    # 16 * 3.7 + 3 * (1 + 2.7).
    cheap_at_once = Costs(input_grad=2, full_backward=2.7)
    even, cheap = kinds(Costs()), kinds(cheap_at_once)
    assert set(even) == {False, True}
    assert even[False].simulation.makespan < even[True].simulation.makespan
    # A slot of a stage's stash, or that of the present layer.
    assert even[False].num_bytes - even[True].num_bytes == 3 * 1_000
    assert set(cheap) == {True}  # the faster in less memory
    expected = simulate(
        schedules.make("1f1b", num_ranks=4, num_microbatches=16),
        costs=cheap_at_once,
        transfer=0.1,
        num_layers=16,
        execution=Execution(split_backward=False),
    )
    assert cheap[True].simulation == expected
    # A full backward of one layer is not divided, and its stash is no larger than a layer's; fused
    # they may cost less.
    one, cheap = (kinds(Costs(input_grad=2, full_backward=b), num_layers=4) for b in (None, 0.5))
    assert set(one) == {False}
    assert set(cheap) == {True}
    # With stages of two layers and of one, some full backwards are divided.
    assert set(kinds(Costs(input_grad=2), num_layers=5)) == {False, True}
    # A deferred weight grad has its stash, where it stores one.
    zb = tables_of("zb-h1", 4, 16, stash_deferred=False, full_backward=True)
    for deferred, num_bytes in (("store", 1_000), ("recompute", 10_000)):
        terms = terms_of(zb, 8, replace(FULL, deferred=deferred))
        assert terms["deferred"] == zb.num_slots["deferred"] * 2 * num_bytes
    # In a steady phase a stage's stash is needed still.
    tables = tables_of("dualpipe", 4, 16, timetable="aligned", full_backward=True)
    assert terms_of(tables, 8, replace(FULL, overlap=True))["stash"] == 2 * 1_000


def test_losses_are_all_that_is_not_work() -> None:
    costs = Costs(forward=1, input_grad=1.5, weight_grad=0.5, embed=0.3, head=0.7)
    for choice in choose(costs=costs):
        made = choice.simulation
        work = 16 * (4 * 3 + 0.3 * 1.5 + 0.7 * 3) / 4
        losses = choice.losses
        assert losses["recomputed"] == pytest.approx(0, abs=1e-12)
        assert sum(losses.values()) == pytest.approx(1 - work / made.makespan)
        assert sum(losses.values()) == pytest.approx(made.idle_share)


def test_deferred_weight_grads_cost_their_recomputation() -> None:
    schedule = schedules.make("zb-h1", num_ranks=4, num_microbatches=8)
    rows = [[str(a) for cell in row for a in cell.unit_actions()] for row in schedule.program.rows]
    num_deferred = sum(
        1
        for row in rows
        for before, action in itertools.pairwise(row)
        if "W" in action and before != action.replace("W", "I")
    )
    assert num_deferred > 0
    made = simulate(schedule, costs=Costs(recompute=2))
    assert sum(made.work) == 4 * 8 * 3 + 2 * num_deferred
    (choice,) = choices_with(schedule, Costs(recompute=2), num_layers=4, limit=0, remat="block")
    assert made.recomputed == choice.simulation.recomputed == pytest.approx(2 * num_deferred / 4)
    makespan = choice.simulation.makespan
    assert choice.losses["recomputed"] == pytest.approx(made.recomputed / makespan)
    # Nothing is deferred here.
    plain = schedules.make("1f1b", num_ranks=4, num_microbatches=8)
    assert simulate(plain, costs=Costs(recompute=2)).work == simulate(plain).work


# ---- mistakes


def test_wrong_sizes_are_all_named() -> None:
    sizes = {"context": 1, "microbatch_size": 1, "vocabulary": 1, "heads": 1}
    with pytest.raises(ValueError, match="layers=0, width=-1: a size must be at least 1"):
        Transformer(layers=0, width=-1, **sizes)
    with pytest.raises(ValueError, match="remat='all': must be one of 'none', 'block'"):
        Transformer(layers=1, width=1, remat="all", **sizes)
    with pytest.raises(ValueError, match="heads=3: must divide width=4"):
        Transformer(layers=1, width=4, **{**sizes, "heads": 3})
    with pytest.raises(ValueError, match="ends=-1, gradient=nan: must be a finite number"):
        ParameterBytes(layer=1, ends=-1, parameter=1, gradient=math.nan, optimizer=1)
