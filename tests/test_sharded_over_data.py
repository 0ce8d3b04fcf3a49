"""Parameters over the batch's axes (FSDP): gathered once a step, their gradients scattered once."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.hlo import Collective, collectives
from tests.models import assert_close, sequential_value_and_grad

VOCABULARY, WIDTH, HIDDEN, ROWS, LENGTH, LAYERS = 8, 4, 6, 2, 3, 4
AXES = {"pipe": 2, "data": 2, "model": 2}
SPECS = {
    "ends": {"table": P("data"), "out": P(None, ("pipe", "data")), "gain": P()},
    "blocks": {
        "up": P("pipe", None, "data"),
        "down": P("pipe", "data"),
        "unused": P("pipe", "data"),
        "index": P("pipe", "data"),
        "gain": P("pipe"),
    },
    "shared": P("data"),
}


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ends["table"][ctx.microbatch] * ends["gain"]


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    assert params["up"].shape == (WIDTH, HIDDEN)  # whole, however it is sharded
    inner = jnp.tanh(x @ params["up"] + ctx.shared) * (1 + params["index"].sum() / 100)
    return x + params["gain"] * (inner @ params["down"])


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    logits = x @ ends["table"].T + x @ ends["out"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[..., None], -1).mean()


MODEL = dpj.Model(embed=embed, block=block, head=head)


def make_params(num_layers: int = LAYERS) -> Any:
    rng = np.random.default_rng(0)
    ends = {"table": (VOCABULARY, WIDTH), "out": (WIDTH, VOCABULARY), "gain": (WIDTH,)}
    blocks = {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH), "unused": (2,), "gain": ()}

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.5)

    return {
        "ends": {name: normal(*shape) for name, shape in ends.items()},
        "blocks": {
            **{name: normal(num_layers, *shape) for name, shape in blocks.items()},
            "index": jnp.arange(2 * num_layers).reshape(num_layers, 2),
        },
        "shared": normal(HIDDEN),
    }


def make_batch(num_microbatches: int) -> jax.Array:
    shape = ROWS * num_microbatches, LENGTH
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, size=shape))


def placed(params: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
        lambda spec, branch: jax.device_put(branch, jax.NamedSharding(mesh, spec)),
        SPECS,
        params,
        is_leaf=lambda leaf: isinstance(leaf, P),
    )


def collectives_of(program: Any) -> list[Collective]:
    """Lists a program's collectives, of which loops may have the pipeline's permutes alone."""
    moved = collectives(str(program.as_text()), AXES)
    in_loops = {(each.kind, each.axes) for each in moved if each.in_loop}
    assert in_loops == {("collective-permute", ("pipe",))}
    return moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "says", "schedule"),
    [
        (AxisType.Auto, "specs", "dualpipe"),
        (AxisType.Explicit, "types", "dualpipev"),
        (AxisType.Explicit, "specs", "1f1b"),
    ],
)
def test_gathered_once_and_scattered_once(kind: AxisType, says: str, schedule: str) -> None:
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), (kind,) * 3)
    params, batch = make_params(), make_batch(8)
    want = sequential_value_and_grad(MODEL, 8)(params, batch)
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=4,
        schedule=schedule,
        batch_axes="data",
        param_specs=SPECS if says == "specs" else None,
    )
    sharded = placed(params, mesh)
    program = jax.jit(grad_fn).lower(sharded, batch).compile()
    got = program(sharded, batch)
    assert_close(got, want)
    moved = collectives_of(program)
    if says == "specs" and kind is AxisType.Explicit:
        # Nothing is asked of where they come from.
        assert_close(jax.jit(grad_fn)(params, batch), want)
    for part in ("ends", "blocks"):
        for name, leaf in sharded[part].items():
            grad = got[1][part][name]
            if leaf.dtype == np.float64:
                assert grad.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), (part, name)

    def sizes(kind: str) -> list[int]:
        return sorted(math.prod(s) for each in moved if each.kind == kind for s in each.shapes)

    # Results in elements: a device's part of two layers, of out, of shared and of the table.
    layers, ends = 2 * WIDTH * HIDDEN, WIDTH * VOCABULARY
    whole, parts = [layers, layers, ends, ends, HIDDEN], [layers // 2, layers // 2, ends // 4]
    integers = 2 * 2
    assert sizes("all-gather") == sorted([*whole, integers])
    # The table and shared are scattered over data, and the parts are summed over pipe.
    assert sizes("reduce-scatter") == sorted([*parts, ends // 2, HIDDEN // 2])
    sums = [s for each in moved if each.kind == "all-reduce" for s in each.shapes]
    assert (LAYERS // 2, WIDTH, HIDDEN) not in sums
    assert (VOCABULARY, WIDTH) not in sums


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "schedule"), [(AxisType.Auto, "dualpipe"), (AxisType.Explicit, "zb-h1")]
)
def test_gradients_alone_are_scattered(kind: AxisType, schedule: str) -> None:
    """ZeRO's second stage: parameters are the same everywhere, gradients are not."""
    mesh = jax.make_mesh(tuple(AXES.values()), tuple(AXES), (kind,) * 3)
    params, batch = make_params(), make_batch(8)
    want = sequential_value_and_grad(MODEL, 8)(params, batch)
    want[1]["blocks"]["unused"] = jnp.zeros_like(params["blocks"]["unused"])
    want[1]["shared"] = jnp.zeros_like(params["shared"])
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=4,
        schedule=schedule,
        batch_axes="data",
        grad_specs={**SPECS, "ends": {**SPECS["ends"], "gain": None}},
        # A frozen parameter has zeros of its size for its gradient.
        trainable={"ends": True, "blocks": True, "shared": False},
    )
    program = jax.jit(grad_fn).lower(params, batch).compile()
    got = program(params, batch)
    assert_close(got, want)
    for part in ("ends", "blocks"):
        for name, spec in SPECS[part].items():
            grad, sharding = got[1][part][name], jax.NamedSharding(mesh, spec)
            if name != "index":
                assert grad.sharding.is_equivalent_to(sharding, grad.ndim), (part, name)

    moved = collectives_of(program)
    assert "all-gather" not in {each.kind for each in moved}
    # A device's part of two layers, of out and of the table, in elements; no whole one is summed.
    layers, ends = 2 * WIDTH * HIDDEN, WIDTH * VOCABULARY
    scattered = [math.prod(s) for e in moved if e.kind == "reduce-scatter" for s in e.shapes]
    assert sorted(scattered) == sorted([layers // 2, layers // 2, ends // 2, ends // 4])
    sums = [s for each in moved if each.kind == "all-reduce" for s in each.shapes]
    assert max(map(math.prod, sums)) == ends // 2  # the table's part, over pipe


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        (P(), ValueError, ["the gradient's spec is", "that of the parameter"]),
        (P(None, "data"), ValueError, ["must be sharded over the axes of its parameter", "['up']"]),
        (P(None, None, "other"), ValueError, ["grad_specs: may name the", "'other' is none of"]),
        (P(None, "data", "data"), ValueError, ["'data' stands twice"]),
        ("data", TypeError, ["grad_specs['blocks']['up'] is str 'data'"]),
    ],
)
def test_gradients_that_lie_over_less_or_elsewhere(spec: P, error: Any, words: list[str]) -> None:
    mesh = jax.make_mesh((1, 2, 2, 2), ("pipe", "data", "model", "other"))
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=2,
        batch_axes="data",
        param_specs=SPECS,
        grad_specs={"ends": None, "blocks": {**SPECS["blocks"], "up": spec}, "shared": None},
    )
    with pytest.raises(error) as caught:
        jax.eval_shape(grad_fn, make_params(), make_batch(4))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("batch_axes", ["data", ("data", "model")])
def test_gradients_over_a_manual_axis(batch_axes: Any) -> None:
    """Over it each device has gradients of its own part, or the same as all: none is scattered."""
    mesh = jax.make_mesh((1, 2, 2), ("pipe", "data", "model"), devices=jax.devices()[:4])
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=2,
        batch_axes=batch_axes,
        manual_axes="model",
        grad_specs={**SPECS, "blocks": {**SPECS["blocks"], "up": P(None, None, "model")}},
    )
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(grad_fn, make_params(), make_batch(8))
    for word in ["['up']", "'model' is one of the manual_axes", "but no manual ones"]:
        assert word in str(caught.value)


@pytest.mark.parametrize("argument", ["param_specs", "grad_specs"])
def test_a_dim_that_lies_over_another_explicit_axis(argument: str) -> None:
    """One that nobody named: the array's type says so."""
    mesh = jax.make_mesh((1, 2, 2), ("pipe", "data", "model"), devices=jax.devices()[:4])
    params = make_params()
    lies = jax.NamedSharding(mesh, P(None, None, "model"))
    params["blocks"]["up"] = jax.device_put(params["blocks"]["up"], lies)
    blocks = {**SPECS["blocks"], "up": P(None, None, "data")}
    specs: dict[str, Any] = {argument: {"ends": None, "blocks": blocks, "shared": None}}
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=2,
        batch_axes="data",
        **specs,
    )
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(grad_fn, params, make_batch(4))
    for word in [
        argument,
        "['up']",
        "dim 2 is sharded over 'model' too",
        "not divisible by 4 devices",
    ]:
        assert word in str(caught.value)


def test_specs_of_leaves_without_a_gradient_are_ignored() -> None:
    """So that one spec may stand for a branch."""
    mesh = jax.make_mesh((1, 2), ("pipe", "data"), devices=jax.devices()[:2])
    params = make_params()
    params["blocks"]["index"] = jnp.zeros((LAYERS, 3), int)
    params["blocks"]["unused"] = jnp.zeros((LAYERS, 5))
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=2,
        batch_axes="data",
        grad_specs={"ends": None, "blocks": {**SPECS["blocks"], "gain": None}, "shared": None},
        trainable={
            "ends": True,
            "blocks": {name: name != "unused" for name in params["blocks"]},
            "shared": True,
        },
    )
    _, grads = jax.eval_shape(grad_fn, params, make_batch(4))
    assert grads["blocks"]["index"].dtype == jax.dtypes.float0
    assert grads["blocks"]["unused"].shape == (LAYERS, 5)


@pytest.mark.slow
def test_layers_that_do_not_divide_and_forwards_alone() -> None:
    """Then blocks are sharded over data alone. A stage has no layers."""
    mesh = jax.make_mesh((2, 2), ("pipe", "data"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    params, batch = make_params(3), make_batch(4)
    options: Any = {"mesh": mesh, "num_microbatches": 2, "batch_axes": "data", "param_specs": SPECS}
    options["layers_per_stage"] = (3, 0)
    want = sequential_value_and_grad(MODEL, 4)(params, batch)
    got = jax.jit(dpj.value_and_grad(MODEL, **options))(params, batch)
    assert_close(got, want)
    assert got[1]["blocks"]["up"].sharding.spec == P(None, None, "data")
    assert_close(jax.jit(dpj.evaluate(MODEL, **options))(params, batch), want[0])


def test_memory_counts_gathered_leaves() -> None:
    mesh = jax.make_mesh((2, 2), ("pipe", "data"), devices=jax.devices()[:4])
    options: Any = {"mesh": mesh, "num_microbatches": 2, "batch_axes": "data"}
    terms = [
        {
            term.name: term.num_bytes
            for term in dpj.value_and_grad(MODEL, param_specs=specs, **options)
            .memory(make_params(), make_batch(4))
            .terms
        }
        for specs in (None, SPECS)
    ]
    layers = 2 * (2 * WIDTH * HIDDEN + 2 + 2)
    ends = 2 * WIDTH * VOCABULARY + HIDDEN
    assert terms[1].pop("parameters gathered from other devices") == 8 * (layers + ends)
    assert terms[0] == terms[1]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (P(("pipe", "data")), ["the layers' dim may be sharded over 'pipe' alone"]),
        (P(None, None, "data", "data"), ["has 4 entries for 3 dims"]),
        (P(None, ("data", "model")), ["'data' must come last in its entry"]),
        (P(None, None, ("model", "data")), ["dim 2 is not divisible by 4 devices"]),
        (P(None, "other"), ["'other' is none of them"]),
    ],
)
def test_refusals(spec: P, words: list[str]) -> None:
    mesh = jax.make_mesh((1, 2, 2, 2), ("pipe", "data", "model", "other"))
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=2,
        batch_axes="data",
        manual_axes="model",
        param_specs={**SPECS, "blocks": {**SPECS["blocks"], "up": spec}},
    )
    with pytest.raises(ValueError) as caught:
        jax.eval_shape(grad_fn, make_params(), make_batch(4))
    for word in ["batch_axes=('data',)", "params['blocks']['up']", *words]:
        assert word in str(caught.value)
