"""Activation functions: pre-activations [B, F] -> feature activations [B, F], one small function per kind."""

import functools

import jax
import jax.numpy as jnp

from saejax.base import sharding
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.select import UpTo, topk_mask
from saejax.sae.select_batch import batch_topk_mask


def relu(pre_BF: jax.Array) -> jax.Array:
    """acts = max(pre, 0)."""
    return jax.nn.relu(pre_BF)


def topk(pre_BF: jax.Array, k: int | UpTo) -> jax.Array:
    """acts = max(pre, 0) on the k largest pre-activations of each row, 0 elsewhere: at most k are non-zero, ties included.

    The gradient passes through the kept entries only. Source: Gao et al. 2024, section 2.3.
    """
    keep_BF = topk_mask(jax.lax.stop_gradient(pre_BF), k)
    return jnp.where(keep_BF, jax.nn.relu(pre_BF), 0.0)


def groupmax(pre_BF: jax.Array, k: int) -> jax.Array:
    """acts = max(pre, 0) of the largest feature in each of k groups of consecutive features, 0 elsewhere; of equal ones the
    first.

    Source: EleutherAI sparsify, activation "groupmax". Communication on a mesh: one all-gather of [B, F] along `dict`; it is
    there for SAEs that were trained elsewhere.
    """
    whole_BF = jax.sharding.reshard(pre_BF, sharding.spec("rows", None)) if sharding.mesh_is_set() else pre_BF
    grouped_BKG = jax.nn.relu(whole_BF).reshape(whole_BF.shape[0], k, -1)
    first_BK1 = grouped_BKG.argmax(2, keepdims=True)
    place_BKG = jax.lax.broadcasted_iota(jnp.int32, grouped_BKG.shape, 2, out_sharding=jax.typeof(grouped_BKG).sharding)
    acts_BF = jnp.where(place_BKG == first_BK1, grouped_BKG, 0.0).reshape(whole_BF.shape)
    return jax.sharding.reshard(acts_BF, sharding.spec("rows", "features")) if sharding.mesh_is_set() else acts_BF


def batchtopk(pre_BF: jax.Array, k: int | UpTo) -> jax.Array:
    """acts = max(pre, 0) on the B x k largest pre-activations of the whole batch, 0 elsewhere: k per row on average.

    A training-time function: a row's features depend on the other rows. A trained SAE uses a threshold (jumprelu) instead.
    Source: Bussmann et al. 2024 (BatchTopK).
    """
    keep_BF = batch_topk_mask(jax.lax.stop_gradient(pre_BF), k)
    return jnp.where(keep_BF, jax.nn.relu(pre_BF), 0.0)


def gated(pre_BF: jax.Array, b_gate_F: jax.Array, r_mag_F: jax.Array, b_mag_F: jax.Array) -> jax.Array:
    """acts = 1[pre > 0] max(exp(r_mag) (pre - b_gate) + b_mag, 0), where pre = W_gate x + b_gate.

    The gate itself passes no gradient. Source: Rajamanoharan et al. 2024 (Gated SAEs), section 3.
    """
    magnitude_BF = jnp.exp(r_mag_F) * (pre_BF - b_gate_F) + b_mag_F
    return jnp.where(pre_BF > 0, jax.nn.relu(magnitude_BF), 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def jumprelu(pre_BF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """acts = pre where pre > threshold (and > 0), else 0.

    Gradient: d acts / d pre = 1[pre > threshold]; d acts / d threshold = -(threshold / bandwidth) 1[|pre - threshold| <
    bandwidth / 2], a straight-through estimator with a rectangle. Source: Rajamanoharan et al. 2024 (JumpReLU), section 4.
    """
    return jnp.where(pre_BF > threshold_F, jax.nn.relu(pre_BF), 0.0)


def _jumprelu_backward(bandwidth, saved, gradient_BF):
    pre_BF, threshold_F = saved
    passed_BF = jnp.where(pre_BF > jnp.maximum(threshold_F, 0.0), gradient_BF, 0.0)
    return passed_BF, -threshold_F / bandwidth * _in_window(saved, bandwidth, gradient_BF).sum(0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def fires(pre_BF: jax.Array, threshold_F: jax.Array, bandwidth: float) -> jax.Array:
    """1 where pre > threshold, else 0: what L0 counts, seen from the pre-activations.

    Gradient: 0 with respect to pre; d / d threshold = -(1 / bandwidth) 1[|pre - threshold| < bandwidth / 2]. Both halves of the
    window count, those just below the threshold too. Source: Rajamanoharan et al. 2024 (JumpReLU), section 4.
    """
    return (pre_BF > threshold_F).astype(pre_BF.dtype)


def _fires_backward(bandwidth, saved, gradient_BF):
    return jnp.zeros_like(saved[0]), -_in_window(saved, bandwidth, gradient_BF).sum(0) / bandwidth


def _in_window(saved, bandwidth, gradient_BF):
    pre_BF, threshold_F = saved
    return jnp.where(jnp.abs(pre_BF - threshold_F) < bandwidth / 2, gradient_BF, 0.0)


jumprelu.defvjp(lambda pre, threshold, bandwidth: (jumprelu(pre, threshold, bandwidth), (pre, threshold)), _jumprelu_backward)
fires.defvjp(lambda pre, threshold, bandwidth: (fires(pre, threshold, bandwidth), (pre, threshold)), _fires_backward)


def thresholds(params: SAEParams) -> jax.Array:
    """Thresholds [F]: exp(log_threshold) of a jumprelu SAE in training, else as they are."""
    own = params.per_feature
    return own["threshold"] if "threshold" in own else jnp.exp(own["log_threshold"])


def activate(spec: SAESpec, params: SAEParams, pre_BF: jax.Array, k: UpTo | None = None) -> jax.Array:
    """Feature activations of an SAE's kind. k: in place of `spec.k` (topk, batchtopk)."""
    if spec.kind == "relu":
        return relu(pre_BF)
    if spec.kind == "gated":
        return gated(pre_BF, params.b_enc, params.per_feature["r_mag"], params.per_feature["b_mag"])
    if spec.kind == "jumprelu":
        return jumprelu(pre_BF, thresholds(params), spec.bandwidth)
    if spec.kind == "batchtopk":
        return batchtopk(pre_BF, k or spec.k)
    if spec.kind == "groupmax":
        return groupmax(pre_BF, spec.k)
    return topk(pre_BF, k or spec.k)
