"""Activation functions: pre-activations [B, F] -> feature activations [B, F], one small function per kind."""

import jax
import jax.numpy as jnp

from saejax.sae.params import SAESpec
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


def activate(spec: SAESpec, pre_BF: jax.Array) -> jax.Array:
    """Feature activations of an SAE's kind."""
    if spec.kind == "relu":
        return relu(pre_BF)
    return topk(pre_BF, spec.k)
