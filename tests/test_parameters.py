"""Frozen parameters, and parameters that all blocks share."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dualpipe_jax as dpj
from tests.models import assert_close, make_mesh, sequential_value_and_grad
from tests.schedules_under_test import has_steady

WIDTH, RANK, ROWS, LENGTH, VOCABULARY = 6, 2, 2, 4, 5


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * 0.5)


def make_batch(num_microbatches: int) -> jax.Array:
    shape = ROWS * num_microbatches, LENGTH
    return jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, size=shape))


def embed(ends: Any, ctx: dpj.Context) -> jax.Array:
    return ends["table"][ctx.microbatch]


def head(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    logits = jax.nn.log_softmax(x @ ends["out"])
    return -jnp.take_along_axis(logits, ctx.microbatch[..., None], -1).mean()


# --- frozen: low-rank adapters (Hu et al., "LoRA", 2021) on blocks that stay as they are -----


def adapted(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    low_rank = x @ params["a"] @ params["b"]
    return x + jnp.tanh(x @ params["base"] + low_rank + params["bias"])


LORA = dpj.Model(embed=embed, block=adapted, head=head)


def lora_params(num_layers: int) -> Any:
    return {
        "ends": {"table": normal(VOCABULARY, WIDTH), "out": normal(WIDTH, VOCABULARY)},
        "blocks": {
            "base": normal(num_layers, WIDTH, WIDTH),
            "bias": normal(num_layers, WIDTH),
            "a": normal(num_layers, WIDTH, RANK),
            "b": normal(num_layers, RANK, WIDTH),
        },
    }


def is_adapter(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in ("a", "b"), params)


def masked(grads: Any, mask: Any) -> Any:
    return jax.tree.map(lambda grad, keep: grad if keep else jnp.zeros_like(grad), grads, mask)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "remat"), [("dualpipe", "none"), ("1f1b", "block")])
def test_frozen_leaves_cost_nothing(schedule: str, remat: str) -> None:
    params, batch = lora_params(4), make_batch(4)
    options = {"mesh": make_mesh(2), "num_microbatches": 4, "schedule": schedule, "remat": remat}
    loss, grads = sequential_value_and_grad(LORA, 4)(params, batch)
    programs: dict[str, Any] = {}
    for name, trainable in {"all": True, "adapters": is_adapter}.items():
        grad_fn = dpj.value_and_grad(LORA, trainable=trainable, **options)
        programs[name] = jax.jit(grad_fn).lower(params, batch).compile()
        mask = is_adapter(params) if name == "adapters" else jax.tree.map(lambda _: True, params)
        assert_close(programs[name](params, batch), (loss, masked(grads, mask)))
    # No accumulator, no mirror's gradient: only a weight has a weight's shape.
    counts = {name: _permutes(program.as_text()) for name, program in programs.items()}
    moved = 1 if schedule == "dualpipe" else 0
    assert counts == {"all": 2 * moved, "adapters": moved}
    memory = {name: p.memory_analysis().temp_size_in_bytes for name, p in programs.items()}
    assert memory["adapters"] < memory["all"]
    # No weight grad: x^T dy has the shape of the weight.
    dots = {name: _weight_grads(program.as_text()) for name, program in programs.items()}
    assert dots["all"] > dots["adapters"] == 0


def _permutes(text: Any) -> int:
    """Counts the permutes of base weights, `[2 layers, width, width]`."""
    shape = rf"f64\[2,{WIDTH},{WIDTH}\]"
    return len(re.findall(rf"= {shape}\S* collective-permute\(", str(text)))


def _weight_grads(text: Any) -> int:
    """Counts matmuls over rows and tokens whose result has the shape of a base weight."""
    return len(re.findall(rf"= f64\[{WIDTH},{WIDTH}\]\S* dot\(", str(text)))


@pytest.mark.slow
def test_any_mask() -> None:
    """Branches, NumPy bools, everything frozen; integer leaves do not change."""
    params, batch, mesh = lora_params(2), make_batch(2), make_mesh(2)
    params["ends"]["version"] = jnp.arange(2)
    loss, grads = sequential_value_and_grad(LORA, 2)(params, batch)
    masks: list[Any] = [
        {"ends": np.True_, "blocks": False},
        {"ends": {"table": False, "out": True, "version": True}, "blocks": True},
        False,
    ]
    for mask in masks:
        full = jax.tree.broadcast(mask, params)
        grad_fn = dpj.value_and_grad(LORA, mesh=mesh, num_microbatches=2, trainable=mask)
        got_loss, got = jax.jit(grad_fn)(params, batch)
        assert got["ends"]["version"].dtype == jax.dtypes.float0
        for tree in (got, grads, full):
            tree["ends"] = {k: v for k, v in tree["ends"].items() if k != "version"}
        assert_close((got_loss, got), (loss, masked(grads, full)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "trainable": {
                "ends": {"table": True, "out": True, "bias": None},
                "blocks": False,
                "shared": None,
            }
        },
    ],
)
def test_branches_may_be_none(options: Any) -> None:
    params, batch = lora_params(2), make_batch(2)
    params["ends"]["bias"] = params["blocks"]["rest"] = params["shared"] = None
    grad_fn = dpj.value_and_grad(
        LORA, mesh=make_mesh(2), num_microbatches=2, param_specs=None, **options
    )
    _, grads = jax.eval_shape(grad_fn, params, batch)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def test_zeros_of_frozen_leaves_take_grad_dtype() -> None:
    params, batch = lora_params(2), make_batch(2)
    grad_fn = dpj.value_and_grad(
        LORA, mesh=make_mesh(2), num_microbatches=2, trainable=is_adapter, grad_dtype="bfloat16"
    )
    _, grads = jax.eval_shape(grad_fn, params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}


# --- shared: a table of relative positions (Raffel et al., "T5", 2020) for all blocks --------


def attention(params: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    distance = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH) + LENGTH - 1
    scores = x @ params["base"] @ x.mT + ctx.shared["positions"][distance]
    assert ctx.shared["version"].dtype == jnp.int32
    return x + jax.nn.softmax(scores) @ jnp.tanh(x + params["bias"])


def embed_shared(ends: Any, ctx: dpj.Context) -> jax.Array:
    return embed(ends, ctx) * ctx.shared["gain"]


def head_shared(ends: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
    return head(ends, x * ctx.shared["gain"], ctx)


SHARED = dpj.Model(embed=embed_shared, block=attention, head=head_shared)


def shared_params(num_layers: int) -> Any:
    params = lora_params(num_layers)
    return {
        "ends": params["ends"],
        "blocks": {name: params["blocks"][name] for name in ("base", "bias")},
        "shared": {
            "positions": normal(2 * LENGTH - 1),
            "gain": normal(WIDTH),
            "unused": normal(2),
            "version": jnp.arange(3, dtype=jnp.int32),
        },
    }


@pytest.mark.slow
def test_frozen_shared_parameters() -> None:
    """That of trained ones is in test_exact.py, over all uses in blocks, embed and head."""
    params, batch = shared_params(4), make_batch(4)
    trainable = {"ends": True, "blocks": True, "shared": False}
    options: Any = {"mesh": make_mesh(2), "num_microbatches": 4}
    grad_fn = dpj.value_and_grad(
        SHARED, **options, schedule="interleaved-1f1b", trainable=trainable
    )
    result, got = jax.jit(grad_fn)(params, batch)
    want_result, want = sequential_value_and_grad(SHARED, 4)(params, batch)
    for tree in (got, want):
        assert tree["shared"].pop("version").dtype == jax.dtypes.float0
    mask = jax.tree.broadcast(trainable, want)
    assert_close((result, got), (want_result, masked(want, mask)))
    assert_close(jax.jit(dpj.evaluate(SHARED, **options))(params, batch), want_result)


@pytest.mark.slow
def test_shared_parameters_beside_other_axes() -> None:
    """Over a data axis, and sharded over a manual one; collectives in embed and head."""
    num_microbatches = 6
    assert has_steady("dualpipe", 2, num_microbatches, True)  # ticks and a steady phase
    params, batch = shared_params(2), make_batch(2 * num_microbatches)
    mesh = jax.make_mesh((2, 2, 2), ("pipe", "data", "model"))

    def gather(shared: Any) -> Any:
        gain = jax.lax.all_gather(shared["gain"], "model", tiled=True)
        # All devices have come to the same; the sum over them of a part says so to JAX.
        part = jnp.where(jax.lax.axis_index("model") == 0, gain, 0)
        return {**shared, "gain": jax.lax.psum(part, "model")}

    def with_gain(function: Any) -> Any:
        def run(*args: Any) -> Any:
            *rest, ctx = args
            shared = gather(ctx.shared)
            new = dpj.Context(
                microbatch=ctx.microbatch, layer=ctx.layer, rng=ctx.rng, shared=shared
            )
            return function(*rest, new)

        return run

    model = dpj.Model(embed=with_gain(embed_shared), block=attention, head=with_gain(head_shared))
    grad_fn = dpj.value_and_grad(
        model,
        mesh=mesh,
        num_microbatches=num_microbatches,
        execution=dpj.Execution(overlap=True),
        batch_axes="data",
        manual_axes="model",
        param_specs={
            "ends": None,
            "blocks": None,
            "shared": {
                "positions": None,
                "gain": jax.P("model"),
                "unused": jax.P(),
                "version": None,
            },
        },
    )
    assert_close(
        jax.jit(grad_fn)(params, batch),
        sequential_value_and_grad(SHARED, 2 * num_microbatches)(params, batch),
    )
