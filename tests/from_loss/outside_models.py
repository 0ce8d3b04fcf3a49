"""Published models as they stand, through `from_loss` alone: `make test-outside`.

Linen models from transformers, NNX models from tunix (with and without its own rematerialisation),
an Equinox model. Loss and gradients are those of the model's own forward under `jax.grad`, in
float64 where the model can be; dropout in GPT-2 and in the Equinox model.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from flax import nnx

import dualpipe_jax as dpj

PACKAGE: Any = transformers
VOCABULARY, LENGTH, ROWS, MICROBATCHES = 11, 6, 2, 2
KEY = jax.random.key(5)
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY}
SEQ2SEQ: dict[str, Any] = {"pad_token_id": 0, "decoder_start_token_id": 0}


def gpt2() -> Any:
    config = transformers.GPT2Config(
        **SMALL, n_positions=LENGTH, n_embd=8, n_layer=4, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return PACKAGE.FlaxGPT2LMHeadModel(config, input_shape=(1, LENGTH), dtype=jnp.float64)


def gpt_neo() -> Any:
    config = transformers.GPTNeoConfig(
        **SMALL,
        max_position_embeddings=LENGTH,
        hidden_size=8,
        num_layers=4,
        attention_types=[[["global", "local"], 2]],
        num_heads=2,
        window_size=3,
        intermediate_size=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return PACKAGE.FlaxGPTNeoForCausalLM(config, input_shape=(1, LENGTH), dtype=jnp.float64)


def llama() -> Any:
    config = transformers.LlamaConfig(
        **SMALL,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return PACKAGE.FlaxLlamaForCausalLM(config, input_shape=(1, LENGTH), dtype=jnp.float64)


def bart() -> Any:
    config = transformers.BartConfig(
        **SMALL,
        **SEQ2SEQ,
        d_model=8,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=2 * LENGTH,
        bos_token_id=0,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    return PACKAGE.FlaxBartForConditionalGeneration(
        config, input_shape=(1, LENGTH), dtype=jnp.float64
    )


def t5() -> Any:
    config = transformers.T5Config(
        **SMALL, **SEQ2SEQ, d_model=8, d_kv=4, d_ff=16, num_layers=4, num_heads=2
    )
    return PACKAGE.FlaxT5ForConditionalGeneration(
        config, input_shape=(1, LENGTH), dtype=jnp.float64
    )


def clip(x: Any, *args: Any, a_max: Any = None, clip: Any = jnp.clip, **more: Any) -> Any:
    """As `jnp.clip`, with the name of an argument that T5 uses and newer JAX has no more."""
    return clip(x, *args, **({**more, "max": a_max} if a_max is not None else more))


class Case(NamedTuple):
    """A loss `(params, tokens, rng=None)`, its parameters, and the arguments of `from_loss`."""

    loss_fn: Callable[..., Any]
    params: Any
    options: dict[str, Any]


def cross_entropy(logits: Any, tokens: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()


def of_transformers(make: Callable[[], Any], **options: Any) -> Case:
    model = make()

    def loss_fn(params: Any, tokens: Any, rng: Any = None) -> Any:
        dropout: dict[str, Any] = {} if rng is None else {"dropout_rng": rng, "train": True}
        is_seq2seq = model.config.is_encoder_decoder
        more = {"decoder_input_ids": tokens[:, ::-1]} if is_seq2seq else {}
        return cross_entropy(model(tokens, **more, params=params, **dropout).logits, tokens)

    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.params)
    return Case(loss_fn, params, options)


def of_tunix(model: Any) -> Case:
    graph, state = nnx.split(model)

    def loss_fn(params: Any, tokens: Any) -> Any:
        module = nnx.merge(graph, params)
        positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (*tokens.shape, LENGTH))
        return cross_entropy(module(tokens, positions, None, mask)[0], tokens)

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state)
    return Case(loss_fn, params, {"layers": "layers/{}"})


def tunix(name: str) -> Any:
    return importlib.import_module(f"tunix.models.{name}.model")


def llama3(*, is_rematerialised: bool = False, **options: Any) -> Case:
    module = tunix("llama3")
    remat = module.RematConfig.DECODER if is_rematerialised else module.RematConfig.NONE
    config = module.ModelConfig(
        remat_config=remat,
        num_layers=4,
        vocab_size=VOCABULARY,
        embed_dim=8,
        hidden_dim=16,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-6,
        **options,
    )
    return of_tunix(module.Llama3(config, rngs=nnx.Rngs(0)))


def gemma3(*, is_rematerialised: bool = False) -> Case:
    module = tunix("gemma3")
    remat = module.RematConfig.DECODER if is_rematerialised else module.RematConfig.NONE
    config = module.ModelConfig(
        remat_config=remat,
        num_layers=8,
        num_embed=VOCABULARY,
        embed_dim=8,
        hidden_dim=16,
        num_heads=2,
        head_dim=4,
        num_kv_heads=1,
        sliding_window_size=3,
    )
    return of_tunix(module.Gemma3(config, rngs=nnx.Rngs(0)))


class EquinoxLayer(equinox.Module):
    """Attention and an MLP of one window, with dropout; vmapped over the windows."""

    norm: equinox.nn.LayerNorm
    attention: equinox.nn.MultiheadAttention
    mlp: equinox.nn.MLP
    dropout: equinox.nn.Dropout

    def __init__(self, key: Any):
        one, other = jax.random.split(key)
        self.norm = equinox.nn.LayerNorm(8)
        self.attention = equinox.nn.MultiheadAttention(2, 8, key=one)
        self.mlp = equinox.nn.MLP(8, 8, 16, 1, key=other)
        self.dropout = equinox.nn.Dropout(0.3)

    def __call__(self, x: Any, key: Any) -> Any:
        y = jax.vmap(self.norm)(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
        return x + self.dropout(jax.vmap(self.mlp)(x), key=key)


def of_equinox() -> Case:
    keys = jax.random.split(jax.random.key(0), 6)
    tree = {
        "embed": equinox.nn.Embedding(VOCABULARY, 8, key=keys[4]),
        "blocks": [EquinoxLayer(key) for key in keys[:4]],
        "head": equinox.nn.Linear(8, VOCABULARY, key=keys[5]),
    }
    params, static = equinox.partition(tree, equinox.is_inexact_array)

    def loss_fn(params: Any, tokens: Any, rng: Any) -> Any:
        model = equinox.combine(params, static)

        def one(tokens: Any, key: Any) -> Any:
            x = jax.vmap(model["embed"])(tokens)
            for block, own in zip(model["blocks"], jax.random.split(key, 4), strict=True):
                x = block(x, own)
            return jax.vmap(model["head"])(x)

        logits = jax.vmap(one)(tokens, jax.random.split(rng, tokens.shape[0]))
        return cross_entropy(logits, tokens)

    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    return Case(loss_fn, params, {"layers": "blocks/{}", "rng": KEY})


TABLES = tuple(
    f"{part}/block/0/layer/0/SelfAttention/relative_attention_bias"
    for part in ("encoder", "decoder")
)
# How to make each case, and its number of kinds. (In T5 the first layers have the tables.)
CASES: dict[str, tuple[Callable[[], Case], int]] = {
    "gpt2": (lambda: of_transformers(gpt2, layers="transformer/h/{}", rng=KEY), 1),
    "gpt_neo": (lambda: of_transformers(gpt_neo, layers="transformer/h/{}"), 1),
    "llama": (lambda: of_transformers(llama, layers="model/layers/{}"), 1),
    "bart": (
        lambda: of_transformers(
            bart, layers=["model/encoder/layers/{}", "model/decoder/layers/{}"]
        ),
        2,
    ),
    "t5": (
        lambda: of_transformers(t5, layers=["encoder/block/{}", "decoder/block/{}"], shared=TABLES),
        2,
    ),
    "tunix llama3": (llama3, 1),
    "tunix llama3, tied, rematerialised": (
        lambda: llama3(weight_tying=True, is_rematerialised=True),
        1,
    ),
    "tunix gemma3": (gemma3, 1),
    "tunix gemma3, rematerialised": (
        lambda: gemma3(is_rematerialised=True),
        2,
    ),
    "equinox": (of_equinox, 1),
}


@pytest.mark.filterwarnings("ignore")  # of the packages' own imports and deprecations
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_published_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jnp, "clip", clip)
    make, num_kinds = CASES[name]
    loss_fn, params, options = make()
    generator = np.random.default_rng(0)
    batch = jnp.asarray(generator.integers(1, VOCABULARY, (ROWS * MICROBATCHES, LENGTH)))

    def mean(params: Any) -> Any:
        parts = jnp.split(batch, MICROBATCHES)
        keys = [(jax.random.fold_in(KEY, m),) if "rng" in options else () for m in range(2)]
        losses = [loss_fn(params, part, *key) for part, key in zip(parts, keys, strict=True)]
        return sum(losses) / MICROBATCHES

    found = dpj.from_loss(loss_fn, params, batch[:ROWS], **options)
    assert len(found.cut.kinds) == num_kinds
    mesh = jax.make_mesh((2,), ("pipe",), devices=jax.devices()[:2])
    grad_fn = dpj.value_and_grad(found, mesh=mesh, num_microbatches=MICROBATCHES)
    loss, grads = jax.jit(grad_fn)(params, batch, rng=options.get("rng"))
    wanted_loss, wanted = jax.jit(jax.value_and_grad(mean))(params)
    # Some of the models compute softmax, norms, or their rotary tables, in float32.
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-7)
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
