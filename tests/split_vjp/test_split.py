"""The split of whole blocks: equal to `jax.vjp`, no dot twice, no needless residual."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal

from tests.split_vjp import checks
from tests.split_vjp.blocks import (
    FLAX,
    FLAX_IDS,
    POLICIES,
    SEQUENCE,
    Attention,
    Mlp,
    Transformer,
    flax_block,
)
from tests.split_vjp.checks import D, W, X, array


@pytest.mark.parametrize(("module", "num_weights", "num_contractions"), FLAX, ids=FLAX_IDS)
def test_no_dot_of_a_flax_block_runs_twice(module, num_weights, num_contractions):
    block, params = flax_block(module)
    parts = checks.assert_equals_vjp(block, params, SEQUENCE)
    assert checks.count_parts("dot_general", parts, params, SEQUENCE) == [
        num_weights + num_contractions,
        num_weights + 2 * num_contractions,
        num_weights,
    ]
    total = checks.count_vjp("dot_general", block, params, SEQUENCE)
    assert total == 3 * (num_weights + num_contractions)
    assert all(parts.has_grad)


@pytest.mark.parametrize("policy", POLICIES)
def test_checkpoint_of_a_transformer_block(policy):
    block, params = flax_block(Transformer())
    block = jax.checkpoint(block, policy=POLICIES[policy])
    parts = checks.assert_equals_vjp(block, params, SEQUENCE)
    forward, input_grad, weight_grad = checks.count_parts("dot_general", parts, params, SEQUENCE)
    # Recomputed values are so once: in the input gradient, unless only a weight gradient needs them
    # (the attention's output). All but the last dot of the forward is needed again.
    expected = {
        "everything": (17, 6),
        "nothing_saveable": (17, 6),
        "dots_with_no_batch_dims": (11, 7),
    }
    assert forward == 8
    assert (input_grad, weight_grad) == expected.get(policy, (10, 6))
    total = checks.count_vjp("dot_general", block, params, SEQUENCE)
    assert forward + input_grad + weight_grad == total


def test_under_checkpoint_only_x_is_kept():
    for module in (Attention(), Mlp(), Transformer()):
        block, params = flax_block(module)
        parts = checks.split(jax.checkpoint(block), params, SEQUENCE)
        residuals = [*parts.residual, *parts.weight_residual]
        assert [(a.shape, a.dtype) for a in residuals] == [(SEQUENCE.shape, SEQUENCE.dtype)]
        # Nothing is computed for the backward alone.
        assert checks.count_parts("dot_general", parts, params, SEQUENCE)[0] == (
            checks.count("dot_general", lambda p, x: block(p, x, None), params, SEQUENCE)  # noqa: B023
        )


def bytes_saved_by_jax(block: Any, params: Any, x: Any) -> int:
    """Counts the bytes that `jax.vjp` keeps besides the parameters themselves."""

    def residuals(params: Any, x: Any) -> Any:
        pull = jax.vjp(lambda params, x: block(params, x, None), params, x)[1]
        return jax.tree.leaves(pull)

    jaxpr = jax.make_jaxpr(residuals)(params, x).jaxpr
    given = set(jaxpr.invars[: len(jax.tree.leaves(params))])
    saved = {v for v in jaxpr.outvars if not isinstance(v, Literal)} - given
    return checks.num_bytes([v.aval for v in saved])


@pytest.mark.parametrize(("module", "num_weights", "num_contractions"), FLAX, ids=FLAX_IDS)
def test_keeps_no_more_than_vjp(module, num_weights, num_contractions):
    del num_weights, num_contractions
    block, params = flax_block(module)
    for policy in POLICIES.values():
        for wrapped in (block, jax.checkpoint(block, policy=policy)):
            parts = checks.split(wrapped, params, SEQUENCE)
            kept = checks.num_bytes([*parts.residual, *parts.weight_residual])
            saved = bytes_saved_by_jax(wrapped, params, SEQUENCE)
            assert saved
            assert kept <= saved, policy


def test_stash_holds_one_cotangent_a_weight():
    block, params = flax_block(Mlp())
    parts = checks.split(block, params, SEQUENCE)
    # dW of a dense layer needs its output's cotangent: [.., 32] and [.., 8], which is dy; the
    # LayerNorm's scale and bias need their summands, or their sums.
    wide = [a for a in parts.stash if a.shape == (2, 5, 32)]
    assert len(wide) == 1
    assert checks.num_bytes(parts.stash) <= 8 * (2 * 5 * (32 + 8) + 32 + 3 * 8)


# --- values that depend on parameters, constants or ctx alone ----------------------------------

TABLE = 1000  # nothing else is as large
CONSTANT = np.random.default_rng(0).normal(size=(TABLE, D))


def of_params(params, x, ctx):
    table = jnp.exp(jnp.outer(params["rows"], params["cols"]))
    return jnp.tanh(x * table.mean()) + jnp.sin(x @ (table[-D:, :D] * params["w"]))


def of_constants(params, x, ctx):
    table = jnp.cos(jnp.arange(TABLE * D, dtype=float).reshape(TABLE, D))
    return jnp.sin(x @ params["w"] * table.sum(0)) * jnp.asarray(CONSTANT).mean(0)


def of_ctx(params, x, ctx):
    rows = jnp.arange(TABLE) * ctx["scale"]
    table = jnp.exp(-jnp.square(rows[:, None] - jnp.arange(D)))
    mask = jax.random.bernoulli(ctx["key"], 0.5, table.shape)
    return x @ params["w"] * jnp.where(mask, table, 0).sum(0)


def of_cast_params(params, x, ctx):
    w = params["w"].astype(jnp.float32).astype(float)
    rows = params["rows"].astype(jnp.float32).astype(float)
    return jnp.tanh(x @ w) * jnp.sin(rows).sum()


FREE = {
    "params": of_params,
    "cast params": of_cast_params,
    "constants": of_constants,
    "ctx": of_ctx,
}
WRAPS = {
    "plain": lambda block: block,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": lambda block: (
        lambda params, x, ctx: lax.scan(
            lambda h, _: (block(params, h, ctx), None), x, None, length=2
        )[0]
    ),
    "scan of checkpoint": lambda block: (
        lambda params, x, ctx: lax.scan(
            jax.checkpoint(lambda h, _: (block(params, h, ctx), None)), x, None, length=2
        )[0]
    ),
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("source", FREE)
def test_values_that_do_not_depend_on_x_are_never_kept(source, wrap):
    block = FREE[source]
    params = {"rows": array(TABLE), "cols": array(TABLE), "w": W}
    ctx = {"scale": jnp.float64(0.01), "key": jax.random.key(3)}
    parts = checks.split(WRAPS[wrap](block), params, X, ctx)
    offenders = [a for a in checks.passed_on(parts) if a.size >= TABLE]
    assert not offenders
    # Nor is a weight matrix, or a value made of it.
    assert all(a.shape[-2:] != (D, D) for a in [*parts.residual, *parts.weight_residual])


def test_values_made_of_ctx_are_equal_in_forward_and_backward():
    params = {"rows": array(5), "cols": array(5), "w": W}
    ctx = {"scale": jnp.float64(0.01), "key": jax.random.key(3)}
    for block in FREE.values():
        checks.assert_equals_vjp(block, params, X, ctx)


def test_dropout_mask_is_not_kept():
    block, params = flax_block(Transformer(dropout=0.5))
    key = jax.random.key(7)
    parts = checks.assert_equals_vjp(block, params, SEQUENCE, key)
    plain = checks.split(flax_block(Transformer())[0], params, SEQUENCE)
    assert checks.num_bytes(checks.passed_on(parts)) == checks.num_bytes(checks.passed_on(plain))
