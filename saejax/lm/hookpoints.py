"""Names of the places where a decoder can be read or changed, as TransformerLens spells them.

| name | value there |
|---|---|
| `hook_embed` | token embeddings (scaled, in Gemma; without positions, in GPT-2) |
| `blocks.i.hook_resid_pre` | residual stream entering layer i |
| `blocks.i.ln1.hook_normalized` | the norm that attention reads |
| `blocks.i.attn.hook_z` | what each head mixed, before the output projection; heads flattened, `n_heads * head_dim` wide |
| `blocks.i.hook_attn_out` | what attention adds to the stream (after bias and, in Gemma and OLMo 2, after its norm) |
| `blocks.i.hook_resid_mid` | residual stream between attention and MLP; parallel blocks have none |
| `blocks.i.hook_mlp_in` | the stream as the MLP's norm reads it; a change here reaches the MLP only |
| `blocks.i.ln2.hook_normalized` | the norm that the MLP reads |
| `blocks.i.mlp.hook_post` | hidden units of the MLP after the nonlinearity (and the gate), `d_mlp` wide |
| `blocks.i.hook_mlp_out` | what the MLP adds to the stream (after bias and norm, as for attention) |
| `blocks.i.hook_resid_post` | residual stream leaving layer i |
| `ln_final.hook_normalized` | final norm of the last residual |

`hook_normalized` follows TransformerLens without weight processing (its `RMSNorm` and `LayerNorm` components): for an
RMS norm the value before the gain, for a LayerNorm the value after gain and bias. Where the gain matters (a transcoder
that is to read exactly what the MLP reads), multiply by it. OLMo 2 has no norm before attention and MLP, hence no
`ln1.hook_normalized` and `ln2.hook_normalized`: its MLP reads `hook_mlp_in`. TransformerLens takes OLMo 2's
`hook_attn_out` and `hook_mlp_out` before their norms, here they are what is added in every family.

`hookpoint_of` reads names of Hugging Face modules (`model.layers.9`, `transformer.h.9.mlp`) as names of this table.
"""

import difflib
import re

from saejax.base.errors import HookpointError
from saejax.lm.arch import LMConfig

EMBED = "hook_embed"
FINAL = "ln_final.hook_normalized"
BLOCK_HOOKS = (
    "hook_resid_pre",
    "ln1.hook_normalized",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_mlp_in",
    "ln2.hook_normalized",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]*)\.((?:\w+\.)?\w+)")
_TRANSFORMER_LENS = re.compile(r"(?:blocks\.\d+\.)?(?:\w+\.)*hook_\w+")
_MODULE = re.compile(r"(?:(?:model\.|gpt_neox\.|model\.language_model\.|language_model\.model\.|language_model\.)?layers"
                     r"|(?:transformer\.)?h)\.(0|[1-9][0-9]*)(?:\.(\w+))?")
# What a module of a layer returns, where the layer adds it to the stream as it is.
_MODULE_HOOKS = {
    None: "hook_resid_post",
    "mlp": "hook_mlp_out",
    "feed_forward": "hook_mlp_out",
    "self_attn": "hook_attn_out",
    "attn": "hook_attn_out",
    "attention": "hook_attn_out",
}


def block_hooks(cfg: LMConfig) -> tuple[str, ...]:
    """Hooks of one layer of this model, in the order in which the forward pass meets them."""
    return tuple(hook for hook in BLOCK_HOOKS if not _absence(cfg, hook))


def _absence(cfg: LMConfig, hook: str) -> str | None:
    """Why the model does not have a hook that other models have."""
    if hook == "hook_resid_mid" and cfg.parallel:
        return "attention and MLP of this model run in parallel, there is no stream between them: use hook_resid_pre"
    if hook in ("ln1.hook_normalized", "ln2.hook_normalized") and cfg.norm_places == "post":
        return "this model norms what attention and MLP return, not what they read: use hook_resid_pre or hook_mlp_in"
    return None


def hookpoints(cfg: LMConfig) -> tuple[str, ...]:
    """Every hookpoint of the model, in the order in which the forward pass meets them."""
    blocks = tuple(f"blocks.{i}.{hook}" for i in range(cfg.n_layers) for hook in block_hooks(cfg))
    return (EMBED, *blocks, FINAL)


def check_hookpoint(cfg: LMConfig, name: str) -> None:
    """Raises HookpointError, with the reason or the closest names that exist, unless the model has `name`."""
    names = hookpoints(cfg)
    if name in names:
        return
    match = _BLOCK.fullmatch(name)
    if match and match[2] in BLOCK_HOOKS:
        reason = _absence(cfg, match[2])
        if reason:
            raise HookpointError(f"hookpoint {name!r} does not exist in this model: {reason}")
        last = cfg.n_layers - 1
        raise HookpointError(f"hookpoint {name!r}: the model has {cfg.n_layers} layers, use blocks.0 to blocks.{last}")
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    raise HookpointError(f"hookpoint {name!r} does not exist in this model: closest are {', '.join(close)}")


def hookpoint_of(name: str, cfg: LMConfig | None = None) -> str:
    """The hookpoint at the output of the Hugging Face module `name`; a TransformerLens name comes back as it is.

    Understood are a layer (`layers.9`, `model.layers.9`, `h.9`, `transformer.h.9`, `gpt_neox.layers.9`,
    `model.language_model.layers.9`, `language_model.model.layers.9`) and, after it, `.mlp`, `.feed_forward`,
    `.self_attn`, `.attn` or `.attention`. Of a module that returns a tuple the first value is meant. Whether the model
    has that layer, `check_hookpoint` says. Raises HookpointError for any other name and, where `cfg` is given, for an MLP
    or attention whose output is normed before it is added (Gemma 2 and 3, OLMo 2): no hookpoint has the value before.
    """
    if _TRANSFORMER_LENS.fullmatch(name):
        return name
    match = _MODULE.fullmatch(name)
    if not match or match[2] not in _MODULE_HOOKS:
        raise HookpointError(
            f"hookpoint {name!r} is not understood: use a TransformerLens name (blocks.9.hook_resid_post) or a Hugging Face "
            "module (layers.9, model.layers.9, transformer.h.9, gpt_neox.layers.9, or one of these with .mlp, .self_attn, "
            ".attn or .attention)"
        )
    hook = f"blocks.{match[1]}.{_MODULE_HOOKS[match[2]]}"
    if match[2] and cfg is not None and cfg.norm_places != "pre":
        raise HookpointError(
            f"hookpoint {name!r}: a hook on this module of {cfg.family} gives its output before the norm that follows it, "
            f"{hook} is after that norm: use {hook} only for what was made after the norm"
        )
    return hook


def layer_of(name: str) -> int | None:
    """Layer index of a `blocks.i.*` hookpoint; None for the embedding and the final norm."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def width_of(cfg: LMConfig, name: str) -> int:
    """Size of the last dimension of the value at `name`. Raises HookpointError for a name the model does not have."""
    check_hookpoint(cfg, name)
    if name.endswith(".attn.hook_z"):
        return cfg.n_heads * cfg.head_dim
    return cfg.d_mlp if name.endswith(".mlp.hook_post") else cfg.d_model
