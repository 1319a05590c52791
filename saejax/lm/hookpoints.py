"""Names of the places where a decoder can be read or changed, as TransformerLens spells them.

| name | value there |
|---|---|
| `hook_embed` | token embeddings |
| `blocks.i.hook_resid_pre` | residual stream entering layer i |
| `blocks.i.hook_attn_out` | what attention adds (after the output projection and its bias) |
| `blocks.i.hook_resid_mid` | residual stream between attention and MLP |
| `blocks.i.hook_mlp_out` | what the MLP adds |
| `blocks.i.hook_resid_post` | residual stream leaving layer i |
| `ln_final.hook_normalized` | final norm of the last residual, before the norm's gain is applied |
"""

import difflib
import re

from saejax.errors import HookpointError
from saejax.lm.arch import LMConfig

EMBED = "hook_embed"
FINAL = "ln_final.hook_normalized"
BLOCK_HOOKS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]*)\.(\w+)")


def hookpoints(cfg: LMConfig) -> tuple[str, ...]:
    """Every hookpoint of the model, in the order in which the forward pass meets them."""
    blocks = tuple(f"blocks.{i}.{hook}" for i in range(cfg.n_layers) for hook in BLOCK_HOOKS)
    return (EMBED, *blocks, FINAL)


def check_hookpoint(cfg: LMConfig, name: str) -> None:
    """Raises HookpointError, with the closest names that exist, unless the model has the hookpoint `name`."""
    names = hookpoints(cfg)
    if name in names:
        return
    match = _BLOCK.fullmatch(name)
    if match and match[2] in BLOCK_HOOKS:
        last = cfg.n_layers - 1
        raise HookpointError(f"hookpoint {name!r}: the model has {cfg.n_layers} layers, use blocks.0 to blocks.{last}")
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or names[:3]
    raise HookpointError(f"hookpoint {name!r} does not exist in this model: closest are {', '.join(close)}")


def layer_of(name: str) -> int | None:
    """Layer index of a `blocks.i.*` hookpoint; None for the embedding and the final norm."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def width_of(cfg: LMConfig, name: str) -> int:
    """Size of the last dimension of the value at `name`. Raises HookpointError for a name the model does not have."""
    check_hookpoint(cfg, name)
    return cfg.d_model
