"""Qwen3 of google-tunix under a pipeline, as test_outside.py: `make test-outside`.

Not with the other tests: the package brings 1 GB of others with it.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import dualpipe_jax as dpj
from tests.flax.outside_models import LENGTH, ROWS, VOCABULARY, loss_of, make_batch, mesh_of
from tests.models import assert_close


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package's own imports
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("is_tied", [True, False])
def test_qwen3_of_tunix(is_tied: bool) -> None:
    # This file is looked for doctests and types also where the package is not installed.
    qwen3 = importlib.import_module("tunix.models.qwen3.model")
    config = qwen3.ModelConfig(
        num_layers=4,
        vocab_size=VOCABULARY,
        embed_dim=8,
        hidden_dim=12,
        num_heads=4,
        head_dim=4,
        num_kv_heads=2,
        rope_theta=10_000,
        norm_eps=1e-6,
        use_tied_embedding=is_tied,
    )
    net, batch = qwen3.Qwen3(config, rngs=nnx.Rngs(0)), make_batch()
    # It starts its MLPs at zero, where half of the gradients are zero.
    rngs = nnx.Rngs(1)
    state = nnx.state(net, nnx.Param)
    nnx.update(net, jax.tree.map(lambda leaf: leaf + 0.1 * rngs.normal(leaf.shape), state))
    positions = jnp.arange(LENGTH)[None]

    def mask_of(batch: Any) -> jax.Array:
        """Lets every token see those before it that are no padding: `[rows, 1, from, to]`."""
        causal = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
        return causal & (batch["mask"][:, None, :] > 0)

    def head(net: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        x = net.final_norm(x)
        return net.embedder.decode(x) if is_tied else net.lm_head(x)

    def block(layer: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        mask = mask_of(ctx.microbatch)
        return layer(x, jnp.broadcast_to(positions, x.shape[:2]), None, mask)[1]

    def own_loss(net: Any) -> jax.Array:
        where = jnp.broadcast_to(positions, (ROWS, LENGTH))
        return loss_of(net(batch["tokens"], where, None, mask_of(batch))[0], batch)

    model = dpj.nnx.model(
        net,
        embed=lambda net, ctx: net.embedder.encode(ctx.microbatch["tokens"]),
        block=block,
        head=head,
        loss=loss_of,
    )
    assert model.layout is None  # all layers are of one kind
    specs = nnx.get_partition_spec(model.params(net)["blocks"])
    assert specs["mlp"]["down_proj"]["kernel"].get_value() == jax.P("pipe", "tp", "fsdp")
    grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)
    # The model computes in float32, whatever its parameters are.
    want = nnx.jit(nnx.value_and_grad(own_loss))(net)
    assert_close(nnx.jit(grad_fn)(net, batch), want, tolerance=1e-5)
