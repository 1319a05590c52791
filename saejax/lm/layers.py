"""The arithmetic of one decoder layer, as pure functions of the layer's weights.

Shapes: B rows, T sequence, D d_model, M d_mlp, K key/value heads, G query heads per key/value head, h head_dim.
Query, key and value weights are one leaf `qkv [D, K, G+2, h]`, gate and up one leaf `mlp_in [D, 2, M]`: one matrix
product instead of three and two, and still sharded cleanly by head and by MLP unit.
"""

from collections.abc import Callable, Generator, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from saejax.lm.arch import LMConfig
from saejax.lm.rope import Rope, rotate

Steps = Generator[tuple[str, Array], Array, Array]
# (queries [B, T, K, G, h], keys [B, T, K, h], values [B, T, K, h]) -> mixed values [B, T, K, G, h]
Attend = Callable[[Array, Array, Array], Array]

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def normalise(x: Array, eps: float, axes: int | tuple[int, ...] = -1) -> Array:
    """RMS normalisation without gain: x / sqrt(mean(x^2) + eps), in float32 (Zhang and Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=axes, keepdims=True) + eps)).astype(x.dtype)


def gain(cfg: LMConfig, x: Array, weight: Array) -> Array:
    """x (weight + norm_offset); an offset is added in float32, where it loses nothing of a bfloat16 weight."""
    if not cfg.norm_offset:
        return x * weight
    return (x.astype(jnp.float32) * (weight.astype(jnp.float32) + cfg.norm_offset)).astype(x.dtype)


def layer_norm(x_BTD: Array, weight_D: Array, bias_D: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * weight + bias, in float32 (Ba et al. 2016)."""
    x32 = x_BTD.astype(jnp.float32)
    x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * weight_D.astype(jnp.float32) + bias_D.astype(jnp.float32)).astype(x_BTD.dtype)


def norm_steps(cfg: LMConfig, w: Mapping[str, Array], name: str, x_BTD: Array, hook: str) -> Steps:
    """The norm `name`, paused at its hook: before the gain of an RMS norm, after a LayerNorm."""
    if cfg.norm == "layer":
        return (yield hook, layer_norm(x_BTD, w[name], w[f"{name}_bias"], cfg.norm_eps))
    return gain(cfg, (yield hook, normalise(x_BTD, cfg.norm_eps)), w[name])


def norm(cfg: LMConfig, w: Mapping[str, Array], name: str, x_BTD: Array) -> Array:
    """The norm `name` without a pause."""
    return walk(norm_steps(cfg, w, name, x_BTD, ""), lambda _, value: value)


def attention_steps(
    cfg: LMConfig, w: Mapping[str, Array], x_BTD: Array, rope: Rope | None, attend: Attend, precision: str | None
) -> Steps:
    """Grouped-query attention of the (normed) residual, paused at `attn.hook_z`. Returns `[B, T, D]`."""
    groups = cfg.n_heads // cfg.n_kv_heads
    qkv = jnp.einsum("BTD,DKnh->BTKnh", x_BTD, w["qkv"], precision=precision)
    if cfg.qkv_bias:
        qkv = qkv + w["qkv_bias"]
    qk, v_BTKh = qkv[..., : groups + 1, :], qkv[..., groups + 1, :]
    if cfg.qk_norm != "none":
        qk = _qk_norm(cfg, w, qk)
    if rope is not None:
        qk = rotate(qk, rope)
    z_BTKGh = attend(qk[..., :groups, :], qk[..., groups, :], v_BTKh)
    flat = yield "attn.hook_z", z_BTKGh.reshape(*z_BTKGh.shape[:2], -1)
    out_BTD = jnp.einsum("BTKGh,KGhD->BTD", flat.reshape(z_BTKGh.shape), w["attn_out"], precision=precision)
    return out_BTD + w["attn_out_bias"] if cfg.attn_out_bias else out_BTD


def _qk_norm(cfg: LMConfig, w: Mapping[str, Array], qk_BTKnh: Array) -> Array:
    """RMS norm of queries (n < G) and keys (n = G), per head or over the full width of all heads."""
    if cfg.qk_norm == "head":
        groups = qk_BTKnh.shape[3] - 1
        weight_nh = jnp.concatenate([jnp.broadcast_to(w["q_norm"], (groups, cfg.head_dim)), w["k_norm"][None]])
        return gain(cfg, normalise(qk_BTKnh, cfg.norm_eps), weight_nh)
    q = gain(cfg, normalise(qk_BTKnh[..., :-1, :], cfg.norm_eps, (-3, -2, -1)), w["q_norm"])
    k = gain(cfg, normalise(qk_BTKnh[..., -1, :], cfg.norm_eps, (-2, -1)), w["k_norm"])
    return jnp.concatenate([q, k[..., None, :]], axis=-2)


def mlp_steps(cfg: LMConfig, w: Mapping[str, Array], x_BTD: Array, precision: str | None) -> Steps:
    """`(act(x W_gate) * x W_up) W_down` (Shazeer 2020) or `act(x W_up) W_down`, paused at `mlp.hook_post`."""
    wide = jnp.einsum("BTD,DcM->BTcM", x_BTD, w["mlp_in"], precision=precision)
    if cfg.mlp_bias:
        wide = wide + w["mlp_in_bias"]
    hidden_BTM = _ACTIVATIONS[cfg.activation](wide[..., 0, :])
    hidden_BTM = yield "mlp.hook_post", hidden_BTM * wide[..., 1, :] if cfg.gated else hidden_BTM
    out_BTD = jnp.einsum("BTM,MD->BTD", hidden_BTM, w["down"], precision=precision)
    return out_BTD + w["down_bias"] if cfg.mlp_bias else out_BTD


def block_steps(
    cfg: LMConfig, w: Mapping[str, Array], x_BTD: Array, rope: Rope | None, attend: Attend, precision: str | None
) -> Steps:
    """One layer, paused at each hookpoint: yields `(hook, value)` and goes on with the value that is sent back.

    The value sent for the last hook is the layer's output. A caller that does not resume computes nothing further.
    """
    pre, post = cfg.norm_places != "post", cfg.norm_places != "pre"
    x_BTD = yield "hook_resid_pre", x_BTD
    read_BTD = (yield from norm_steps(cfg, w, "ln1", x_BTD, "ln1.hook_normalized")) if pre else x_BTD
    attn_BTD = yield from attention_steps(cfg, w, read_BTD, rope, attend, precision)
    attn_BTD = yield "hook_attn_out", norm(cfg, w, "ln1_post", attn_BTD) if post else attn_BTD
    mid_BTD = x_BTD if cfg.parallel else (yield "hook_resid_mid", x_BTD + attn_BTD)
    read_BTD = yield "hook_mlp_in", mid_BTD
    if pre:
        read_BTD = yield from norm_steps(cfg, w, "ln2", read_BTD, "ln2.hook_normalized")
    mlp_BTD = yield from mlp_steps(cfg, w, read_BTD, precision)
    mlp_BTD = yield "hook_mlp_out", norm(cfg, w, "ln2_post", mlp_BTD) if post else mlp_BTD
    after_BTD = mid_BTD + attn_BTD if cfg.parallel else mid_BTD
    return (yield "hook_resid_post", after_BTD + mlp_BTD)


def walk(steps: Steps, visit: Callable[[str, Array], Array], stop: str | None = None) -> Array:
    """Runs `block_steps` with `visit(hook, value)` at every hook; returns its result, or the value at hook `stop`."""
    hook, value = next(steps)
    while True:
        value = visit(hook, value)
        if hook == stop:
            return value
        try:
            hook, value = steps.send(value)
        except StopIteration as end:
            return end.value
