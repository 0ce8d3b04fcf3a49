"""Published Flax models that nobody here wrote, wrapped by the adapters and nothing else.

Loss and gradients are those of the model's own forward under `jax.grad`. A Linen transformer whose
layers have names and whose embedding is used twice, and an NNX state-space model whose layers hold
their own number. A larger one is in outside_qwen3.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from mamba2_jax import Mamba2Config, Mamba2ForCausalLM
from transformers import GPT2Config
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2Block, FlaxGPT2LMHeadModule

import dualpipe_jax as dpj
from tests.flax.outside_models import LENGTH, ROWS, VOCABULARY, loss_of, make_batch, mesh_of
from tests.models import assert_close


@pytest.mark.slow
def test_gpt2_of_transformers() -> None:
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=4, n_head=2)
    gpt = FlaxGPT2LMHeadModule(config, dtype=jnp.dtype("float64"))
    batch, positions = make_batch(), jnp.arange(LENGTH)[None]

    def own_loss(params: Any) -> jax.Array:
        args = batch["tokens"], batch["mask"], jnp.broadcast_to(positions, (ROWS, LENGTH))
        outputs: Any = gpt.apply({"params": params}, *args)
        return loss_of(outputs.logits, batch)

    def embed(gpt: Any, ctx: dpj.Context) -> jax.Array:
        return gpt.transformer.wte(ctx.microbatch["tokens"]) + gpt.transformer.wpe(positions)

    def block(layer: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return layer(x, ctx.microbatch["mask"])[0]

    def head(gpt: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return gpt.transformer.wte.attend(gpt.transformer.ln_f(x))

    model = dpj.linen.model(
        embed=(gpt, embed),
        block=(FlaxGPT2Block(config, dtype=jnp.dtype("float64")), block),
        head=(gpt, head),
        loss=loss_of,
    )
    params = gpt.init(jax.random.key(0), batch["tokens"], batch["mask"], positions)["params"]
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    canonical = dpj.linen.to_canonical(params, "transformer/h/{}")
    grad_fn = dpj.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)
    loss, grads = jax.jit(grad_fn)(canonical, batch)
    want = jax.jit(jax.value_and_grad(own_loss))(params)
    assert_close((loss, dpj.linen.to_flax(grads, "transformer/h/{}")), want)
    # The adapter's initial parameters have the same names: a checkpoint of either fits the other.
    own = model.init(jax.random.key(0), batch, num_layers=4)
    assert jax.tree.structure(own) == jax.tree.structure(canonical)


@pytest.mark.slow
def test_mamba2_of_mamba2_jax() -> None:
    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=8,
        state_size=4,
        head_dim=4,
        chunk_size=4,
        num_hidden_layers=4,
    )
    net, batch = Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), make_batch()
    # In float64, some of its initializers draw wider numbers than it computes with.
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), nnx.state(net, nnx.Param))
    nnx.update(net, single)

    def head(net: Any, x: jax.Array, ctx: dpj.Context) -> jax.Array:
        return net.backbone.final_norm(x) @ net.backbone.embedder.embedding[:].T

    model = dpj.nnx.model(
        net,
        blocks="backbone.layers",
        embed=lambda net, ctx: net.backbone.embedder(ctx.microbatch["tokens"]),
        block=lambda layer, x, ctx: layer(x)[0],
        head=head,
        loss=loss_of,
        ignore="layer_idx",
    )
    grad_fn = dpj.nnx.value_and_grad(model, mesh=mesh_of(), num_microbatches=4)
    got = nnx.jit(grad_fn)(net, batch)

    @nnx.jit
    @nnx.value_and_grad
    def own(net: Any) -> jax.Array:
        return net(batch["tokens"], batch["tokens"])["loss"]

    want = own(net)
    # The model computes in float32, whatever its parameters are.
    assert_close(got, want, tolerance=1e-5)
    nnx.Optimizer(net, optax.sgd(0.1), wrt=nnx.Param).update(net, got[1])
    assert own(net)[0] < want[0]
