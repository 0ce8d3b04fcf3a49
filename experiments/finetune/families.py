"""config.json of a published model -> the tunix model that it describes.

Whatever tunix's model has built in is compared with the config, and refused where the two differ:
a model that computes something else would train without a word.
"""

import contextlib
import functools
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.train_lm.flags import Refusal

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Holds the tunix models of one architecture.

    Attributes:
      name: Of the package under `tunix.models`.
      params: The module in it that has the loader.
      model: The name of the model's class.
      built_in: Entries of config.json whose value tunix's model has built in; absent ones are
        taken for it.
      required: Entries that tunix's model takes from config.json.
      to_sizes: Makes the arguments of tunix's ModelConfig, all but dtypes.
      patches_rope: Whether its model calls `apply_rope` without the base.
    """

    name: str
    params: str
    model: str
    built_in: Mapping[str, Any]
    required: tuple[str, ...]
    to_sizes: Callable[[Config], dict[str, Any]]
    patches_rope: bool


@dataclass(frozen=True, kw_only=True)
class Published:
    """Describes a published model by its config.json.

    Attributes:
      family: Its architecture.
      config: The entries of config.json.
    """

    family: Family
    config: Config

    @property
    def num_layers(self) -> int:
        """How many layers it has."""
        return self.config["num_hidden_layers"]

    @property
    def vocab_size(self) -> int:
        """How many tokens its embedding has."""
        return self.config["vocab_size"]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return _is_tied(self.config)

    def tunix_config(self, dtype: Any) -> Any:
        """Makes tunix's ModelConfig; `dtype` is that of parameters and compute."""
        made = self._module("model").ModelConfig
        names = made.__dataclass_fields__
        dtypes = {name: dtype for name in ("dtype", "param_dtype") if name in names}
        sizes = self.family.to_sizes(self.config) | dtypes
        if "query_pre_attn_norm" in sizes:
            kinds = self._module("model").QueryPreAttentionNormalisation
            sizes["query_pre_attn_norm"] = kinds[sizes["query_pre_attn_norm"]]
        return made(**sizes)

    def make(self, dtype: Any) -> Any:
        """Makes the NNX module with random parameters; call it inside `nnx.eval_shape`."""
        from flax import nnx

        made = getattr(self._module("model"), self.family.model)
        return made(self.tunix_config(dtype), rngs=nnx.Rngs(0))

    def names(self) -> dict[str, Any]:
        """Gives the names that tunix's loader maps: `{pattern: (path, (permutation, shape))}`."""
        mapping = self._module(self.family.params)._get_key_and_transform_mapping
        return mapping(self.tunix_config("float32"))

    @contextlib.contextmanager
    def rope(self) -> Iterator[None]:
        """Has the model rotate by the config's base inside the `with`.

        tunix 0.1.7 calls its `apply_rope` without the `rope_theta` of its own ModelConfig, so that
        each Llama and Qwen3 is rotated by the base 1,000,000.
        """
        if not self.family.patches_rope:
            yield
            return
        module = self._module("model")
        own = module.apply_rope
        module.apply_rope = functools.partial(own, rope_theta=rope_base(self.config))
        try:
            yield
        finally:
            module.apply_rope = own

    def _module(self, name: str) -> Any:
        return importlib.import_module(f"tunix.models.{self.family.name}.{name}")


def read(folder: Path) -> Published:
    """Reads config.json of a folder.

    Raises:
      Refusal: If there is none, or if it describes a model that tunix's class does not compute.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise Refusal(f"--model {folder}: config.json: {text}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in FAMILIES:
        raise Refusal(
            f"--model {folder}: config.json: model_type {kind!r} is none of {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    missing = [name for name in family.required if config.get(name) is None]
    wrong = [
        f"{name} is {config[name]!r}, but tunix's {family.model} has {value!r}"
        for name, value in family.built_in.items()
        if config.get(name, value) != value
    ]
    wrong += [
        f"{name}: {why}"
        for name, why in (
            ("quantization_config", "quantised weights are not read"),
            ("rope_parameters", "give rope_theta and rope_scaling, as transformers 4 writes them"),
        )
        if config.get(name) is not None
    ]
    if missing:
        wrong.append(f"without {', '.join(missing)}")
    wrong += [
        f"{name} is {config[name]!r}, not {must}"
        for name, must in _MUST.items()
        if config.get(name) is not None and not _is_positive(config[name], must)
    ]
    if not wrong:
        wrong += _other_problems(kind, config)
    if wrong:
        raise Refusal(f"--model {folder}: config.json: {'; '.join(wrong)}")
    return Published(family=family, config=config)


def rope_base(config: Config) -> Any:
    """Gives the base of the rotary embedding: a number, or one for each pair of dims.

    Frequency i of n is `base_i ** (-i / n)`. Llama 3.1 divides low frequencies by a factor
    (`rope_scaling` of the type "llama3"), which is another base for each of them.
    """
    theta, scaling = config["rope_theta"], config.get("rope_scaling")
    if scaling is None:
        return theta
    count = _head_dim(config) // 2
    fraction = np.arange(count) / count
    frequencies = theta**-fraction
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = context * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)  # 1: as it is; 0: divided by the factor
    scaled = frequencies * (share + (1 - share) / scaling["factor"])
    bases = np.full(count, float(theta))
    bases[1:] = scaled[1:] ** (-1 / fraction[1:])
    return bases.astype(np.float32)


def _other_problems(kind: str, config: Config) -> list[str]:
    scaling = config.get("rope_scaling")
    problems = []
    if kind == "gemma3_text":
        if not _is_tied(config):
            problems.append("tie_word_embeddings is false, but tunix's Gemma3 is tied")
        if scaling is not None and _rope_type(scaling) != "linear":
            problems.append(f"rope_scaling {scaling!r} is not linear")
        layers = config["num_hidden_layers"]
        pattern = [f"{'full' if i % 6 == 5 else 'sliding'}_attention" for i in range(layers)]
        if config.get("layer_types", pattern) != pattern or config.get(
            "sliding_window_pattern", 6
        ) not in (None, 6):
            problems.append("layers are not five of sliding attention before each of full one")
        if config["query_pre_attn_scalar"] not in _query_scales(config):
            problems.append(
                f"query_pre_attn_scalar {config['query_pre_attn_scalar']} is none of "
                f"{list(_query_scales(config))}"
            )
    elif scaling is not None and (kind != "llama" or _rope_type(scaling) != "llama3"):
        problems.append(f"rope_scaling {scaling!r} is not supported")
    return problems


def _is_positive(value: Any, must: str) -> bool:
    types = int if must == "an integer above 0" else (int, float)
    return isinstance(value, types) and not isinstance(value, bool) and 0 < value < math.inf


def _rope_type(scaling: Any) -> Any:
    return scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _is_tied(config: Config) -> bool:
    # The default of `transformers` is true for Gemma 3, false for the others.
    return config.get("tie_word_embeddings", config["model_type"] == "gemma3_text")


def _query_scales(config: Config) -> dict[int, str]:
    """Names the two scales of queries that tunix knows."""
    return {
        config["hidden_size"] // config["num_attention_heads"]: (
            "BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS"
        ),
        _head_dim(config): "BY_ONE_OVER_SQRT_HEAD_DIM",
    }


def _common_sizes(config: Config) -> dict[str, Any]:
    return {
        "num_layers": config["num_hidden_layers"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "head_dim": _head_dim(config),
        "num_kv_heads": config["num_key_value_heads"],
    }


def _llama_sizes(config: Config, *, tied: str) -> dict[str, Any]:
    return _common_sizes(config) | {
        "vocab_size": config["vocab_size"],
        "rope_theta": config["rope_theta"],
        "norm_eps": config["rms_norm_eps"],
        tied: _is_tied(config),
    }


def _gemma_sizes(config: Config) -> dict[str, Any]:
    return _common_sizes(config) | {
        "num_embed": config["vocab_size"],
        "sliding_window_size": config["sliding_window"],
        "local_base_frequency": config["rope_local_base_freq"],
        "global_base_frequency": config["rope_theta"],
        "global_scale_factor": (config.get("rope_scaling") or {"factor": 1.0})["factor"],
        "query_pre_attn_norm": _query_scales(config)[config["query_pre_attn_scalar"]],
    }


_REQUIRED = (
    "num_hidden_layers",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
    "rms_norm_eps",
)
# The type of an entry, positive wherever it is.
_MUST = {
    **dict.fromkeys(_REQUIRED[:6], "an integer above 0"),
    **dict.fromkeys(("head_dim", "sliding_window", "query_pre_attn_scalar"), "an integer above 0"),
    **dict.fromkeys(("rope_theta", "rms_norm_eps", "rope_local_base_freq"), "a number above 0"),
}
_SILU = {"hidden_act": "silu", "attention_bias": False}

# By `model_type`.
FAMILIES = {
    "llama": Family(
        name="llama3",
        params="params",
        model="Llama3",
        built_in={**_SILU, "mlp_bias": False},
        required=_REQUIRED,
        to_sizes=functools.partial(_llama_sizes, tied="weight_tying"),
        patches_rope=True,
    ),
    "qwen3": Family(
        name="qwen3",
        params="params",
        model="Qwen3",
        built_in={**_SILU, "use_sliding_window": False},
        required=(*_REQUIRED, "head_dim"),
        to_sizes=functools.partial(_llama_sizes, tied="use_tied_embedding"),
        patches_rope=True,
    ),
    "gemma3_text": Family(
        name="gemma3",
        params="params_safetensors",
        model="Gemma3",
        built_in={
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
            "rms_norm_eps": 1e-6,
        },
        required=(
            *_REQUIRED,
            "head_dim",
            "sliding_window",
            "rope_local_base_freq",
            "query_pre_attn_scalar",
        ),
        to_sizes=_gemma_sizes,
        patches_rope=False,
    ),
}
