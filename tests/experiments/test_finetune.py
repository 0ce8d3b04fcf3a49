"""The parts of finetune that need no model's package: configs, tensors, tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.finetune import families, tokens
from experiments.finetune.finetune import main
from experiments.finetune.weights import Tensor
from experiments.train_lm.flags import Refusal
from experiments.train_lm.trainer import data
from tests.experiments.finetune.published import LLAMA31, VOCABULARY, config_of, make

DIFFERENT: list[tuple[str, dict[str, Any], str]] = [
    ("gpt2", {}, r"model_type 'gpt2' is none of llama, qwen3, gemma3_text"),
    ("qwen3", {"hidden_act": "gelu"}, r"hidden_act is 'gelu', but tunix's Qwen3 has 'silu'"),
    ("qwen3", {"rope_scaling": LLAMA31}, r"rope_scaling .* is not supported"),
    ("qwen3", {"head_dim": None}, r"without head_dim"),
    ("qwen3", {"quantization_config": {}}, r"quantization_config: quantised weights are not read"),
    ("llama", {"rope_scaling": {"type": "linear"}}, r"rope_scaling .* is not supported"),
    ("llama", {"rope_parameters": {}}, r"rope_parameters: give rope_theta"),
    ("gemma3_text", {"sliding_window_pattern": 2}, r"layers are not five of sliding attention"),
    ("gemma3_text", {"query_pre_attn_scalar": 7}, r"query_pre_attn_scalar 7 is none of \[8\]"),
    ("gemma3_text", {"tie_word_embeddings": False}, r"tunix's Gemma3 is tied"),
]


@pytest.mark.parametrize(("kind", "entries", "match"), DIFFERENT)
def test_a_model_that_tunix_would_compute_otherwise_is_refused(
    kind: str, entries: dict[str, Any], match: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of(kind, **entries)))
    with pytest.raises(Refusal, match=match):
        families.read(tmp_path)


def test_wrong_folders_are_refused(tmp_path: Path, refusal: Callable[..., str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    said = refusal(main, ["--model", str(folder)], name="finetune")
    assert "config.json: [Errno 2]" in said
    (folder / "config.json").write_text("[]")
    assert "model_type None" in refusal(main, ["--model", str(folder)], name="finetune")
    (folder / "config.json").write_text(json.dumps(config_of("qwen3")))
    few = ["--model", str(folder), "--ranks", "8"]
    assert "its 4 layers are fewer than the 8 stages" in refusal(main, few, name="finetune")
    unread = refusal(main, ["--model", str(folder)], name="finetune")
    assert "tokenizer.json: No such file" in unread
    alone = ["--model", str(folder), "--lora-alpha", "2"]
    assert "--lora-alpha 2.0: needs --lora-rank" in refusal(main, alone, name="finetune")


def test_llama31_divides_low_frequencies_alone() -> None:
    scaling = {**LLAMA31, "original_max_position_embeddings": 8192}
    config = {"head_dim": 128, "rope_theta": 500_000.0, "rope_scaling": scaling}
    fraction = np.arange(64) / 64
    with np.errstate(divide="ignore"):
        got = families.rope_base(config).astype(np.float64) ** -fraction
    plain = 500_000.0**-fraction
    waves = 2 * np.pi / plain
    # float32's bases.
    np.testing.assert_allclose(got[waves < 8192 / 4], plain[waves < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(got[waves > 8192], plain[waves > 8192] / 8, rtol=1e-6)
    between = (waves >= 8192 / 4) & (waves <= 8192)
    assert between.sum() > 3
    smooth = (8192 / waves[between] - 1) / (4 - 1)
    want = (1 - smooth) * plain[between] / 8 + smooth * plain[between]
    np.testing.assert_allclose(got[between], want, rtol=1e-6)


def test_a_leaf_goes_back_to_its_tensor() -> None:
    tensor = np.arange(24.0).reshape(6, 4)
    how = {"name": "q", "permuted": (1, 0), "shape": (4, 3, 2), "ordered": (1, 0, 2)}
    leaf = Tensor(leaf=(0, "q"), **how).to_leaf(tensor)
    assert leaf.shape == (3, 4, 2)
    assert leaf[2, 1, 1] == tensor[5, 1]
    np.testing.assert_array_equal(Tensor(leaf=(0, "q"), **how).from_leaf(leaf, (6, 4)), tensor)
    stacked = Tensor(leaf=(0, "q"), entry=1, **how)
    np.testing.assert_array_equal(stacked.from_leaf(np.stack([0 * leaf, leaf]), (6, 4)), tensor)


def test_text_becomes_tokens_that_become_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer

    make(tmp_path / "model", model_type="qwen3", num_hidden_layers=1)
    monkeypatch.setattr(tokens, "_PIECE", 64)
    lines = "".join(f"def f{n}(x):\n    return 'ä{n}'\n" for n in range(40))
    path = tmp_path / "text.py"
    path.write_text(lines, encoding="utf-8")
    text = data.read(path, min_length=10)
    encoded = tokens.encode(text, tmp_path / "model", vocab_size=VOCABULARY, min_length=10)
    assert encoded.unit == "token"
    whole = encoded.train.windows(np.zeros(1, int), len(encoded.train) - 1)[0]
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert len(whole) < len(text.train)
    assert tokenizer.decode(whole.tolist()) == lines.encode()[: len(text.train)].decode()
    with pytest.raises(Refusal, match=r"gives token \d+, but vocab_size in config\.json is 100"):
        tokens.encode(text, tmp_path / "model", vocab_size=100, min_length=10)
    with pytest.raises(Refusal, match=r"too little text: \d+ tokens on one side"):
        tokens.encode(text, tmp_path / "model", vocab_size=VOCABULARY, min_length=10**6)
