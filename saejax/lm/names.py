"""Tensor names of every family, by file format: what a new family adds beside its config reader.

A projection's entry has no `.weight` or `.bias`, both are derived from it; `{i}` is the layer. `qkv` stands for q, k
and v in one tensor, `gate_up` for gate and up. Projections are stored [out, in] unless the family is in TRANSPOSED.
"""

_LLAMA = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "unembed": "lm_head",
    "ln1": "model.layers.{i}.input_layernorm",
    "ln2": "model.layers.{i}.post_attention_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "o": "model.layers.{i}.self_attn.o_proj",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
_GEMMA = _LLAMA | {
    "ln1_post": "model.layers.{i}.post_attention_layernorm",
    "ln2": "model.layers.{i}.pre_feedforward_layernorm",
    "ln2_post": "model.layers.{i}.post_feedforward_layernorm",
}
_GEMMA3_TEXT_PART = {key: name.replace("model.", "model.language_model.", 1) for key, name in _GEMMA.items()}
HF_NAMES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "olmo2": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA3_TEXT_PART,
    "gemma3_text": _GEMMA,
    "phi3": _LLAMA | {"qkv": "model.layers.{i}.self_attn.qkv_proj", "gate_up": "model.layers.{i}.mlp.gate_up_proj"},
    "gpt2": {
        "embed": "transformer.wte",
        "pos_embed": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "unembed": "lm_head",
        "ln1": "transformer.h.{i}.ln_1",
        "ln2": "transformer.h.{i}.ln_2",
        "qkv": "transformer.h.{i}.attn.c_attn",
        "o": "transformer.h.{i}.attn.c_proj",
        "up": "transformer.h.{i}.mlp.c_fc",
        "down": "transformer.h.{i}.mlp.c_proj",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in",
        "final_norm": "gpt_neox.final_layer_norm",
        "unembed": "embed_out",
        "ln1": "gpt_neox.layers.{i}.input_layernorm",
        "ln2": "gpt_neox.layers.{i}.post_attention_layernorm",
        "qkv": "gpt_neox.layers.{i}.attention.query_key_value",
        "o": "gpt_neox.layers.{i}.attention.dense",
        "up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
        "down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
    },
}
# (usual prefix, what some files have instead): files of the bare model lack the first part of each name, and before
# transformers 4.52 the text part of a multimodal model was a causal model of its own.
HF_ALIASES = {
    "gemma3": (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")),
    "gpt2": (("transformer.", ""),),
    "gpt_neox": (("gpt_neox.", ""), ("embed_out.", "lm_head.")),
}
# What a family's files hold beside the text model, which is not read.
HF_IGNORED = {"gemma3": r"(model\.)?(vision_tower|multi_modal_projector)\..+"}

_GGUF = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "unembed": "output",
    "ln1": "blk.{i}.attn_norm",
    "ln2": "blk.{i}.ffn_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "q_norm": "blk.{i}.attn_q_norm",
    "k_norm": "blk.{i}.attn_k_norm",
    "o": "blk.{i}.attn_output",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}
_GGUF_GEMMA = _GGUF | {"ln1_post": "blk.{i}.post_attention_norm", "ln2_post": "blk.{i}.post_ffw_norm"}
GGUF_NAMES = {"llama": _GGUF, "qwen2": _GGUF, "qwen3": _GGUF, "gemma2": _GGUF_GEMMA, "gemma3_text": _GGUF_GEMMA}

# Families whose projections are stored [in, out].
TRANSPOSED = frozenset({"gpt2"})
# Families whose fused tensor holds q, k, v head by head, rather than all q, then all k, then all v.
FUSED_BY_HEAD = frozenset({"gpt_neox"})
# GGUF families whose query and key rows are stored with the two halves of each head interleaved.
GGUF_PERMUTED = frozenset({"llama"})
