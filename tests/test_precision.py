"""bfloat16: values are computed and sent in it, and none are added up in it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from tests.jaxprs import loops
from tests.models import assert_close, make_mesh, sequential_value_and_grad

WIDTH, HIDDEN, LAYERS, ROWS, NUM_MICROBATCHES = 8, 12, 4, 4, 8
BF16, F32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    up, down = (params[name].astype(BF16) for name in ("up", "down"))
    return x + jnp.tanh(x @ up) @ down


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return jnp.square(x @ ends["out"].astype(BF16)).astype(F32).mean()


MODEL = dpj.Model(
    embed=lambda ends, ctx: ctx.microbatch.astype(BF16) @ ends["in"].astype(BF16),
    block=block,
    head=head,
)


def make_params(dtype: Any = F32) -> Any:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / 3, dtype)

    return {
        "ends": {"in": normal(3, WIDTH), "out": normal(WIDTH, 5)},
        "blocks": {"up": normal(LAYERS, WIDTH, HIDDEN), "down": normal(LAYERS, HIDDEN, WIDTH)},
    }


def make_batch(num_microbatches: int) -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(ROWS * num_microbatches, 3)), F32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_sums_are_carried_in_float32(dtype: Any, overlap: bool) -> None:
    """And x and its residuals in slots in bfloat16, whatever the parameters are."""
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=make_mesh(2),
        num_microbatches=NUM_MICROBATCHES,
        execution=dpj.Execution(overlap=overlap),
    )
    params, batch = make_params(dtype), make_batch(NUM_MICROBATCHES)
    jaxpr = jax.make_jaxpr(grad_fn)(params, batch)
    # Two layers a stage, two stages a rank.
    want = dict.fromkeys([(WIDTH, HIDDEN), (HIDDEN, WIDTH)], 4) | dict.fromkeys(
        [(3, WIDTH), (WIDTH, 5)], 1
    )
    found = loops(jaxpr.jaxpr)
    assert len(found) == (2 if overlap is True else 1)
    for scan in found:
        # The loop's carry comes in and out alike; only the carry does with these shapes.
        outs = [var.aval for var in scan.outvars]
        carried = [aval for aval in outs if aval in [var.aval for var in scan.invars]]
        sums = [aval for aval in carried if aval.shape in want]
        assert {aval.dtype for aval in sums} == {F32}
        assert {shape: sum(a.shape == shape for a in sums) for shape in want} == want
        assert BF16 in {aval.dtype for aval in carried if aval.shape[-2:] == (ROWS, WIDTH)}
        body = str(scan.params["jaxpr"])
        permuted = re.findall(r":(\w+)\[[\d,]*\] = ppermute", body)
        assert permuted
        assert set(permuted) == {"bf16"}
        # Weights are cast before the loop: in it no array of their size leaves float32.
        assert not re.findall(rf":bf16\[{WIDTH},{HIDDEN}\] = convert_element_type", body)


@pytest.mark.slow
def test_float32_weights_computed_with_in_bfloat16() -> None:
    """As the sequential model with the same casts, over two shards of the data."""
    params, batch = make_params(), make_batch(NUM_MICROBATCHES)
    grad_fn = dpj.value_and_grad(
        MODEL,
        mesh=make_mesh(2, data=2),
        num_microbatches=NUM_MICROBATCHES // 2,
        batch_axes="data",
    )
    program = jax.jit(grad_fn).lower(params, batch).compile()
    got = program(params, batch)
    want = sequential_value_and_grad(MODEL, NUM_MICROBATCHES)(params, batch)
    # A gradient is rounded to bfloat16 for each microbatch: to 1 in 256, at other points in either
    # program, where XLA keeps more than it must.
    assert_close(got, want, tolerance=1 / 256)
    sums = re.findall(r" = (.*) all-reduce\(", str(program.as_text()))
    assert sums
    assert not [each for each in sums if "bf16" in each]


def test_a_sum_of_bfloat16_gradients_is_not_rounded_on_the_way() -> None:
    """A thousand microbatches that say the same: in bfloat16 a sum of them stops growing at 512."""
    count, params = 1024, make_params(BF16)
    batch = jnp.tile(make_batch(1), (count, 1))
    options: dict[str, Any] = {"mesh": make_mesh(2), "grad_dtype": F32}
    one = dpj.value_and_grad(MODEL, num_microbatches=1, **options)
    many = dpj.value_and_grad(MODEL, num_microbatches=count, **options)
    _, want = jax.jit(one)(params, make_batch(1))
    _, got = jax.jit(many)(params, batch)
    # Each of the thousand is rounded to 1 in 256 in a few places, but not their sum.
    assert_close(got, want, tolerance=1 / 64)


@pytest.mark.parametrize("dtype", [BF16, jnp.dtype(jnp.float64)], ids=str)
def test_strict_promotion_is_kept_to(dtype: Any) -> None:
    """A user's own functions may then mix no dtypes, and neither does the step."""
    params, batch = make_params(dtype), make_batch(NUM_MICROBATCHES)

    def run(promotion: str) -> Any:
        with jax.numpy_dtype_promotion(promotion):
            grad_fn = dpj.value_and_grad(MODEL, mesh=make_mesh(2), num_microbatches=8)
            return grad_fn(params, batch)

    assert_close(run("strict"), run("standard"), tolerance=0)


def test_aux_losses_of_unlike_dtypes_are_added_under_strict_promotion() -> None:
    def block_of(dtype: Any) -> Any:
        return lambda layer, x, ctx: (x @ layer, jnp.square(x).mean().astype(dtype))

    model = dpj.Model(
        embed=lambda ends, ctx: ctx.microbatch * ends,
        block={"narrow": block_of(jnp.bfloat16), "wide": block_of(jnp.float32)},
        head=lambda ends, x, ctx: (x * ends).mean(),
        block_has_aux=True,
        layout=("narrow", "wide"),
    )
    layer = jnp.ones((1, 3, 3), jnp.float32)
    params = {"ends": jnp.ones(3, jnp.float32), "blocks": {"narrow": layer, "wide": layer}}
    batch = jnp.ones((4, 3), jnp.float32)
    mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
    with jax.numpy_dtype_promotion("strict"):
        plain = jax.eval_shape(dpj.sequential(model, num_microbatches=2), params, batch)
        step = dpj.value_and_grad(model, mesh=mesh, num_microbatches=2)
        loss, _ = jax.eval_shape(step, params, batch)
    assert loss.dtype == plain.dtype == jnp.float32
