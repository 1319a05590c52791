"""What a language model computes: one frozen `LMConfig`, read from a Hugging Face config or from GGUF metadata.

A field that changes the forward pass and that the decoder does not compute is refused by name, never ignored: dropping
`rope_theta` alone moves SmolLM2's logits by 7.4, and no test with default values can see it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saejax.errors import LMError


@dataclass(frozen=True)
class LMConfig:
    """Architecture of a decoder-only language model; hashable, so that it may be a static argument of `jax.jit`.

    Sizes are numbers of elements; `max_context` is in tokens; `rope_theta` is the base of the rotary frequencies
    `rope_theta ** (-2 i / head_dim)`; `norm_eps` is added to the mean square inside the square root of RMSNorm.
    """

    family: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_mlp: int
    norm_eps: float
    rope_theta: float
    max_context: int
    tied_embeddings: bool
    attn_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "max_context")
        wrong = [f"{name}={getattr(self, name)!r}" for name in sizes if not _is_size(getattr(self, name))]
        wrong += [
            f"{name}={value!r}"
            for name, value in (("norm_eps", self.norm_eps), ("rope_theta", self.rope_theta))
            if not (isinstance(value, float) and math.isfinite(value) and value > 0)
        ]
        if wrong:
            raise LMError(
                f"model config: {', '.join(wrong)} must be positive numbers below 2^31: check the config file"
            )
        if self.n_heads % self.n_kv_heads:
            raise LMError(f"model config: n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise LMError(f"model config: head_dim={self.head_dim} is odd, rotary embedding needs pairs")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


# Keys of a Hugging Face config that never change the forward pass at inference.
_HF_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map
    bos_token_id chunk_size_feed_forward dtype eos_token_id finetuning_task id2label initializer_range is_llama_config
    label2id output_attentions output_hidden_states pad_token_id problem_type return_dict task_specific_params
    tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
""".split()
)

_HF_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_HF_REQUIRED = _HF_SIZES[:5]
_HF_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")
_HF_READ = frozenset(
    {*_HF_SIZES, *_HF_SWITCHES, "model_type", "rms_norm_eps", "rope_theta", "rope_parameters", "rope_scaling"}
)

# Keys that would change the forward pass: only the listed value is computed.
_HF_LLAMA_ONLY = {"hidden_act": "silu", "pretraining_tp": 1, "rope_interleaved": False}


def from_hf(config: Mapping[str, Any]) -> LMConfig:
    """`LMConfig` from the dict of a Hugging Face `config.json`.

    The rope base is read from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (older
    files). Raises LMError for a model type without a decoder, and one LMError that lists every missing field, every
    unknown field that is set, and every field set to a value that the decoder does not compute.
    """
    model_type = config.get("model_type")
    if model_type not in HF_READERS:
        raise LMError(f"model_type={model_type!r} has no decoder here: supported are {', '.join(sorted(HF_READERS))}")
    return HF_READERS[model_type](config)


def _llama_from_hf(config: Mapping[str, Any]) -> LMConfig:
    config = {key: value for key, value in config.items() if value is not None}
    problems = [f"{key} is missing" for key in _HF_REQUIRED if key not in config]
    problems += [
        f"{key}={_short(config[key])} (not a size)" for key in _HF_SIZES if key in config and not _is_size(config[key])
    ]
    problems += [
        f"{key}={_short(config[key])} (not true or false)"
        for key in _HF_SWITCHES
        if not isinstance(config.get(key, False), bool)
    ]
    problems += [
        f"{key}={_short(config[key])} (only {value!r} is computed)"
        for key, value in _HF_LLAMA_ONLY.items()
        if config.get(key, value) != value
    ]
    problems += [
        f"{key}={_short(value)} (unknown field)"
        for key, value in config.items()
        if value is not False and key not in (_HF_READ | _HF_HARMLESS | set(_HF_LLAMA_ONLY))
    ]
    theta = _rope_theta(config, problems)
    eps = _number("rms_norm_eps", config.get("rms_norm_eps", 1e-6), problems)
    if problems:
        raise LMError(f"model config of type 'llama' is not computed by the decoder: {'; '.join(problems)}")
    n_heads, d_model = config["num_attention_heads"], config["hidden_size"]
    return LMConfig(
        family="llama",
        vocab_size=config["vocab_size"],
        d_model=d_model,
        n_layers=config["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=config.get("num_key_value_heads", n_heads),
        head_dim=config.get("head_dim", d_model // n_heads),
        d_mlp=config["intermediate_size"],
        norm_eps=eps,
        rope_theta=theta,
        max_context=config.get("max_position_embeddings", 2048),
        tied_embeddings=config.get("tie_word_embeddings", False),
        attn_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )


def _rope_theta(config: Mapping[str, Any], problems: list[str]) -> float:
    """The rope base from either spelling; every scaling or partial rotation is added to `problems`."""
    values = {_number("rope_theta", config["rope_theta"], problems)} if "rope_theta" in config else set()
    for where in ("rope_parameters", "rope_scaling"):
        block = config.get(where, {})
        if not isinstance(block, Mapping):
            problems.append(f"{where}={_short(block)} (not an object)")
            continue
        kind = block.get("rope_type", block.get("type", "default"))
        if kind != "default":
            problems.append(f"{where}.rope_type={kind!r} (rope scaling is not computed)")
        elif extra := sorted(set(block) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}):
            problems.append(f"{where}.{'/'.join(extra)} (unknown field)")
        if block.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"{where}.partial_rotary_factor={block['partial_rotary_factor']!r} (only 1.0 is computed)")
        if block.get("rope_theta") is not None:
            values.add(_number(f"{where}.rope_theta", block["rope_theta"], problems))
    if len(values) > 1:
        problems.append(f"rope_theta is given as {' and '.join(str(value) for value in sorted(values))}")
    return max(values, default=10000.0)


def _number(key: str, value: Any, problems: list[str]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.append(f"{key}={_short(value)} (not a number)")
        return 1.0
    return float(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# GGUF fields under `llama.` that the decoder reads: sizes first, the required ones before `head_count_kv`.
_GGUF_SIZES = (
    "embedding_length",
    "block_count",
    "attention.head_count",
    "feed_forward_length",
    "context_length",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "vocab_size",
)
_GGUF_REQUIRED = _GGUF_SIZES[:5]
_GGUF_NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")


def from_gguf(fields: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> LMConfig:
    """`LMConfig` from GGUF key-value fields; `tensor_shapes` (row-major) tell tying, biases and the vocabulary size.

    Raises LMError for another architecture, and one LMError that lists every missing or uncomputed field.
    """
    arch = fields.get("general.architecture")
    if arch not in GGUF_READERS:
        known = ", ".join(sorted(GGUF_READERS))
        raise LMError(f"GGUF general.architecture={arch!r} has no decoder here: supported are {known}")
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    return GGUF_READERS[arch](own, tensor_shapes)


def _llama_from_gguf(own: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]) -> LMConfig:
    required = (*_GGUF_REQUIRED, "attention.layer_norm_rms_epsilon")
    problems = [f"llama.{key} is missing" for key in required if key not in own]
    problems += [
        f"llama.{key}={_short(own[key])} (not a size)" for key in _GGUF_SIZES if key in own and not _is_size(own[key])
    ]
    problems += [
        f"llama.{key}={_short(value)} (not computed)"
        for key, value in own.items()
        if key not in (*_GGUF_SIZES, *_GGUF_NUMBERS) and (key, value) != ("rope.scaling.type", "none")
    ]
    if "rope_freqs.weight" in tensor_shapes:
        problems.append("tensor rope_freqs.weight (rope scaling is not computed)")
    if "token_embd.weight" not in tensor_shapes:
        problems.append("tensor token_embd.weight is missing")
    eps = _number("llama.attention.layer_norm_rms_epsilon", own.get("attention.layer_norm_rms_epsilon", 1.0), problems)
    theta = _number("llama.rope.freq_base", own.get("rope.freq_base", 10000.0), problems)
    if not problems:
        n_heads, d_model = own["attention.head_count"], own["embedding_length"]
        head_dim = own.get("attention.key_length", d_model // n_heads)
        problems += [
            f"llama.{key}={own[key]} differs from head_dim={head_dim}"
            for key in ("rope.dimension_count", "attention.value_length")
            if own.get(key, head_dim) != head_dim
        ]
    if problems:
        raise LMError(f"GGUF model of architecture 'llama' is not computed by the decoder: {'; '.join(problems)}")
    return LMConfig(
        family="llama",
        vocab_size=tensor_shapes["token_embd.weight"][0],
        d_model=d_model,
        n_layers=own["block_count"],
        n_heads=n_heads,
        n_kv_heads=own.get("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        d_mlp=own["feed_forward_length"],
        norm_eps=eps,
        rope_theta=theta,
        max_context=own["context_length"],
        tied_embeddings="output.weight" not in tensor_shapes,
        attn_bias="blk.0.attn_q.bias" in tensor_shapes,
        mlp_bias="blk.0.ffn_up.bias" in tensor_shapes,
    )


HF_READERS = {"llama": _llama_from_hf}
GGUF_READERS = {"llama": _llama_from_gguf}
