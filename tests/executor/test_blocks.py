"""Blocks that hold programs of their own, run by the executor: exact in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

import dualpipe_jax as dpj
from tests.hlo import AS_EVER
from tests.models import (
    WIDTH,
    assert_close,
    make_batch,
    make_model,
    make_params,
    sequential_value_and_grad,
)
from tests.split_vjp.blocks import fused


def make_mesh(**sizes: int) -> jax.sharding.Mesh:
    num_devices = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=jax.devices()[:num_devices],
    )


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng([7, *shape]).normal(size=shape) / 2)


def with_block(block: Any, blocks: Any) -> tuple[dpj.Model, Any]:
    """Gives the tests' model another block, and its parameters."""
    plain = make_model()
    model = dpj.Model(embed=plain.embed, block=block, head=plain.head)
    return model, {**make_params(1), "blocks": blocks}


def expert_parallel(params: Any, x: Any, ctx: Any, *, mesh: Any, check_vma: bool) -> Any:
    """Two all-to-alls over an axis that the library leaves to the partitioner."""

    def fn(params: Any, x: Any) -> Any:
        x = x + jnp.tanh(x @ params["gate"])
        rows = jnp.broadcast_to(x.reshape(1, -1, WIDTH), (4, x.size // WIDTH, WIDTH))
        rows = lax.all_to_all(rows, "expert", 0, 0, tiled=True)
        rows = jnp.tanh(rows @ params["up"][0]) @ params["down"][0]
        rows = lax.all_to_all(rows, "expert", 0, 0, tiled=True)
        return x + rows.sum(0).reshape(x.shape)

    inside = jax.sharding.get_abstract_mesh()
    specs = {"up": jax.P("expert"), "down": jax.P("expert"), "gate": jax.P()}
    call = jax.shard_map(
        fn,
        mesh=mesh if inside.empty else None,
        in_specs=(specs, jax.P(None, None, None)),
        out_specs=jax.P("expert"),
        axis_names={"expert"},
        check_vma=check_vma,
    )
    return call(params, x).reshape(4, *x.shape).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_experts_over_an_axis_left_to_the_partitioner(check_vma: bool) -> None:
    mesh = make_mesh(pipe=2, expert=4)

    def block(params: Any, x: Any, ctx: Any) -> Any:
        return expert_parallel(params, x, ctx, mesh=mesh, check_vma=check_vma)

    blocks = {
        "up": normal(2, 4, WIDTH, 3),
        "down": normal(2, 4, 3, WIDTH),
        "gate": normal(2, WIDTH, WIDTH),
    }
    model, params = with_block(block, blocks)
    batch = make_batch(4)
    grad_fn = dpj.value_and_grad(model, mesh=mesh, num_microbatches=4)
    program = jax.jit(grad_fn).lower(params, batch).compile(AS_EVER)
    assert_close(program(params, batch), sequential_value_and_grad(model, 4)(params, batch))
    # For each of two directions: rows to the experts and back, and so their cotangents; nothing is
    # sent for the weight gradients, and residuals between the parts stay where they were made.
    text = str(program.as_text())
    assert text.count(" all-to-all(") == 2 * 4
    assert " all-gather(" not in text


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_layers", [4, 10])  # unrolled, and in a loop
def test_gradients_made_with_that_of_x(num_layers: int, overlap: bool) -> None:
    """A kernel that makes both; a weight used by it and elsewhere; one that it does not touch."""
    mesh = make_mesh(pipe=2)

    def block(params: Any, x: Any, ctx: Any) -> Any:
        rows = x.reshape(-1, WIDTH)
        rows = jnp.tanh(fused(rows, params["kernel"])) @ params["late"]
        rows = jnp.tanh(fused(rows, params["both"])) @ params["both"]
        return x + rows.reshape(x.shape)

    blocks = {name: normal(num_layers, WIDTH, WIDTH) for name in ("both", "kernel", "late")}
    model, params = with_block(block, blocks)
    num_microbatches = 8 if overlap else 4
    batch = make_batch(num_microbatches)
    grad_fn = dpj.value_and_grad(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        execution=dpj.Execution(overlap=overlap),
    )
    want = sequential_value_and_grad(model, num_microbatches)(params, batch)
    assert_close(jax.jit(grad_fn)(params, batch), want)
