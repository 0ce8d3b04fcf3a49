"""Splits `shard_map`: dx in one, the weight gradients in another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType

from tests.split_vjp import checks
from tests.split_vjp.checks import D, array

ROWS = 24  # no activation has as many entries as a weight
X = array(ROWS, D)
MESH = jax.make_mesh((2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
EXPERTS = {"up": array(4, D, D), "down": array(4, D, D, seed=1), "gate": array(D, D, seed=2)}
TENSOR = {"up": array(D, 4 * D), "down": array(4 * D, D, seed=1), "scale": array(D)}
P = jax.P


def mapped(fn: Any, in_specs: Any, out_specs: Any, *, check_vma: bool, axes: str = "expert") -> Any:
    return jax.shard_map(
        fn,
        mesh=None if not jax.sharding.get_abstract_mesh().empty else MESH,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes.split()),
        check_vma=check_vma,
    )


def expert_parallel(params: Any, x: Any, ctx: Any, *, check_vma: bool) -> Any:
    """Sends rows to the experts and back again: two all-to-alls."""

    def fn(params: Any, x: Any) -> Any:
        x = x + jnp.tanh(x @ params["gate"])
        rows = lax.all_to_all(x.reshape(4, -1, D), "expert", 0, 0, tiled=True)
        rows = jnp.tanh(rows @ params["up"][0]) @ params["down"][0]
        return x + lax.all_to_all(rows, "expert", 0, 0, tiled=True).reshape(x.shape)

    specs = {"up": P("expert"), "down": P("expert"), "gate": P()}
    call = mapped(fn, (specs, P("expert")), P("expert"), check_vma=check_vma)
    return call(params, jnp.concatenate([x, x * 2]))[:ROWS]


def tensor_parallel(params: Any, x: Any, ctx: Any, *, check_vma: bool) -> Any:
    """Divides the hidden dim, and sums."""

    def fn(params: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ params["up"]) @ params["down"]
        return x + lax.psum(hidden, "expert") * params["scale"]

    specs = {"up": P(None, "expert"), "down": P("expert"), "scale": P()}
    return mapped(fn, (specs, P()), P(), check_vma=check_vma)(params, x)


def gathered(params: Any, x: Any, ctx: Any, *, check_vma: bool) -> Any:
    """Gathers a weight whose rows are sharded over the devices, and rounds it."""

    def fn(up: Any, x: Any) -> Any:
        whole = lax.all_gather(up, "expert", axis=1, tiled=True)
        return jnp.tanh(x @ jnp.sin(whole)) @ whole.T

    in_specs = P(None, "expert"), P("expert")
    return mapped(fn, in_specs, P("expert"), check_vma=check_vma)(params["up"], x)


def in_scan(params: Any, x: Any, ctx: Any, *, check_vma: bool) -> Any:
    def body(h: Any, scale: Any) -> Any:
        return tensor_parallel(params, h * scale, ctx, check_vma=check_vma), None

    return lax.scan(body, x, jnp.arange(1.0, 4.0))[0]


def of_scan_and_cond(params: Any, x: Any, ctx: Any, *, check_vma: bool) -> Any:
    """A scan and a conditional, on each device's part, inside of a `shard_map`."""

    def fn(params: Any, x: Any) -> Any:
        def body(h: Any, _: Any) -> Any:
            return jnp.tanh(h @ params["up"][0]), None

        x = lax.scan(body, x, length=2)[0]
        down, gate = params["down"][0], params["gate"]
        return lax.cond(x.sum() > 0, lambda: jnp.sin(x @ down) @ gate, lambda: x @ gate)

    specs = {"up": P("expert"), "down": P("expert"), "gate": P()}
    return mapped(fn, (specs, P("expert")), P("expert"), check_vma=check_vma)(params, x)


def in_another(params: Any, x: Any, ctx: Any, *, check_vma: bool) -> Any:
    """Rows over one axis outside, as in the library's own step, experts over another inside."""

    def fn(params: Any, x: Any) -> Any:
        return tensor_parallel(params, jnp.sin(x * x.sum()), None, check_vma=check_vma)

    return mapped(fn, (P(), P("data")), P("data"), check_vma=False, axes="data")(params, x)


BLOCKS = {
    "expert parallel": (expert_parallel, EXPERTS),
    "tensor parallel": (tensor_parallel, TENSOR),
    "gathered weight": (gathered, {"up": array(D, 4 * D)}),
    "in a scan": (in_scan, TENSOR),
    "of a scan and a cond": (of_scan_and_cond, EXPERTS),
    "in another": (in_another, TENSOR),
}
WRAPS = {"plain": lambda block: block, "checkpoint": jax.checkpoint}
# Forward, dx, weights: as many dots as on one device.
NUM_DOTS = {
    "expert parallel": [3, 3, 3],
    "tensor parallel": [2, 2, 2],
    "gathered weight": [2, 2, 2],
    "in a scan": [6, 6, 6],
    "of a scan and a cond": [5, 5, 5],
    "in another": [2, 2, 2],
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", BLOCKS)
def test_equals_vjp(case, wrap, check_vma):
    block, params = BLOCKS[case]
    block = WRAPS[wrap](partial(block, check_vma=check_vma))
    parts = checks.assert_equals_vjp(block, params, X)
    dots = checks.count_parts("dot_general", parts, params, X)
    if wrap == "plain":
        assert dots == NUM_DOTS[case]
    assert sum(dots) <= checks.count_vjp("dot_general", block, params, X)


@pytest.mark.parametrize("check_vma", [True, False])
def test_transfers_of_dx_stay_with_it(check_vma):
    block = partial(expert_parallel, check_vma=check_vma)
    parts = checks.split(block, EXPERTS, X)
    assert checks.count_parts("all_to_all", parts, EXPERTS, X) == [2, 2, 0]


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("case", ["expert parallel", "tensor parallel", "gathered weight"])
def test_no_weight_and_no_weight_gradient_is_kept(case, check_vma):
    block, params = BLOCKS[case]
    parts = checks.split(partial(block, check_vma=check_vma), params, X)
    sizes = {int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert not [a for a in checks.passed_on(parts) if a.shape[-2:] == (D, D) or a.size in sizes]
