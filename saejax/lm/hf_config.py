"""`LMConfig` from the dict of a Hugging Face `config.json`: one short reader per family.

A key that changes the forward pass and that no reader computes is refused by name, never ignored: dropping `rope_theta`
alone moves SmolLM2's logits by 7.4, and no test with default values can see it. Defaults are those of transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from saejax.base.errors import LMError
from saejax.lm.arch import LMConfig
from saejax.lm.fields import HARMLESS, Fields
from saejax.lm.hf_rope import rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def from_hf(config: Mapping[str, Any]) -> LMConfig:
    """`LMConfig` from the dict of a Hugging Face `config.json`.

    Rope settings are read from `rope_parameters` (transformers 5) and from the older places. Raises LMError for a
    model type without a decoder, and one LMError that lists every missing field, every unknown field that is set, and
    every field set to a value that the decoder does not compute.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in READERS:
        raise LMError(f"model_type={model_type!r} has no decoder here: supported are {', '.join(sorted(READERS))}")
    fields = Fields(config, f"model config of type {model_type!r}")
    fields.ignore("model_type", *HARMLESS)
    values = READERS[model_type](fields)
    fields.finish()
    return LMConfig(family=model_type, **values)


def _modern(fields: Fields, *, theta: float | None = 1e4, eps: float = 1e-6, context: int = 2048, tied: bool = False,
            part: float | None = None) -> dict:
    """The keys that all families after GPT-NeoX share: sizes, RMSNorm, gated MLP, one rope (unless `theta` is None)."""
    n_heads, d_model = fields.size("num_attention_heads"), fields.size("hidden_size")
    n_layers, head_dim = fields.size("num_hidden_layers"), fields.size("head_dim", max(1, d_model // n_heads))
    max_context = fields.size("max_position_embeddings", context)
    return {
        "vocab_size": fields.size("vocab_size"),
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": fields.size("num_key_value_heads", n_heads),
        "head_dim": head_dim,
        "d_mlp": fields.size("intermediate_size"),
        "norm_eps": fields.number("rms_norm_eps", eps),
        "max_context": max_context,
        "tied_embeddings": fields.get("tie_word_embeddings", bool, tied),
        "attn_scales": (head_dim**-0.5,) * n_layers,
        "layer_rope": (0,) * n_layers,
    } | ({} if theta is None else {"ropes": (rope(fields, head_dim, theta, max_context, part=part),)})


def _silu(fields: Fields) -> dict:
    return {"activation": _ACTIVATIONS[fields.one_of("hidden_act", _ACTIVATIONS, "silu")]}


def _attention_bias(fields: Fields, default: bool = False) -> dict:
    bias = fields.get("attention_bias", bool, default)
    return {"qkv_bias": bias, "attn_out_bias": bias}


def _windows(fields: Fields, sliding: list[bool], default: int | None) -> tuple[int, ...]:
    """Window of each layer; `layer_types`, where the config has it, decides which layers slide."""
    types = fields.value("layer_types", None)
    if types is not None:
        if not isinstance(types, list | tuple) or any(kind not in (*_LAYER_TYPES,) for kind in types):
            fields.refuse(f"layer_types holds more than {' and '.join(_LAYER_TYPES)}")
        else:
            sliding = [_LAYER_TYPES[kind] for kind in types]
    fields.ignore("sliding_window")
    window = fields.optional(fields.size, "sliding_window", default) if any(sliding) else None
    return tuple(window or 0 if slides else 0 for slides in sliding)


def _llama(fields: Fields) -> dict:
    fields.only(pretraining_tp=1, rope_interleaved=False)
    return _modern(fields) | _silu(fields) | _attention_bias(fields) | {"mlp_bias": fields.get("mlp_bias", bool, False)}


def _mistral(fields: Fields) -> dict:
    fields.values.setdefault("num_key_value_heads", 8)
    values = _modern(fields, context=4096 * 32)
    return values | _silu(fields) | {"windows": _windows(fields, [True] * values["n_layers"], 4096)}


def _qwen_windows(fields: Fields, n_layers: int) -> tuple[int, ...]:
    first, slides = fields.count("max_window_layers", 28), fields.get("use_sliding_window", bool, False)
    windows = _windows(fields, [i >= first for i in range(n_layers)], 4096)
    return windows if slides else (0,) * n_layers


def _qwen2(fields: Fields) -> dict:
    values = _modern(fields, context=32768)
    return values | _silu(fields) | {"qkv_bias": True, "windows": _qwen_windows(fields, values["n_layers"])}


def _qwen3(fields: Fields) -> dict:
    fields.values.setdefault("head_dim", 128)
    values = _modern(fields, context=32768)
    own = {"qk_norm": "head", "windows": _qwen_windows(fields, values["n_layers"])}
    return values | _silu(fields) | _attention_bias(fields) | own


def _gemma(fields: Fields, values: dict, sliding: list[bool]) -> dict:
    """What Gemma 2 and 3 share."""
    fields.only(use_bidirectional_attention=False)
    fields.ignore("hidden_act")
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    own = {
        "activation": _ACTIVATIONS[fields.one_of("hidden_activation", _ACTIVATIONS, "gelu_pytorch_tanh")],
        "attn_scales": (scale,) * values["n_layers"],
        "windows": _windows(fields, sliding, 4096),
        "norm_offset": 1.0,
        "norm_places": "both",
        "embed_scale": values["d_model"] ** 0.5,
    }
    return values | _attention_bias(fields) | own


def _gemma2(fields: Fields) -> dict:
    fields.values.setdefault("head_dim", 256)
    if fields.values.get("sliding_window_size") == fields.values.get("sliding_window", 4096):
        fields.ignore("sliding_window_size")
    values = _modern(fields, context=8192, tied=True)
    values["attn_softcap"] = fields.optional(fields.number, "attn_logit_softcapping", 50.0) or 0.0
    values["final_softcap"] = fields.optional(fields.number, "final_logit_softcapping", 30.0) or 0.0
    return _gemma(fields, values, [i % 2 == 0 for i in range(values["n_layers"])])


_GEMMA3_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
}


def _gemma3(fields: Fields) -> dict:
    for key, value in _GEMMA3_DEFAULTS.items():
        fields.values.setdefault(key, value)
    n_layers, head_dim = fields.size("num_hidden_layers"), fields.size("head_dim")
    context = fields.size("max_position_embeddings", 131072)
    far = rope(fields, head_dim, 1e6, context, nested="full_attention")
    near = rope(fields, head_dim, 1e4, context, nested="sliding_attention", theta_key="rope_local_base_freq")
    pattern = fields.size("sliding_window_pattern", fields.size("_sliding_window_pattern", 6))
    sliding = [bool((i + 1) % pattern) for i in range(n_layers)]
    types = fields.value("layer_types", None)
    if isinstance(types, list) and len(types) == n_layers:
        sliding = [kind == "sliding_attention" for kind in types]
    values = _modern(fields, theta=None, context=131072, tied=True)
    values |= {"ropes": (far, near), "layer_rope": tuple(map(int, sliding)), "qk_norm": "head"}
    # transformers applies no soft-cap to Gemma 3's scores whatever the key says.
    fields.only(attn_logit_softcapping=None)
    values["final_softcap"] = fields.optional(fields.number, "final_logit_softcapping", None) or 0.0
    return _gemma(fields, values, sliding)


def _gemma3_text_part(fields: Fields) -> dict:
    """The text part of a multimodal Gemma 3 (`text_config`); what only concerns images is not read."""
    fields.ignore("vision_config", "mm_tokens_per_image")
    fields.ignore(*(f"{token}_token_{key}" for token in ("boi", "eoi", "image") for key in ("index", "id")))
    text = fields.section("text_config", {})
    text.ignore(*HARMLESS)
    text.only(model_type="gemma3_text")
    # transformers ties by the outer key alone.
    text.values["tie_word_embeddings"] = fields.get("tie_word_embeddings", bool, True)
    values = _gemma3(text)
    text.refuse_unread()
    return values


def _smollm3(fields: Fields) -> dict:
    fields.ignore("pretraining_tp", "max_window_layers")
    fields.values.setdefault("num_key_value_heads", 4)
    values = _modern(fields, theta=2e6, context=32768, tied=True)
    n_layers, interval = values["n_layers"], fields.size("no_rope_layer_interval", 4)
    rotates = fields.value("no_rope_layers", [int((i + 1) % interval != 0) for i in range(n_layers)])
    if not isinstance(rotates, list | tuple) or len(rotates) < n_layers or any(flag not in (0, 1) for flag in rotates):
        fields.refuse(f"no_rope_layers must be {n_layers} zeros (no rope) and ones")
        rotates = [1] * n_layers
    slides = fields.get("use_sliding_window", bool, False)
    windows = _windows(fields, [not flag for flag in rotates[:n_layers]], None)
    own = {"layer_rope": tuple(flag - 1 for flag in rotates[:n_layers]), "windows": windows if slides else (0,) * n_layers}
    bias = {"mlp_bias": fields.get("mlp_bias", bool, False)}
    return values | _silu(fields) | _attention_bias(fields) | bias | own


def _olmo2(fields: Fields) -> dict:
    values = _modern(fields, eps=1e-5)
    return values | _silu(fields) | _attention_bias(fields) | {"norm_places": "post", "qk_norm": "full"}


def _phi3(fields: Fields) -> dict:
    fields.only(full_attn_mod=1, interpolate_factor=1)
    fields.values.setdefault("original_max_position_embeddings", 4096)
    values = _modern(fields, eps=1e-5, context=4096, part=1.0)
    return values | _silu(fields) | {"windows": _windows(fields, [True] * values["n_layers"], None)}


def _layer_norm_family(fields: Fields, keys: Mapping[str, str], eps: str, act: str, context: int, tied: bool) -> dict:
    """GPT-2 and GPT-NeoX: LayerNorm, biases everywhere, one query head per key head, MLP without gate."""
    d_model, n_heads = fields.size(keys["d_model"]), fields.size(keys["n_heads"])
    if d_model % n_heads:
        fields.refuse(f"{keys['d_model']}={d_model} is not a multiple of {keys['n_heads']}={n_heads}")
    default = "gelu_new" if act == "activation_function" else "gelu"
    return {
        "vocab_size": fields.size("vocab_size"),
        "d_model": d_model,
        "n_layers": fields.size(keys["n_layers"]),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": max(1, d_model // n_heads),
        "norm_eps": fields.number(eps, 1e-5),
        "max_context": fields.size(keys["max_context"], context),
        "tied_embeddings": fields.get("tie_word_embeddings", bool, tied),
        "norm": "layer",
        "gated": False,
        "activation": _ACTIVATIONS[fields.one_of(act, _ACTIVATIONS, default)],
        "mlp_bias": True,
    }


def _gpt2(fields: Fields) -> dict:
    keys = {"d_model": "n_embd", "n_heads": "n_head", "n_layers": "n_layer", "max_context": "n_positions"}
    values = _layer_norm_family(fields, keys, "layer_norm_epsilon", "activation_function", 1024, True)
    fields.only(add_cross_attention=False)
    scale = values["head_dim"] ** -0.5 if fields.get("scale_attn_weights", bool, True) else 1.0
    by_layer = fields.get("scale_attn_by_inverse_layer_idx", bool, False)
    return values | {
        "d_mlp": fields.size("n_inner", 4 * values["d_model"]),
        "attn_scales": tuple(scale / (i + 1 if by_layer else 1) for i in range(values["n_layers"])),
        "learned_positions": True,
        "qkv_bias": True,
        "attn_out_bias": True,
    }


def _gpt_neox(fields: Fields) -> dict:
    keys = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
        "max_context": "max_position_embeddings",
    }
    values = _layer_norm_family(fields, keys, "layer_norm_eps", "hidden_act", 2048, False)
    n, head_dim = values["n_layers"], values["head_dim"]
    turned = rope(
        fields, head_dim, 1e4, values["max_context"], theta_key="rotary_emb_base", part_key="rotary_pct", part=0.25
    )
    own = {"ropes": (turned,), "layer_rope": (0,) * n, "attn_scales": (head_dim**-0.5,) * n}
    own |= {"d_mlp": fields.size("intermediate_size"), "parallel": fields.get("use_parallel_residual", bool, True)}
    return values | _attention_bias(fields, True) | own


READERS: dict[str, Callable[[Fields], dict]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3_text_part,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "olmo2": _olmo2,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "smollm3": _smollm3,
}
