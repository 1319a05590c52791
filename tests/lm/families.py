"""Tiny random models of every family, each config field away from its default, weights keyed by tensor name.

Golden files then hold outputs only: `benchmarks/lm_golden.py` (torch) and the tests (no torch) make the same weights.
"""

import json
import zlib
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from saejax.lm.arch import LMConfig
from saejax.lm.hf_config import from_hf
from saejax.lm.tensor_layout import hf_recipes

LENGTH = 64
TOKENS = np.random.default_rng(11).integers(0, 53, (2, LENGTH))
# (row, position) at which hookpoints are kept, both past every window.
POSITIONS = ((0, 63), (1, 30))

_BASE = {
    "vocab_size": 53,
    "hidden_size": 40,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
_WIDE = _BASE | {"head_dim": 12}
_ROPE = {"rope_type": "default", "rope_theta": 70.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 70.0,
    "factor": 5.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = _WIDE | {
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}

_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 53,
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "layer_norm_eps": 3e-3,
}


def _longrope(original: int) -> dict:
    """Phi-3's rope for a model whose original context is `original` tokens."""
    factors = {"short_factor": [1.0, 1.2, 1.5], "long_factor": [1.0, 2.0, 3.5]}
    rope = {"rope_type": "longrope", "rope_theta": 70.0, "partial_rotary_factor": 0.6, **factors}
    place = {"original_max_position_embeddings": original}
    return {"rope_parameters": rope | place} | place


# A tiny SigLIP tower, of which nothing may be read.
_VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}


CONFIGS: dict[str, dict] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 53,
        "n_embd": 40,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 44,
        "n_positions": 64,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 3e-3,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": True,
    },
    "gpt_neox": _NEOX
    | {
        "hidden_act": "gelu",
        "rope_parameters": _ROPE | {"partial_rotary_factor": 0.4},
    },
    "gpt_neox_serial": _NEOX
    | {
        "hidden_act": "relu",
        "rope_parameters": _ROPE | {"rope_type": "linear", "partial_rotary_factor": 0.8, "factor": 3.0},
        "use_parallel_residual": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
    },
    "llama3": _WIDE
    | {
        "model_type": "llama",
        "rope_parameters": _LLAMA3,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama_linear": _WIDE
    | {
        "model_type": "llama",
        "rope_parameters": _ROPE | {"rope_type": "linear", "factor": 3.0},
        "tie_word_embeddings": True,
    },
    "mistral": _WIDE
    | {
        "model_type": "mistral",
        "rope_parameters": _ROPE,
        "sliding_window": 9,
    },
    "qwen2": _BASE
    | {
        "model_type": "qwen2",
        "rope_parameters": _ROPE,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": _WIDE
    | {
        "model_type": "qwen3",
        "rope_parameters": _ROPE,
        "attention_bias": True,
    },
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "rope_parameters": _ROPE,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": _GEMMA
    | {
        "model_type": "gemma3_text",
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 200.0, "factor": 4.0},
        },
        "final_logit_softcapping": 3.0,
    },
    "gemma3_multimodal": {
        "model_type": "gemma3",
        "text_config": _GEMMA
        | {
            "model_type": "gemma3_text",
            "sliding_window_pattern": 2,
            "rope_theta": 200.0,
            "rope_local_base_freq": 30.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
        "boi_token_index": 50,
        "eoi_token_index": 51,
        "image_token_index": 52,
        "tie_word_embeddings": False,
    },
    "llama_yarn": _WIDE
    | {
        "model_type": "llama",
        "rope_theta": 70.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 1.5,
            "beta_slow": 0.4,
            "mscale": 2.0,
            "mscale_all_dim": 0.5,
        },
    },
    "qwen2_yarn": _BASE
    | {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 70.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 2.0,
            "beta_slow": 0.7,
            "truncate": False,
        },
    },
    "smollm3": _BASE
    | {
        "model_type": "smollm3",
        "rope_parameters": _ROPE,
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 10,
    },
    "olmo2": _BASE
    | {
        "model_type": "olmo2",
        "rope_parameters": _ROPE,
    },
    "phi3": _BASE | _longrope(32) | {"model_type": "phi3", "sliding_window": 11},
    "phi3_short": _BASE
    | _longrope(64)
    | {
        "model_type": "phi3",
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    },
}


def shapes(cfg: LMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor as transformers writes it; torch refuses the weights if one is wrong."""
    return {
        part.name.format(i=i): part.shape
        for name, recipe in hf_recipes(cfg).items()
        for part in recipe.parts
        for i in (range(cfg.n_layers) if name.startswith("blocks.") else (None,))
    }


def vision_shapes(text: int, width: int, hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of `_VISION` and its projector to `text` dimensions, as the files of Gemma 3 name them."""
    tower = "vision_tower.vision_model."
    found = {
        "multi_modal_projector.mm_input_projection_weight": (width, text),
        "multi_modal_projector.mm_soft_emb_norm.weight": (width,),
        f"{tower}embeddings.patch_embedding.weight": (width, 3, 4, 4),
        f"{tower}embeddings.patch_embedding.bias": (width,),
        f"{tower}embeddings.position_embedding.weight": (4, width),
    }
    norms = [f"{tower}post_layernorm"]
    for layer in (f"{tower}encoder.layers.{i}." for i in range(layers)):
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
        sides = {f"self_attn.{part}": (width, width) for part in ("q_proj", "k_proj", "v_proj", "out_proj")}
        sides |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
        for part, shape in sides.items():
            found |= {f"{layer}{part}.weight": shape, f"{layer}{part}.bias": shape[:1]}
    return found | {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}


def all_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """`shapes`, and those of a vision tower where the config has one."""
    cfg, vision = from_hf(config), config.get("vision_config")
    if vision is None:
        return shapes(cfg)
    sizes = (vision[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    return shapes(cfg) | vision_shapes(cfg.d_model, *sizes)


def tensors(config: dict) -> dict[str, np.ndarray]:
    """Every tensor in float32: norm gains around 1, matrices scaled so that activations stay of order 1."""
    cfg, made = from_hf(config), {}
    for name, shape in all_shapes(config).items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif len(shape) == 1:
            value = 1 - cfg.norm_offset + 0.3 * noise
        else:
            value = noise * 1.5 / np.sqrt(cfg.d_model)
        made[name] = value.astype(np.float32)
    return made


def write(folder: Path, config: dict, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Writes `config.json` and `model.safetensors`; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors(config) if weights is None else weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
