"""A tiny Llama whose every config field is away from its default, with weights from a generator keyed by tensor name.

Golden files then hold outputs only: `benchmarks/lm_golden.py` (torch) and the tests (no torch) make the same weights.
"""

import zlib
from pathlib import Path

import numpy as np

from tests.lm import families

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "tie_word_embeddings": False,
    "attention_bias": True,
    "mlp_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LENGTH = 40


def shapes(config: dict = CONFIG) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as transformers writes them."""
    d, m, h = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads = {
        "q_proj": config["num_attention_heads"] * h,
        "k_proj": config["num_key_value_heads"] * h,
        "v_proj": config["num_key_value_heads"] * h,
    }
    found = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], d)
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}"
        found |= {f"{block}.input_layernorm.weight": (d,), f"{block}.post_attention_layernorm.weight": (d,)}
        linear = {f"self_attn.{key}": (out, d) for key, out in heads.items()}
        linear |= {"self_attn.o_proj": (d, heads["q_proj"])}
        dense = {"mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}
        for group, bias in ((linear, config["attention_bias"]), (dense, config["mlp_bias"])):
            for key, shape in group.items():
                found[f"{block}.{key}.weight"] = shape
                if bias:
                    found[f"{block}.{key}.bias"] = shape[:1]
    return found


def tensors(config: dict = CONFIG) -> dict[str, np.ndarray]:
    """Every tensor in float32: norm gains around 1, matrices scaled so that activations stay of order 1."""
    made = {}
    for name, shape in shapes(config).items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if "norm" in name:
            made[name] = (1 + 0.3 * noise).astype(np.float32)
        else:
            made[name] = (noise * (1.5 / np.sqrt(shape[-1]) if len(shape) == 2 else 0.3)).astype(np.float32)
    return made


def tokens() -> np.ndarray:
    """Two rows of token ids, `[2, LENGTH]`."""
    return np.random.default_rng(7).integers(0, CONFIG["vocab_size"], (2, LENGTH))


def write(folder: Path, config: dict = CONFIG, weights: dict[str, np.ndarray] | None = None) -> Path:
    """Writes `config.json` and `model.safetensors`; returns the folder."""
    return families.write(folder, config, tensors(config) if weights is None else weights)
