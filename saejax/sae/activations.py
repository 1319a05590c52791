"""Activation functions: pre-activations [B, F] -> feature activations [B, F], one small function per kind."""

import jax
import jax.numpy as jnp

from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.select import topk_mask


def relu(pre_BF: jax.Array) -> jax.Array:
    """acts = max(pre, 0)."""
    return jax.nn.relu(pre_BF)


def topk(pre_BF: jax.Array, k: int) -> jax.Array:
    """acts = max(pre, 0) on the k largest pre-activations of each row, 0 elsewhere: at most k are non-zero, ties included.

    The gradient passes through the kept entries only. Source: Gao et al. 2024, section 2.3.
    """
    keep_BF = topk_mask(jax.lax.stop_gradient(pre_BF), k)
    return jnp.where(keep_BF, jax.nn.relu(pre_BF), 0.0)


def gated(pre_BF: jax.Array, b_gate_F: jax.Array, r_mag_F: jax.Array, b_mag_F: jax.Array) -> jax.Array:
    """acts = 1[pre > 0] max(exp(r_mag) (pre - b_gate) + b_mag, 0), where pre = W_gate x + b_gate.

    The gate itself passes no gradient. Source: Rajamanoharan et al. 2024 (Gated SAEs), section 3.
    """
    magnitude_BF = jnp.exp(r_mag_F) * (pre_BF - b_gate_F) + b_mag_F
    return jnp.where(pre_BF > 0, jax.nn.relu(magnitude_BF), 0.0)


def activate(spec: SAESpec, params: SAEParams, pre_BF: jax.Array) -> jax.Array:
    """Feature activations of an SAE's kind."""
    if spec.kind == "relu":
        return relu(pre_BF)
    if spec.kind == "gated":
        return gated(pre_BF, params.b_enc, params.per_feature["r_mag"], params.per_feature["b_mag"])
    return topk(pre_BF, spec.k)
