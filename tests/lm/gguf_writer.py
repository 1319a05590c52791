"""Writes a tiny model as GGUF the way the converter of llama.cpp does; names come from the `gguf` package's own map."""

from pathlib import Path

import gguf
import numpy as np

from saejax.lm.hf_config import from_hf
from saejax.lm.rope import frequencies

ARCHS = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma2": "GEMMA2", "gemma3_text": "GEMMA3"}


def write(path: Path, config: dict, tensors: dict[str, np.ndarray], quantise: bool = False) -> None:
    """`config` is the Hugging Face one, `tensors` carry Hugging Face names; `quantise` stores matrices as Q8_0."""
    cfg = from_hf(config)
    kind = getattr(gguf.MODEL_ARCH, ARCHS[config["model_type"]])
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[kind])
    _fields(writer, cfg)
    names = gguf.get_tensor_name_map(kind, cfg.n_layers)
    for name, value in tensors.items():
        heads = cfg.n_heads if "q_proj" in name else cfg.n_kv_heads if "k_proj" in name else None
        if heads and cfg.family == "llama":
            value = value.reshape(heads, 2, cfg.head_dim // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        if name.endswith("norm.weight"):
            value = value + np.float32(cfg.norm_offset)
        where = names.get_name(name, (".weight", ".bias"))
        if quantise and value.ndim == 2:
            packed = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(where, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(where, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fields(writer: gguf.GGUFWriter, cfg) -> None:
    writer.add_block_count(cfg.n_layers)
    writer.add_context_length(cfg.max_context)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(cfg.d_mlp)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_rope_dimension_count(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    rope = cfg.ropes[0]
    writer.add_rope_freq_base(rope.theta)
    if rope.scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    if rope.scaling == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope.factor)
        writer.add_rope_scaling_orig_ctx_len(rope.original_context)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
    if rope.scaling == "llama3":
        plain = rope.theta ** -(np.arange(0, rope.dim, 2) / rope.dim)
        writer.add_tensor("rope_freqs.weight", (plain / frequencies(rope, 1)).astype(np.float32))
    if any(cfg.windows):
        writer.add_sliding_window(max(cfg.windows))
        writer.add_sliding_window_pattern([window > 0 for window in cfg.windows])
    if cfg.attn_softcap:
        writer.add_attn_logit_softcapping(cfg.attn_softcap)
        writer.add_final_logit_softcapping(cfg.final_softcap)
    if len(cfg.ropes) > 1:
        writer.add_rope_freq_base_swa(cfg.ropes[1].theta)
