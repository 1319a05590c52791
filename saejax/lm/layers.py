"""The arithmetic of one decoder layer, as pure functions of the layer's weights.

Shapes: B rows, T sequence, D d_model, M d_mlp, K key/value heads, G query heads per key/value head, h head_dim.
Query, key and value weights are one leaf `qkv [D, K, G+2, h]`, gate and up one leaf `gate_up [D, 2, M]`: one matrix
product instead of three and two, and still sharded cleanly by head and by MLP unit.
"""

from collections.abc import Callable, Generator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from saejax.lm.arch import LMConfig


class Rope(NamedTuple):
    """Cosine and sine tables, float32, `[T, 1, 1, h/2]`."""

    cos: Array
    sin: Array


def rope_tables(cfg: LMConfig, length: int) -> Rope:
    """Tables for positions 0..length-1: angle = t * rope_theta ** (-2 i / head_dim) (Su et al. 2021, section 3.2.2).

    Frequency and angle are rounded to float32 as transformers does; cosine and sine of that angle are then taken in
    float64, because the float32 functions of accelerators lose digits at large angles.
    """
    exponent = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
    frequency = (1.0 / cfg.rope_theta**exponent).astype(np.float32)
    angle = (np.arange(length, dtype=np.float32)[:, None] * frequency)[:, None, None, :].astype(np.float64)
    return Rope(jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32))


def rotate(x: Array, rope: Rope) -> Array:
    """Rotary embedding of `x [B, T, K, n, h]`, pairs (i, i + h/2), in float32, returned in the dtype of `x`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin], axis=-1)
    return turned.astype(x.dtype)


def normalise(x_BTD: Array, eps: float) -> Array:
    """RMS normalisation without gain: x / sqrt(mean(x^2) + eps), in float32 (Zhang and Sennrich 2019)."""
    x32 = x_BTD.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)).astype(x_BTD.dtype)


def rms_norm(x_BTD: Array, gain_D: Array, eps: float) -> Array:
    """RMSNorm: `gain * x / sqrt(mean(x^2) + eps)`."""
    return normalise(x_BTD, eps) * gain_D


def attention(cfg: LMConfig, w: Mapping[str, Array], x_BTD: Array, rope: Rope, precision: str | None) -> Array:
    """Causal grouped-query attention of the normed residual; softmax in float32. Returns `[B, T, D]`."""
    groups = cfg.n_heads // cfg.n_kv_heads
    qkv = jnp.einsum("BTD,DKnh->BTKnh", x_BTD, w["qkv"], precision=precision)
    if cfg.attn_bias:
        qkv = qkv + w["qkv_bias"]
    qk, v_BTKh = rotate(qkv[..., : groups + 1, :], rope), qkv[..., groups + 1, :]
    q_BTKGh, k_BTKh = qk[..., :groups, :], qk[..., groups, :]
    scores = jnp.einsum("BTKGh,BSKh->BKGTS", q_BTKGh, k_BTKh, precision=precision, preferred_element_type=jnp.float32)
    length = x_BTD.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    probs = jax.nn.softmax(jnp.where(causal, scores * cfg.head_dim**-0.5, jnp.finfo(jnp.float32).min), axis=-1)
    z_BTKGh = jnp.einsum("BKGTS,BSKh->BTKGh", probs.astype(v_BTKh.dtype), v_BTKh, precision=precision)
    out_BTD = jnp.einsum("BTKGh,KGhD->BTD", z_BTKGh, w["attn_out"], precision=precision)
    return out_BTD + w["attn_out_bias"] if cfg.attn_bias else out_BTD


def mlp(cfg: LMConfig, w: Mapping[str, Array], x_BTD: Array, precision: str | None) -> Array:
    """Gated MLP: `(silu(x W_gate) * x W_up) W_down` (Shazeer 2020)."""
    pair = jnp.einsum("BTD,DcM->BTcM", x_BTD, w["gate_up"], precision=precision)
    if cfg.mlp_bias:
        pair = pair + w["gate_up_bias"]
    hidden_BTM = jax.nn.silu(pair[..., 0, :]) * pair[..., 1, :]
    out_BTD = jnp.einsum("BTM,MD->BTD", hidden_BTM, w["down"], precision=precision)
    return out_BTD + w["down_bias"] if cfg.mlp_bias else out_BTD


def block_steps(
    cfg: LMConfig, w: Mapping[str, Array], x_BTD: Array, rope: Rope, precision: str | None
) -> Generator[tuple[str, Array], Array, None]:
    """One layer, paused at each hookpoint: yields `(hook, value)` and goes on with the value that is sent back.

    The value sent for the last hook is the layer's output. A caller that does not resume computes nothing further.
    """
    x_BTD = yield "hook_resid_pre", x_BTD
    attn_BTD = yield "hook_attn_out", attention(cfg, w, rms_norm(x_BTD, w["ln1"], cfg.norm_eps), rope, precision)
    x_BTD = yield "hook_resid_mid", x_BTD + attn_BTD
    mlp_BTD = yield "hook_mlp_out", mlp(cfg, w, rms_norm(x_BTD, w["ln2"], cfg.norm_eps), precision)
    yield "hook_resid_post", x_BTD + mlp_BTD


def walk(
    steps: Generator[tuple[str, Array], Array, None], visit: Callable[[str, Array], Array], stop: str | None = None
) -> Array:
    """Runs `block_steps` with `visit(hook, value)` at every hook; returns the last value, or the one at hook `stop`."""
    hook, value = next(steps)
    while True:
        value = visit(hook, value)
        if hook == stop:
            return value
        try:
            hook, value = steps.send(value)
        except StopIteration:
            return value
