"""Makes small folders in the Hugging Face format: random weights, a tokenizer trained on a line."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY, WIDTH, HIDDEN, HEADS, HEAD_SIZE = 300, 32, 48, 4, 8
LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# The models of the tests: entries of config.json beside `config_of`'s, number of files, dtype.
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "shards": 3},
    "llama": {
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_scaling": LLAMA31,
        "dtype": "bfloat16",
    },
    "gemma": {"model_type": "gemma3_text", "num_hidden_layers": 6, "shards": 2},
    "gemma-fused": {"model_type": "gemma3_text", "num_key_value_heads": HEADS},
}


def config_of(model_type: str, **others: Any) -> dict[str, Any]:
    """Makes a config.json as `transformers` writes it."""
    config: dict[str, Any] = {
        "model_type": model_type,
        "num_hidden_layers": 4,
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": HEAD_SIZE,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    if model_type == "gemma3_text":
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4,
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": HEAD_SIZE,
        }
    return config | others


def make(
    folder: Path, *, shards: int = 1, dtype: str = "float32", **entries: Any
) -> dict[str, np.ndarray]:
    """Writes the folder, and gives its tensors; entries are those of config.json."""
    folder.mkdir(parents=True)
    config = config_of(**entries)
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    is_bfloat16 = dtype == "bfloat16"
    tensors = {
        name: (0.2 * rng.standard_normal(shape) + (len(shape) == 1)).astype(
            ml_dtypes.bfloat16 if is_bfloat16 else dtype
        )
        for name, shape in _shapes(config).items()
    }
    names = sorted(tensors)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    for number, file in enumerate(files):
        part = {name: tensors[name] for name in names[number::shards]}
        safetensors.numpy.save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        index = {name: files[number % shards] for number, name in enumerate(names)}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _make_tokenizer().save(str(folder / "tokenizer.json"))
    return tensors


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    kind, width, size = config["model_type"], config["hidden_size"], config["head_dim"]
    hidden, queries = config["intermediate_size"], config["num_attention_heads"] * size
    keys = config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
        "model.rotary_emb.inv_freq": (size // 2,),  # of old folders, and no parameter
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = config["vocab_size"], width
    of_layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    if kind != "llama":
        of_layer |= {"self_attn.q_norm": (size,), "self_attn.k_norm": (size,)}
    if kind == "gemma3_text":
        of_layer |= {"pre_feedforward_layernorm": (width,), "post_feedforward_layernorm": (width,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    return shapes


def _make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def f(x):\n    return x\n"], trainer)
    return tokenizer
