"""The decoder's parameters: name, shape and logical axes of each, derived from the config."""

from dataclasses import dataclass

from saejax.lm.arch import LMConfig


@dataclass(frozen=True)
class Leaf:
    """Shape and logical axes of one parameter array."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def leaves(cfg: LMConfig) -> dict[str, Leaf]:
    """Every parameter by path: `embed`, `final_norm`, `unembed` (untied only) and `blocks.*`, stacked over layers."""
    d, v, n = cfg.d_model, cfg.vocab_size, cfg.n_layers
    whole = {"embed": Leaf((v, d), ("vocab", "embed"))}
    if cfg.learned_positions:
        whole["pos_embed"] = Leaf((cfg.max_context, d), (None, "embed"))
    whole |= _norm(cfg, "final_norm")
    if not cfg.tied_embeddings:
        whole["unembed"] = Leaf((v, d), ("vocab", "embed"))
    block = _attention(cfg) | _mlp(cfg)
    return whole | {f"blocks.{name}": Leaf((n, *leaf.shape), ("layers", *leaf.axes)) for name, leaf in block.items()}


def _norm(cfg: LMConfig, name: str) -> dict[str, Leaf]:
    leaf = Leaf((cfg.d_model,), ("embed",))
    return {name: leaf, f"{name}_bias": leaf} if cfg.norm == "layer" else {name: leaf}


def _norms(cfg: LMConfig, name: str) -> dict[str, Leaf]:
    pre = _norm(cfg, name) if cfg.norm_places != "post" else {}
    return pre | (_norm(cfg, f"{name}_post") if cfg.norm_places != "pre" else {})


def _attention(cfg: LMConfig) -> dict[str, Leaf]:
    d, k, h = cfg.d_model, cfg.n_kv_heads, cfg.head_dim
    g = cfg.n_heads // k
    found = _norms(cfg, "ln1") | {
        "qkv": Leaf((d, k, g + 2, h), ("embed", "heads", None, None)),
        "attn_out": Leaf((k, g, h, d), ("heads", None, None, "embed")),
    }
    if cfg.qk_norm == "head":
        found |= {"q_norm": Leaf((h,), (None,)), "k_norm": Leaf((h,), (None,))}
    if cfg.qk_norm == "full":
        found |= {"q_norm": Leaf((k, g, h), ("heads", None, None)), "k_norm": Leaf((k, h), ("heads", None))}
    if cfg.qkv_bias:
        found["qkv_bias"] = Leaf((k, g + 2, h), ("heads", None, None))
    if cfg.attn_out_bias:
        found["attn_out_bias"] = Leaf((d,), ("embed",))
    return found


def _mlp(cfg: LMConfig) -> dict[str, Leaf]:
    d, m, wide = cfg.d_model, cfg.d_mlp, 2 if cfg.gated else 1
    found = _norms(cfg, "ln2") | {
        "mlp_in": Leaf((d, wide, m), ("embed", None, "mlp")),
        "down": Leaf((m, d), ("mlp", "embed")),
    }
    if cfg.mlp_bias:
        found |= {"mlp_in_bias": Leaf((wide, m), (None, "mlp")), "down_bias": Leaf((d,), ("embed",))}
    return found
