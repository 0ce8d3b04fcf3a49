"""A block's own loss and metrics: in kinds of layers, over other axes, and refused ones.

That they are those of the sequential model, with every schedule and option, is in test_exact.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import dualpipe_jax as dpj
from tests.models import assert_close, make_mesh

WIDTH, ROWS = 3, 2


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ctx.microbatch @ ends


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return jnp.square(x).mean()


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
    """Gives a loss, and metrics of every dtype; those of floats depend on params and x."""
    assert ctx.layer is not None
    inner = jnp.tanh(x @ params)
    metrics = {
        "dead": (inner < 0).sum(0),
        "any": (inner > 0.5).any(),
        "norm": (jnp.square(inner).sum() * (ctx.layer + 1), params.sum()),
        "one": 1,
    }
    return x + inner, dpj.Aux(loss=jnp.square(inner).mean(), metrics=metrics)


MODEL = dpj.Model(embed=embed, block=block, head=head)


def make_params(num_layers: int) -> Any:
    rng = np.random.default_rng(0)
    blocks = jnp.asarray(rng.normal(size=(num_layers, WIDTH, WIDTH)))
    return {"ends": jnp.asarray(rng.normal(size=(WIDTH, WIDTH))), "blocks": blocks}


def make_batch(num_microbatches: int) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(ROWS * num_microbatches, WIDTH)))


def expected(model: dpj.Model, params: Any, batch: Any, num_microbatches: int) -> Any:
    loss_fn = dpj.sequential(model, num_microbatches=num_microbatches)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch)


def test_sequential_is_the_plain_meaning() -> None:
    """Against a Python loop."""
    params, batch = make_params(3), make_batch(2)
    loss = 0.0
    dead, norm = np.zeros((3, WIDTH), int), np.zeros(3)
    for rows in (batch[:ROWS], batch[ROWS:]):
        ctx = dpj.Context(microbatch=rows)
        x = embed(params["ends"], ctx)
        for layer in range(3):
            ctx = dpj.Context(microbatch=rows, layer=jnp.int32(layer))
            x, aux = block(params["blocks"][layer], x, ctx)
            loss += aux.loss / 2
            dead[layer] += aux.metrics["dead"]
            norm[layer] += aux.metrics["norm"][0]
        loss += head(params["ends"], x, ctx) / 2
    got, metrics = dpj.sequential(MODEL, num_microbatches=2)(params, batch)
    np.testing.assert_allclose(got, loss, rtol=1e-13)
    np.testing.assert_array_equal(metrics.blocks["dead"], dead)
    np.testing.assert_allclose(metrics.blocks["norm"][0], norm, rtol=1e-13)


# Kinds of layers: one without metrics, one without a loss, one with neither.
def of_kinds(block_of_other: Any) -> dict[str, Any]:
    def counting(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
        inner = jnp.tanh(x @ params)
        return x + inner, dpj.Aux(metrics=(inner > 0).sum())

    def losing(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
        return x + jnp.tanh(x @ params), dpj.Aux(loss=jnp.square(x @ params).mean())

    return {"counting": counting, "losing": losing, "plain": block_of_other}


@pytest.mark.slow
@pytest.mark.parametrize("num_repeats", [1, 3])
def test_kinds(num_repeats: int) -> None:
    """Stages unlike each other; with many changes of kind, `sequential` switches."""
    layout = ("plain", "counting", "counting", "losing", "counting") * num_repeats
    model = dpj.Model(
        embed=embed,
        block=of_kinds(lambda params, x, ctx: x * params[0]),
        head=lambda ends, x, ctx: (head(ends, x, ctx), {"rows": len(x)}),
        has_aux=True,
        layout=layout,
    )
    stack = make_params(15)["blocks"]
    blocks = {kind: stack[: layout.count(kind)] for kind in set(layout)}
    params, batch = {**make_params(1), "blocks": blocks}, make_batch(4)
    want = expected(model, params, batch, 4)
    grad_fn = dpj.value_and_grad(model, mesh=make_mesh(2), num_microbatches=4)
    assert_close(jax.jit(grad_fn)(params, batch), want)
    evaluate = dpj.evaluate(model, mesh=make_mesh(2), num_microbatches=4)
    assert_close(jax.jit(evaluate)(params, batch), want[0])
    (_, metrics), _ = want
    assert metrics.head == {"rows": 8}
    assert metrics.blocks.keys() == {"counting"}
    assert metrics.blocks["counting"].shape == (3 * num_repeats,)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_batch_axes(kind: Any) -> None:
    mesh = jax.make_mesh((2, 2), ("pipe", "data"), (kind,) * 2, devices=jax.devices()[:4])
    params, batch = make_params(4), make_batch(4)
    want, want_grads = expected(MODEL, params, batch, 4)
    options = {"mesh": mesh, "num_microbatches": 2, "batch_axes": "data"}
    evaluate = jax.jit(dpj.evaluate(MODEL, **options))
    got = evaluate(params, batch)
    assert_close(got, want)
    assert got[1].blocks["dead"].sharding.spec[0] == "pipe"
    if kind is jax.sharding.AxisType.Explicit:
        grad_fn = dpj.value_and_grad(MODEL, **options)
        assert_close(jax.jit(grad_fn)(params, batch), (want, want_grads))


def test_experts_over_a_manual_axis() -> None:
    """Each device has its own rows, and an expert whose load it learns from all."""

    def load(params: Any, x: jax.Array) -> jax.Array:
        return jax.nn.one_hot((x @ params).argmax(-1), WIDTH, dtype=int).sum(0)

    def block_of(sum_over: Any) -> Any:
        def block(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
            loads = load(params, x)
            mean = sum_over(jax.nn.softmax(x @ params).sum(0))
            return x + jnp.tanh(x @ params) * mean, dpj.Aux(metrics={"load": loads})

        return block

    params, batch = make_params(2), make_batch(8)
    model = dpj.Model(embed=embed, block=block_of(lambda p: lax.psum(p, "expert")), head=head)
    plain = dpj.Model(embed=embed, block=block_of(lambda p: p), head=head)
    options = {"mesh": make_mesh(2, expert=2), "num_microbatches": 4}
    grad_fn = dpj.value_and_grad(
        model, **options, batch_axes="expert", manual_axes="expert", schedule="1f1b"
    )
    # Microbatch m of the sequential model holds those of both devices.
    halves = batch.reshape(2, 4, ROWS, WIDTH).swapaxes(0, 1).reshape(batch.shape)
    (want, metrics), grads = expected(plain, params, halves, 4)
    (got, got_metrics), got_grads = jax.jit(grad_fn)(params, batch)
    assert_close(got_metrics, metrics)
    assert metrics.blocks["load"].sum() == 2 * len(batch)
    assert_close(got, want)
    assert_close(got_grads, grads)


def test_a_scalar_beside_x_is_a_loss() -> None:
    """As `Aux(loss=...)`; metrics without leaves are none."""
    params, batch = make_params(2), make_batch(2)

    def loss_of(block: Any, **more: Any) -> Any:
        model = dpj.Model(embed=embed, block=block, head=head, **more)
        return dpj.sequential(model, num_microbatches=2)(params, batch)

    def parts(params: Any, x: jax.Array) -> Any:
        return x + x @ params, jnp.square(x).mean()

    plain = loss_of(lambda params, x, ctx: parts(params, x), block_has_aux=True)
    y_and_aux = lambda params, x, ctx: (  # noqa: E731
        parts(params, x)[0],
        dpj.Aux(loss=parts(params, x)[1], metrics={}),
    )
    assert loss_of(y_and_aux) == plain
    assert loss_of(y_and_aux, block_has_aux=True) == plain
    assert loss_of(lambda params, x, ctx: parts(params, x)[0]) < plain


def test_metrics_have_no_gradient() -> None:
    """Metrics without a finite gradient do no harm."""

    def rooted(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
        return x + x @ params, dpj.Aux(metrics=jnp.sqrt((x * 0).sum() + (params * 0).sum()))

    model = dpj.Model(embed=embed, block=rooted, head=head)
    params, batch = make_params(2), make_batch(2)
    want = expected(model, params, batch, 2)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(want))
    grad_fn = dpj.value_and_grad(model, mesh=make_mesh(2), num_microbatches=2, schedule="gpipe")
    assert_close(jax.jit(grad_fn)(params, batch), want)


def test_memory_counts_the_sums() -> None:
    grad_fn = dpj.value_and_grad(MODEL, mesh=make_mesh(2), num_microbatches=4)
    report = grad_fn.memory(make_params(6), make_batch(4))
    sums = {term.name: term.num_bytes for term in report.terms}["metrics added up, of layers"]
    # The metrics of three layers in two chunks: dead, any, norm and one.
    assert sums == 2 * 3 * (8 * WIDTH + 4 + 2 * 8 + 8)


BAD = {
    "loss not a scalar": (
        lambda p, x, c: (x, dpj.Aux(loss=x)),
        ValueError,
        ["model.block", "aux loss", "scalar", "float64[2,3]", "reduce"],
    ),
    "loss an integer": (
        lambda p, x, c: (x, dpj.Aux(loss=jnp.int32(0))),
        ValueError,
        ["model.block", "aux loss", "floating-point", "int32[]"],
    ),
    "loss a tree": (
        lambda p, x, c: (x, dpj.Aux(loss={"z": x.sum()})),
        TypeError,
        ["model.block", "Aux.loss", "scalar or None", "dict"],
    ),
    "metrics not arrays": (
        lambda p, x, c: (x, dpj.Aux(metrics={"name": "abc", "fine": 1, "other": "d"})),
        TypeError,
        ["model.block", "Aux.metrics['name'] is str 'abc'", "Aux.metrics['other'] is str 'd'"],
    ),
    "metrics not numbers": (
        lambda p, x, c: (x, dpj.Aux(metrics=[jax.random.key(0), 1])),
        TypeError,
        ["model.block", "numbers or bools", "Aux.metrics[0] is key<fry>[]"],
    ),
    "x changes beside an Aux": (
        lambda p, x, c: (x[0], dpj.Aux()),
        ValueError,
        ["model.block", "shape or dtype of x", "float64[2,3]", "float64[3]"],
    ),
    "an Aux and no x": (
        lambda p, x, c: dpj.Aux(),
        ValueError,
        ["model.block", "structure of x"],
    ),
}


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_refusals(bad: str) -> None:
    block, error, words = BAD[bad]
    model = dpj.Model(embed=embed, block=block, head=head)
    params, batch = make_params(2), make_batch(2)
    for function in (
        dpj.value_and_grad(model, mesh=make_mesh(2), num_microbatches=2),
        dpj.evaluate(model, mesh=make_mesh(2), num_microbatches=2),
        dpj.sequential(model, num_microbatches=2),
    ):
        with pytest.raises(error) as caught:
            jax.eval_shape(function, params, batch)
        for word in words:
            assert word in str(caught.value)


def test_metrics_that_differ_over_a_manual_axis_are_refused() -> None:
    def block(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
        return x, dpj.Aux(metrics={"index": lax.axis_index("model")})

    model = dpj.Model(embed=embed, block=block, head=head)
    evaluate = dpj.evaluate(
        model, mesh=make_mesh(2, model=2), num_microbatches=2, manual_axes="model"
    )
    with pytest.raises(ValueError, match=r"model.block: metrics\['index'\] varies over 'model'"):
        jax.eval_shape(evaluate, make_params(2), make_batch(2))
