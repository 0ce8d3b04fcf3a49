"""Language models of transformers as they stand, through `from_loss` alone: `make test-outside`.

Loss and gradients are those of the model's own forward under `jax.grad`, in float64 where the model
can be; dropout in GPT-2.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers

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


TABLES = tuple(
    f"{part}/block/0/layer/0/SelfAttention/relative_attention_bias"
    for part in ("encoder", "decoder")
)
CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "gpt2": (gpt2, {"layers": "transformer/h/{}", "rng": KEY}, 1),
    "gpt_neo": (gpt_neo, {"layers": "transformer/h/{}"}, 1),
    "llama": (llama, {"layers": "model/layers/{}"}, 1),
    "bart": (
        bart,
        {"layers": ["model/encoder/layers/{}", "model/decoder/layers/{}"]},
        2,
    ),
    "t5": (t5, {"layers": ["encoder/block/{}", "decoder/block/{}"], "shared": TABLES}, 2),
}


@pytest.mark.filterwarnings("ignore")  # of the package's own imports and deprecations
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_published_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jnp, "clip", clip)
    make, options, num_kinds = CASES[name]
    model = make()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model.params)
    is_seq2seq = model.config.is_encoder_decoder
    generator = np.random.default_rng(0)
    batch = jnp.asarray(generator.integers(1, VOCABULARY, (ROWS * MICROBATCHES, LENGTH)))

    def loss_fn(params: Any, tokens: Any, rng: Any = None) -> Any:
        dropout: dict[str, Any] = {} if rng is None else {"dropout_rng": rng, "train": True}
        more = {"decoder_input_ids": tokens[:, ::-1]} if is_seq2seq else {}
        logits = model(tokens, **more, params=params, **dropout).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

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
    # Some of the models compute softmax, or their rotary tables, in float32.
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-7)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)
