"""Parameters that their gradients overwrite: the largest new value counts, whoever gives it."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import fp8_ops
from jax import P
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.jaxprs import loops
from tests.models import assert_close, make_mesh

WIDTH, ROWS, LAYERS, NUM_MICROBATCHES = 4, 2, 4, 4


@jax.custom_vjp
def seen(x: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """Gives x as it is, and as new values minus the largest x and the largest cotangent."""
    return x


def _seen_backward(kept: tuple[jax.Array, jax.Array], dx: jax.Array) -> Any:
    x, high = kept
    # Below zero, so that a zero that nobody gave would show.
    return dx, -jnp.max(jnp.abs(x)), high.at[0].set(-jnp.max(jnp.abs(dx)) - 1)


seen.defvjp(lambda x, low, high: (x, (x, high)), _seen_backward)


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return seen(ctx.microbatch @ ends["in"], ends["embed_low"], ends["embed_high"])


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return x + jnp.tanh(seen(x @ params["w"], params["low"], params["high"]))


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return jnp.square(seen(x, ends["head_low"], ends["head_high"]) @ ends["in"].T).mean()


MODEL = dpj.Model(embed=embed, block=block, head=head)
NAMES = {"low", "high", "embed_low", "embed_high", "head_low", "head_high"}


def overwrite(params: Any) -> Any:
    return {part: {name: name in NAMES for name in tree} for part, tree in params.items()}


def make_params(num_layers: int = LAYERS) -> Any:
    rng = np.random.default_rng(0)
    ends = {name: jnp.zeros(()) for name in NAMES if "low" in name and "_" in name}
    ends |= {name: jnp.full(3, -7.0) for name in NAMES if "high" in name and "_" in name}
    return {
        "ends": {"in": jnp.asarray(rng.normal(size=(3, WIDTH))), **ends},
        "blocks": {
            "w": jnp.asarray(rng.normal(size=(num_layers, WIDTH, WIDTH))),
            "low": jnp.zeros(num_layers),
            "high": jnp.full((num_layers, 3), -7.0),
        },
    }


def make_batch(num_microbatches: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(ROWS * num_microbatches, 3)))


def sequential(model: dpj.Model, num_microbatches: int, **options: Any) -> Any:
    return jax.jit(
        jax.value_and_grad(
            dpj.sequential(model, num_microbatches=num_microbatches, **options), allow_int=True
        )
    )


def test_sequential_takes_the_largest() -> None:
    """Against a loop over microbatches, one of which alone gives each its new values."""
    params, batch = make_params(), make_batch(NUM_MICROBATCHES)
    _, got = sequential(MODEL, NUM_MICROBATCHES, overwrite=overwrite)(params, batch)
    each = [
        jax.grad(
            lambda params, rows=rows: (
                dpj.sequential(MODEL, num_microbatches=1)(params, rows) / NUM_MICROBATCHES
            )
        )(params)
        for rows in batch.reshape(NUM_MICROBATCHES, ROWS, 3)
    ]
    want = jax.tree.map(
        lambda flag, *values: jnp.stack(values).max(0) if flag else sum(values),
        overwrite(params),
        *each,
    )
    assert_close(got, want)
    assert (got["blocks"]["low"] < 0).all()
    assert got["blocks"]["high"].shape == (LAYERS, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "overlap", "layers", "axes", "kind"),
    [
        ("dualpipe", True, (3, 1), {"pipe": 2}, AxisType.Auto),
        ("dualpipe", None, (3, 0), {"pipe": 2, "data": 2}, AxisType.Explicit),
        ("dualpipev", None, (1, 1, 1, 1), {"pipe": 2, "data": 2}, AxisType.Auto),
        ("1f1b", None, (2, 2), {"pipe": 2, "data": 2}, AxisType.Explicit),  # by name, too
        ("zb-h1", None, (2, 0, 2, 1), {"pipe": 4}, AxisType.Auto),
    ],
)
def test_equals_sequential(
    schedule: str, overlap: Any, layers: tuple[int, ...], axes: dict[str, int], kind: AxisType
) -> None:
    num_shards = axes.get("data", 1)
    num_microbatches = 8 if overlap else NUM_MICROBATCHES
    params, batch = make_params(sum(layers)), make_batch(num_microbatches * num_shards)
    mesh = jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        (kind,) * len(axes),
        devices=jax.devices()[: int(np.prod(list(axes.values())))],
    )
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=num_microbatches,
        schedule=schedule,
        execution=dpj.Execution(
            overlap=overlap,
            split_backward=schedule not in ("dualpipev", "1f1b"),
        ),
        layers_per_stage=layers,
        remat="block" if schedule == "zb-h1" else "none",
        batch_axes="data" if num_shards > 1 else (),
        manual_axes="data" if schedule == "1f1b" else (),
        overwrite=overwrite,
    )
    want = sequential(MODEL, num_microbatches * num_shards, overwrite=overwrite)(params, batch)
    assert_close(jax.jit(grad_fn)(params, batch), want)


@pytest.mark.slow
def test_neither_scaled_nor_cast_and_where_it_lies() -> None:
    """With a loss scale that is for gradients, a grad_dtype, and leaves over the batch's axis."""
    params, batch = make_params(), make_batch(8)
    mesh = make_mesh(2, data=2)
    params["blocks"]["high"] = jnp.full((LAYERS, 4), -7.0)
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=mesh,
        num_microbatches=NUM_MICROBATCHES,
        batch_axes="data",
        grad_dtype=jnp.float32,
        overwrite=overwrite,
        param_specs={
            "ends": P(),
            "blocks": {"w": P("pipe"), "low": P(), "high": P("pipe", "data")},
        },
    )
    loss, got = jax.jit(grad_fn)(params, batch)
    want_loss, want = sequential(MODEL, 8, overwrite=overwrite)(params, batch)
    dtypes = jax.tree.map(lambda flag: np.float64 if flag else np.float32, overwrite(params))
    want = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), want, dtypes)
    assert_close((loss, got), (want_loss, want), tolerance=1e-7)
    assert got["blocks"]["high"].sharding.spec == P("pipe", "data")
    _, scaled = jax.jit(functools.partial(grad_fn, loss_scale=1024.0))(params, batch)
    assert_close(scaled["blocks"]["w"], want["blocks"]["w"], tolerance=1e-6)
    assert_close(scaled["blocks"]["low"], want["blocks"]["low"])


@pytest.mark.slow
def test_frozen_leaves_overwrite_themselves() -> None:
    """Zeros, the gradient of a frozen leaf, would be its next value."""
    params, batch = make_params(), make_batch(NUM_MICROBATCHES)
    params["blocks"]["high"] = jnp.full((LAYERS, 4), -7.0)
    trainable = {"ends": True, "blocks": {"w": True, "low": True, "high": False}}
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=make_mesh(2),
        num_microbatches=NUM_MICROBATCHES,
        overwrite=overwrite,
        trainable=trainable,
    )
    _, got = jax.jit(grad_fn)(params, batch)
    _, want = sequential(MODEL, NUM_MICROBATCHES, overwrite=overwrite)(params, batch)
    want["blocks"]["high"] = params["blocks"]["high"]
    assert_close(got, want)


# --- float8 of Flax --------------------------------------------------------------------------


def make_float8_model(op: Any) -> tuple[dpj.Model, Any]:
    layer: Any = nn.Dense(WIDTH, dot_general_cls=functools.partial(op, amax_history_length=3))
    out: Any = nn.Dense(1, dot_general_cls=functools.partial(op, amax_history_length=3))

    def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return jnp.square(out.apply(ends["out"], x) - 1).mean()

    model = dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch @ ends["in"],
        block=lambda params, x, ctx: x + jnp.tanh(layer.apply(params, x)),
        head=head,
    )
    keys, x = jax.random.split(jax.random.key(0), LAYERS + 2), jnp.ones((1, WIDTH), jnp.float32)
    params = {
        "ends": {
            "in": jax.random.normal(keys[0], (3, WIDTH), jnp.float32),
            "out": out.init(keys[1], x),
        },
        "blocks": jax.vmap(lambda key: layer.init(key, x))(keys[2:]),
    }
    return model, params


OPS = {"direct": fp8_ops.Fp8DirectDotGeneralOp, "quantise and back": fp8_ops.Fp8DotGeneralOp}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp is deprecated")
@pytest.mark.parametrize("name", OPS)
def test_float8_of_flax_through_three_steps(name: str) -> None:
    """Scales, histories and gradients as the sequential model's, step after step."""
    model, params = make_float8_model(OPS[name])
    names = [
        fp8_ops.OVERWRITE_WITH_GRADIENT in str(p) for p, _ in jax.tree.leaves_with_path(params)
    ]
    assert sum(names) == 2 * 6
    batches = [make_batch(8).astype(jnp.float32) * scale for scale in (1, 3, 2)]
    grad_fn = dpj.value_and_grad(
        model, mesh=make_mesh(2, data=2), num_microbatches=4, batch_axes="data"
    )
    flags = jax.tree.unflatten(jax.tree.structure(params), names)

    def train(grad_fn: Any, params: Any) -> list[Any]:
        def update(flag: bool, leaf: jax.Array, grad: jax.Array) -> jax.Array:
            return grad if flag else leaf - 0.1 * grad

        @jax.jit
        def step(params: Any, batch: jax.Array) -> Any:
            loss, grads = grad_fn(params, batch)
            return loss, grads, jax.tree.map(update, flags, params, grads)

        seen = []
        for batch in batches:
            loss, grads, params = step(params, batch)
            seen.append((loss, grads))
        return seen

    want = train(jax.value_and_grad(dpj.sequential(model, num_microbatches=8)), params)
    got = train(grad_fn, params)
    for each, expected in zip(got, want, strict=True):
        # float32 rounds at other points in either program, to 1 in 10^7 each time.
        assert_close(each, expected, tolerance=1e-5)
    history = want[-1][1]["blocks"][fp8_ops.OVERWRITE_WITH_GRADIENT]
    assert len(np.unique(np.asarray(jax.tree.leaves(history)[0]))) > LAYERS


def test_float8_lies_in_slots_as_float8() -> None:
    """The operands of a matmul, kept for its backward: in bytes, a quarter of float32."""
    model, params = make_float8_model(fp8_ops.Fp8DirectDotGeneralOp)
    grad_fn = dpj.value_and_grad(model, mesh=make_mesh(2), num_microbatches=4)
    (scan,) = loops(jax.make_jaxpr(grad_fn)(params, make_batch(4).astype(jnp.float32)).jaxpr)
    kept = [var.aval for var in scan.invars if var.aval.dtype == jnp.float8_e4m3fn]
    # [slot, rows, width] for each of two layers a stage
    assert [aval.shape[1:] for aval in kept] == [(ROWS, WIDTH)] * 2


# --- refusals --------------------------------------------------------------------------------


def used_twice(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    x = seen(x @ params["w"], params["low"], params["high"])
    return seen(x, params["low"], params["high"])


def used_at_both_ends(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return seen(x, ends["embed_low"], ends["head_high"]).mean()


@pytest.mark.parametrize(
    ("model", "mask", "message"),
    [
        (
            dpj.Model(embed=embed, block=used_twice, head=head),
            overwrite,
            r"\['blocks'\]\['low'\] is used more than once",
        ),
        (
            dpj.Model(embed=embed, block=block, head=used_at_both_ends),
            overwrite,
            r"params\['ends'\]\['embed_low'\] is used more than once",
        ),
        (MODEL, {"ends": False}, "overwrite: must have the keys of params"),
        (MODEL, {"ends": False, "blocks": 1}, r"overwrite\['blocks'\]\['high'\] is int 1"),
    ],
)
def test_refusals(model: dpj.Model, mask: Any, message: str) -> None:
    grad_fn = dpj.value_and_grad(model, mesh=make_mesh(2), num_microbatches=2, overwrite=mask)
    with pytest.raises((ValueError, TypeError), match=message):
        jax.eval_shape(grad_fn, make_params(2), make_batch(2))


def test_shared_and_complex_parameters_are_refused() -> None:
    params = {**make_params(2), "shared": jnp.zeros(2)}
    params["ends"]["in"] = params["ends"]["in"].astype(complex)
    grad_fn = dpj.value_and_grad(MODEL, mesh=make_mesh(2), num_microbatches=2, overwrite=True)
    with pytest.raises(
        ValueError, match=r"new values is kept(.|\n)*\['ends'\]\['in'\](.|\n)*shared"
    ):
        jax.eval_shape(grad_fn, params, make_batch(2))
