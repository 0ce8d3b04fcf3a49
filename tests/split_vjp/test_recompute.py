"""A deferred weight gradient under rematerialisation keeps little, and recomputes."""

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax._model.types import Aux
from dualpipe_jax._split_vjp import SplitVjp, split_vjp
from tests.split_vjp import blocks, checks
from tests.split_vjp.blocks import FLAX, FLAX_IDS, POLICIES, SEQUENCE, Mlp, flax_block
from tests.split_vjp.checks import W, X


def split(block, params, x, ctx=None) -> SplitVjp:
    return split_vjp(lambda p, x, c: (block(p, x, c), Aux()), params, x, ctx, recomputes=True)


def both_weight_grads(parts, params, x, ctx=None):
    """Gradients from the stash, and recomputed ones."""
    y, _, residual, weight_residual = parts.forward(params, x, ctx)
    dy = [checks.cotangent(leaf) for leaf in jax.tree.leaves(y)]
    _, stash, deferred, _ = parts.input_grad(params, ctx, residual, weight_residual, dy, None)
    assert [(v.shape, v.dtype) for v in deferred] == [(a.shape, a.dtype) for a in parts.deferred]
    return (
        parts.weight_grad(params, ctx, weight_residual, stash),
        parts.deferred_weight_grad(params, ctx, weight_residual, deferred),
    )


BLOCKS = {
    "cond": (blocks.two_branches, blocks.PARAMS),
    "nested cond": (blocks.nested_branches, blocks.PARAMS),
    "scan over time": (blocks.rnn, blocks.RNN),
    "scan over layers": (blocks.stack, blocks.STACK),
    "parameters alone": (lambda p, x, c: x @ jnp.tanh(p), W),
    "a weight twice": (lambda p, x, c: jnp.tanh(x @ p) @ p, W),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("case", BLOCKS)
def test_recomputed_gradients_are_the_same(case, wrap):
    block, params = BLOCKS[case]
    stashed, recomputed = jax.jit(
        lambda params, x: both_weight_grads(split(wrap(block), params, x), params, x)
    )(params, X)
    checks.assert_leaves_close(case, stashed, recomputed, 1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_recomputed_gradients_of_a_transformer(policy):
    block, params = flax_block(FLAX[-1][0])
    block = jax.checkpoint(block, policy=POLICIES[policy])
    parts = split(block, params, SEQUENCE)
    stashed, recomputed = jax.jit(lambda p, x: both_weight_grads(parts, p, x))(params, SEQUENCE)
    checks.assert_leaves_close(policy, stashed, recomputed, 1e-12)
    assert checks.num_bytes(parts.deferred) <= checks.num_bytes(parts.stash)


@pytest.mark.parametrize("module", [case[0] for case in FLAX], ids=FLAX_IDS)
def test_under_checkpoint_only_x_and_the_cotangent_are_kept(module):
    block, params = flax_block(module)
    parts = split(jax.checkpoint(block), params, SEQUENCE)
    passed = [*parts.weight_residual, *parts.deferred]
    assert checks.num_bytes(passed) <= 2 * checks.num_bytes([SEQUENCE])
    assert checks.num_bytes(parts.deferred) < checks.num_bytes(parts.stash)


def test_only_the_deferred_one_recomputes():
    block, params = flax_block(Mlp())
    parts = split(jax.checkpoint(block), params, SEQUENCE)
    # One dot a weight; deferred, besides: the first layer's output, its cotangent, and that of the
    # LayerNorm.
    assert checks.count_parts("dot_general", parts, params, SEQUENCE) == [2, 3, 2]
    residual, deferred = (
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
        for avals in (parts.weight_residual, parts.deferred)
    )
    dots = checks.count("dot_general", parts.deferred_weight_grad, params, None, residual, deferred)
    assert dots == 5


def test_without_recomputation_a_deferred_weight_grad_has_its_stash():
    block, params = flax_block(Mlp())
    parts = checks.split(jax.checkpoint(block), params, SEQUENCE)
    assert parts.deferred == parts.stash
    stashed, deferred = jax.jit(lambda p, x: both_weight_grads(parts, p, x))(params, SEQUENCE)
    checks.assert_leaves_close("the same", stashed, deferred, 0)
