"""Sizes of four mesh axes, every two that eight devices allow, each axis used its own way.

Layers over pipe, rows over data and expert, experts over expert by all-to-alls of the block's own,
hidden dims over model by annotations. All in float64.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.hlo import collectives
from tests.models import assert_close, sequential_value_and_grad
from tests.pairwise import cover

WIDTH, HIDDEN, EXPERTS, VOCABULARY = 3, 8, 8, 5
NUM_MICROBATCHES, ROWS = 2, 16
AXES = "pipe", "data", "expert", "model"
CASES = cover(
    dict.fromkeys(AXES, (1, 2, 4, 8)) | {"pipe": (1, 2, 3, 4, 8)},
    rules=[lambda pipe, data, expert, model: pipe * data * expert * model <= 8],
)


def block(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
    """Token t of a row goes to expert t, wherever it is, and comes back: `[rows, t, width]`."""
    gates = jax.nn.softmax(x @ params["router"])  # [rows, token, expert]
    sent = lax.all_to_all(x, "expert", split_axis=1, concat_axis=0, tiled=True)
    inner = jnp.tanh(jnp.einsum("rtw,twh->rth", sent, params["up"]))
    inner = lax.with_sharding_constraint(inner, P(None, None, "model"))
    out = jnp.einsum("rth,thw->rtw", inner, params["down"])
    out = lax.all_to_all(out, "expert", split_axis=0, concat_axis=1, tiled=True)
    chosen = jnp.diagonal(gates, axis1=1, axis2=2)[..., None]
    return x + params["scale"] * out * chosen, dpj.Aux(loss=jnp.square(gates).mean())


def plain_block(params: Any, x: jax.Array, ctx: dpj.Context) -> tuple[jax.Array, dpj.Aux]:
    gates = jax.nn.softmax(x @ params["router"])
    inner = jnp.tanh(jnp.einsum("rtw,twh->rth", x, params["up"]))
    out = jnp.einsum("rth,thw->rtw", inner, params["down"])
    chosen = jnp.diagonal(gates, axis1=1, axis2=2)[..., None]
    return x + params["scale"] * out * chosen, dpj.Aux(loss=jnp.square(gates).mean())


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ends["table"][ctx.microbatch]


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    logits = jnp.tanh(x) @ ends["table"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), ctx.microbatch[..., None], -1).mean()


def make_params(num_layers: int) -> Any:
    rng = np.random.default_rng(6)
    shapes = {
        "router": (WIDTH, EXPERTS),
        "scale": (WIDTH,),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.5)

    return {
        "ends": {"table": normal(VOCABULARY, WIDTH)},
        "blocks": {name: normal(num_layers, *shape) for name, shape in shapes.items()},
    }


def make_batch() -> jax.Array:
    return jnp.asarray(np.random.default_rng(7).integers(0, VOCABULARY, size=(ROWS, EXPERTS)))


# The specs of everything between steps: parameters, and the optimizer's state like them.
LIES = {
    "ends": {"table": P()},
    "blocks": {
        "router": P("pipe"),
        "scale": P("pipe"),
        "up": P("pipe", "expert", None, "model"),
        "down": P("pipe", "expert", "model"),
    },
}
MANUAL = {
    "ends": P(),
    "blocks": {
        "router": P(),
        "scale": P(),
        "up": P(None, "expert"),
        "down": P(None, "expert"),
    },
}


@functools.cache
def want(num_layers: int) -> Any:
    """Loss and gradients do not depend on how the rows are cut: all is a mean over them."""
    model = dpj.Model(embed=embed, block=plain_block, head=head)
    return sequential_value_and_grad(model, NUM_MICROBATCHES)(make_params(num_layers), make_batch())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_every_size(case: dict[str, int]) -> None:
    sizes = tuple(case.values())
    num_ranks, *_ = sizes
    kind = AxisType.Auto if sum(sizes) % 2 else AxisType.Explicit
    mesh = jax.make_mesh(
        sizes, AXES, axis_types=(kind,) * 4, devices=jax.devices()[: math.prod(sizes)]
    )
    num_layers = max(num_ranks, 2)
    params, batch = make_params(num_layers), make_batch()
    params = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, jax.NamedSharding(mesh, spec)), params, LIES
    )
    batch = jax.device_put(batch, jax.NamedSharding(mesh, P(("data", "expert"))))
    grad_fn = dpj.value_and_grad(
        dpj.Model(embed=embed, block=block, head=head),
        mesh=mesh,
        num_microbatches=NUM_MICROBATCHES,
        batch_axes=("data", "expert"),
        manual_axes="expert",
        param_specs=MANUAL,
    )
    program = jax.jit(grad_fn).lower(params, batch).compile()
    loss, grads = program(params, batch)
    assert_close((loss, grads), want(num_layers))
    assert grads["blocks"]["up"].sharding.is_equivalent_to(params["blocks"]["up"].sharding, 4)

    moved = collectives(str(program.as_text()), dict(zip(AXES, sizes, strict=True)))
    # In the loop go activations, each along the axis that is for it: no gradient is summed there.
    in_loop = {(each.kind, each.axes) for each in moved if each.in_loop}
    assert in_loop == {
        (kind, (axis,))
        for kind, axis, size in zip(
            ("collective-permute", "all-to-all", "all-reduce"),
            ("pipe", "expert", "model"),
            (num_ranks, sizes[2], sizes[3]),
            strict=True,
        )
        if size > 1
    }
    rows = ROWS // NUM_MICROBATCHES // sizes[1]  # of a microbatch, over the axis of experts
    activation = (
        sorted([rows // sizes[2], EXPERTS, WIDTH]),
        sorted([rows, EXPERTS // sizes[2], WIDTH]),
    )
    for each in moved:
        if each.in_loop and each.kind == "all-reduce":
            assert all(sorted(shape) in activation for shape in each.shapes), each
    # After it each gradient is summed once, in parts as it is sharded; nothing is gathered.
    after = [each for each in moved if not each.in_loop]
    assert {each.kind for each in after} <= {"collective-permute", "all-reduce"}
    sums = [shape for each in after if each.kind == "all-reduce" for shape in each.shapes]
    local = num_layers // num_ranks
    table, router = (VOCABULARY, WIDTH), (local, WIDTH, EXPERTS)
    up = local, EXPERTS // sizes[2], WIDTH, HIDDEN // sizes[3]
    assert sums.count(table) == (math.prod(sizes[:3]) > 1)
    assert sums.count(router) == (math.prod(sizes[1:3]) > 1)
    assert sums.count(up) == (sizes[1] > 1)
