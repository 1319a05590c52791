"""What a language model computes: one frozen `LMConfig` for every family; `hf_config` and `gguf_config` read it.

A family is a set of values of these fields and a table of tensor names, never a class of its own.
"""

import math
from dataclasses import dataclass
from typing import Any

from saejax.base.errors import LMError

SCALINGS = ("none", "linear", "llama3", "longrope", "yarn")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
_CHOICES = {
    "norm": ("rms", "layer"),
    "norm_places": ("pre", "post", "both"),
    "qk_norm": ("none", "head", "full"),
    "activation": ACTIVATIONS,
}
_SIZES = ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "max_context")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first `dim` dimensions of each head (Su et al. 2021).

    Frequency i is `theta ** (-2 i / dim)`; `scaling` changes it: "linear" divides all by `factor`, "llama3" divides
    low frequencies and blends the middle ones (Llama 3.1), "longrope" divides frequency i by `short_factors[i]`, or by
    `long_factors[i]` in contexts longer than `original_context` (Ding et al. 2024), "yarn" divides by `factor` those that
    turn less than `beta_slow` times in `original_context`, keeps those that turn more than `beta_fast` times, and blends
    between them, with the ends of the ramp at whole indices if `truncate` (Peng et al. 2023, section 3.2). Cosine and
    sine are multiplied by `attention_factor`.
    """

    theta: float
    dim: int
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def problems(self) -> list[str]:
        """What makes this rope impossible, as `name=value (reason)`."""
        wrong = [f"rope_theta={self.theta!r} (not a positive number)"] if not _positive(self.theta) else []
        if not _is_size(self.dim) or self.dim % 2:
            wrong.append(f"rotary dimension {self.dim!r} is odd or not positive, rotary embedding needs pairs")
        if self.scaling not in SCALINGS:
            wrong.append(f"rope scaling {self.scaling!r} (one of {', '.join(SCALINGS)})")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
            if not _positive(getattr(self, name)):
                wrong.append(f"rope {name}={getattr(self, name)!r} (not a positive number)")
        if self.scaling in ("llama3", "longrope", "yarn") and not _is_size(self.original_context):
            wrong.append(f"rope original_context={self.original_context!r} (not a size)")
        if self.scaling == "llama3" and self.high_freq_factor == self.low_freq_factor:
            wrong.append("rope high_freq_factor equals low_freq_factor")
        if self.scaling == "yarn" and _positive(self.theta) and self.theta <= 1:
            wrong.append(f"rope_theta={self.theta!r} (yarn needs more than 1)")
        if self.scaling == "yarn" and self.beta_fast < self.beta_slow:
            wrong.append(f"rope beta_fast={self.beta_fast!r} is less than beta_slow={self.beta_slow!r}")
        if self.scaling == "longrope":
            wrong += [
                f"rope {name} has {len(getattr(self, name))} numbers, not {self.dim // 2} positive ones"
                for name in ("short_factors", "long_factors")
                if len(getattr(self, name)) != self.dim // 2 or not all(map(_positive, getattr(self, name)))
            ]
        return wrong


@dataclass(frozen=True)
class LMConfig:
    """Architecture of a decoder-only language model; hashable, so that it may be a static argument of `jax.jit`.

    Sizes are numbers of elements, `max_context` is in tokens. One value per layer: `layer_rope` (index into `ropes`,
    -1: this layer does not rotate), `windows` (a query sees itself and the `window - 1` tokens before it; 0: all),
    `attn_scales` (factor of the attention scores).

    `norm`: "rms" x / sqrt(mean(x^2) + norm_eps) * gain, with gain = weight + `norm_offset`, or "layer" (LayerNorm with
    bias). `norm_places`: norms before attention and MLP ("pre"), on what they return ("post"), or "both". `qk_norm`:
    RMS norm of queries and keys over each head ("head") or over all heads together ("full"). `parallel`: attention and
    MLP both read the layer's input. `gated`: act(x W_gate) * x W_up instead of act(x W_up). `attn_softcap` and
    `final_softcap` c (0: none): c tanh(x / c) on attention scores and on logits. `embed_scale` multiplies the token
    embeddings; `learned_positions` adds a learned vector per position.
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
    max_context: int
    tied_embeddings: bool
    attn_scales: tuple[float, ...]
    ropes: tuple[RopeConfig, ...] = ()
    layer_rope: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    norm: str = "rms"
    norm_offset: float = 0.0
    norm_places: str = "pre"
    qk_norm: str = "none"
    parallel: bool = False
    gated: bool = True
    activation: str = "silu"
    qkv_bias: bool = False
    attn_out_bias: bool = False
    mlp_bias: bool = False
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    embed_scale: float = 1.0
    learned_positions: bool = False

    def __post_init__(self) -> None:
        for name, value in (("layer_rope", -1), ("windows", 0)):
            if not getattr(self, name) and _is_size(self.n_layers):
                object.__setattr__(self, name, (value,) * self.n_layers)
        wrong = [
            f"{name}={getattr(self, name)!r} (not between 1 and 2^31)"
            for name in _SIZES
            if not _is_size(getattr(self, name))
        ]
        if not _positive(self.norm_eps):
            wrong.append(f"norm_eps={self.norm_eps!r} (not a positive number)")
        wrong += [
            f"{name}={getattr(self, name)!r} (one of {', '.join(allowed)})"
            for name, allowed in _CHOICES.items()
            if getattr(self, name) not in allowed
        ]
        wrong += [problem for rope in self.ropes for problem in rope.problems()]
        wrong = wrong or self._relations()
        if wrong:
            raise LMError(f"model config: {', '.join(wrong)}: check the config file")

    def _relations(self) -> list[str]:
        wrong = []
        if self.n_heads % self.n_kv_heads:
            wrong.append(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        per_layer = {name: len(getattr(self, name)) for name in ("layer_rope", "windows", "attn_scales")}
        wrong += [f"{name} has {n} values for {self.n_layers} layers" for name, n in per_layer.items() if n != self.n_layers]
        if len({rope.dim for rope in self.ropes}) > 1 or any(rope.dim > self.head_dim for rope in self.ropes):
            dims = sorted({rope.dim for rope in self.ropes})
            wrong.append(f"rotary dimensions {dims} must be one number of at most head_dim={self.head_dim}")
        if not all(-1 <= rope < len(self.ropes) for rope in self.layer_rope):
            wrong.append(f"layer_rope={self.layer_rope} names a rope that is not there")
        if not all(isinstance(window, int) and 0 <= window < 1 << 31 for window in self.windows):
            wrong.append(f"windows={self.windows} (sizes, or 0 for none)")
        if self.parallel and self.norm_places != "pre":
            wrong.append(f"parallel layers with norm_places={self.norm_places!r} are not computed")
        return wrong


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _positive(value: Any) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0
