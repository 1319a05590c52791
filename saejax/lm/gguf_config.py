"""`LMConfig` from the key-value fields of a GGUF file, for the Llama, Qwen and Gemma architectures.

GGUF leaves to its readers what a family has in common; those values (attention scale, window pattern, local rope base)
are the ones llama.cpp uses. `rope_freqs.weight` (Llama 3 scaling) is read as divisors of the rope frequencies, on top of
linear scaling where the file has both; a scaling factor without a type is linear. With yarn, cosine and sine are
multiplied by 1 + ln(factor) / 10.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from saejax.base.errors import LMError
from saejax.lm.arch import LMConfig, RopeConfig
from saejax.lm.fields import Fields

Read = Callable[[str], np.ndarray]


def from_gguf(fields: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]], read: Read) -> LMConfig:
    """`LMConfig` from GGUF key-value fields; `tensor_shapes` (row-major) tell tying, biases and the vocabulary size.

    `read(name)` gives a tensor. Raises LMError for another architecture, and one LMError that lists every missing or
    uncomputed field.
    """
    arch = fields.get("general.architecture")
    if not isinstance(arch, str) or arch not in READERS:
        known = ", ".join(sorted(READERS))
        raise LMError(f"GGUF general.architecture={arch!r} has no decoder here: supported are {known}")
    own = {key.removeprefix(f"{arch}."): value for key, value in fields.items() if key.startswith(f"{arch}.")}
    found = Fields(own, f"GGUF model of architecture {arch!r}")
    if "token_embd.weight" not in tensor_shapes:
        found.refuse("tensor token_embd.weight is missing")
        found.finish()
    values = _common(found, tensor_shapes, read)
    values |= READERS[arch](found, values)
    found.finish()
    return LMConfig(family={"gemma3": "gemma3_text"}.get(arch, arch), **values)


def _common(fields: Fields, shapes: Mapping[str, tuple[int, ...]], read: Read) -> dict:
    n_heads, d_model = fields.size("attention.head_count"), fields.size("embedding_length")
    n_layers, max_context = fields.size("block_count"), fields.size("context_length")
    head_dim = fields.size("attention.key_length", max(1, d_model // n_heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            fields.refuse(f"{key}={fields.values[key]} differs from head_dim={head_dim}")
    fields.ignore("vocab_size")
    return {
        "vocab_size": shapes["token_embd.weight"][0],
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": fields.size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "d_mlp": fields.size("feed_forward_length"),
        "norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "max_context": max_context,
        "tied_embeddings": "output.weight" not in shapes,
        "attn_scales": (head_dim**-0.5,) * n_layers,
        "ropes": (_rope(fields, head_dim, max_context, shapes, read),),
        "layer_rope": (0,) * n_layers,
        "qkv_bias": "blk.0.attn_q.bias" in shapes,
        "attn_out_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
    }


def _rope(fields: Fields, dim: int, max_context: int, shapes: Mapping, read: Read) -> RopeConfig:
    theta = fields.number("rope.freq_base", 1e4)
    kind = fields.value("rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", 1.0) or 1.0  # llama.cpp reads 0 as not given
    fields.only(**{"rope.scaling.attn_factor": 1.0})
    fields.ignore("rope.scaling.original_context_length", "rope.scaling.finetuned")
    if kind == "yarn":
        if "rope_freqs.weight" in shapes:
            fields.refuse("rope.scaling.type='yarn' with a tensor rope_freqs.weight")
        return _yarn(fields, theta, dim, factor, max_context)
    if kind not in ("none", "linear"):
        fields.refuse(f"rope.scaling.type={kind!r} (computed are none, linear, yarn)")
    elif kind == "none" and factor != 1.0:
        fields.refuse(f"rope.scaling.type='none' with rope.scaling.factor={factor}")
    if "rope_freqs.weight" not in shapes:
        return RopeConfig(theta, dim, **({"scaling": "linear", "factor": factor} if factor != 1.0 else {}))
    divisors = tuple(factor * float(x) for x in read("rope_freqs.weight").reshape(-1))
    return RopeConfig(
        theta, dim, scaling="longrope", original_context=max_context, short_factors=divisors, long_factors=divisors
    )


def _yarn(fields: Fields, theta: float, dim: int, factor: float, max_context: int) -> RopeConfig:
    fields.only(
        **{
            "rope.scaling.yarn_ext_factor": 1.0,
            "rope.scaling.yarn_attn_factor": 1.0,
            "rope.scaling.yarn_log_multiplier": 0.0,
        }
    )
    return RopeConfig(
        theta,
        dim,
        scaling="yarn",
        factor=factor,
        original_context=fields.size("rope.scaling.original_context_length", max_context),
        attention_factor=1 + 0.1 * math.log(max(factor, 1.0)),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1.0),
    )


def _llama(fields: Fields, values: dict) -> dict:
    return {}


def _qwen3(fields: Fields, values: dict) -> dict:
    return {"qk_norm": "head"}


def _gemma(fields: Fields, values: dict, period: int, layers_of_27b: int) -> dict:
    """Gemma 2 and 3; the 27B models scale scores by d_model / n_heads instead of the head width."""
    n_layers = values["n_layers"]
    scalar = values["d_model"] / values["n_heads"] if n_layers == layers_of_27b else values["head_dim"]
    window = fields.size("attention.sliding_window")
    slides = _sliding(fields, n_layers, period)
    return {
        "activation": "gelu_tanh",
        "attn_scales": (scalar**-0.5,) * n_layers,
        "windows": tuple(window if sliding else 0 for sliding in slides),
        "norm_offset": 1.0,
        "norm_places": "both",
        "embed_scale": values["d_model"] ** 0.5,
        "attn_softcap": fields.number("attn_logit_softcapping", 0.0),
        "final_softcap": fields.number("final_logit_softcapping", 0.0),
    }


def _sliding(fields: Fields, n_layers: int, period: int) -> list[bool]:
    """Which layers have the window: every `period`-th has not, unless the file says so layer by layer."""
    given = fields.value("attention.sliding_window_pattern", period)
    if isinstance(given, list):
        if len(given) != n_layers:
            fields.refuse(f"attention.sliding_window_pattern has {len(given)} values for {n_layers} layers")
        return [bool(flag) for flag in given]
    period = fields.size("attention.sliding_window_pattern", period)
    return [(i + 1) % period != 0 for i in range(n_layers)]


def _gemma2(fields: Fields, values: dict) -> dict:
    fields.values.setdefault("attn_logit_softcapping", 50.0)
    fields.values.setdefault("final_logit_softcapping", 30.0)
    return _gemma(fields, values, 2, 46)


def _gemma3(fields: Fields, values: dict) -> dict:
    own = _gemma(fields, values, 6, 62)
    near = RopeConfig(fields.number("rope.freq_base_swa", 1e4), values["head_dim"])
    if "rope.freq_base" not in fields.values:
        fields.refuse("rope.freq_base is missing")
    layer_rope = tuple(int(window > 0) for window in own["windows"])
    return own | {"ropes": (values["ropes"][0], near), "layer_rope": layer_rope, "qk_norm": "head"}


READERS = {"gemma2": _gemma2, "gemma3": _gemma3, "llama": _llama, "qwen2": _llama, "qwen3": _qwen3}
