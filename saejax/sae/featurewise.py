"""Kinds without k, whose features fire each by itself: what some features add to a batch's sums, and the loss as a function of
the sums. The features may be all of them or a tile (`saejax.sae.tiles`), so each formula is written once.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import lax

from saejax.config import SAEOptions
from saejax.sae.activations import activate, fires, thresholds
from saejax.sae.losses import squared_error
from saejax.sae.params import SAEParams, SAESpec

STEEPNESS = 4.0        # c of the tanh and log penalties. Source: Transformer Circuits updates February 2024, January 2025
PRE_ACTIVATION = 3e-6  # weight of the pre-activation loss. Source: Transformer Circuits update January 2025


def of_features(spec: SAESpec, options: SAEOptions, params: SAEParams,
                pre_BF: jax.Array) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """(activations to be decoded, [B, F] each: the SAE's own, then what is decoded with a frozen W_dec; sums over rows [F]).

    params: those of the features.
    """
    acts_BF = activate(spec, params, pre_BF)
    if spec.kind == "gated":
        gate_BF = jax.nn.relu(pre_BF)
        return [acts_BF, gate_BF], {"l1": gate_BF.sum(0) * decoder_norms(spec, params)}
    if spec.kind == "relu":
        return [acts_BF], {"l1": _bent(options, decoder_norms(spec, params), acts_BF)}
    threshold_F = thresholds(params)
    if options.penalty != "tanh":
        return [acts_BF], {"fires": fires(pre_BF, threshold_F, spec.bandwidth).sum(0)}
    norm_F = decoder_norms(spec, params)
    return [acts_BF], {"tanh": jnp.tanh(STEEPNESS * acts_BF * norm_F).sum(0),
                       "below": jax.nn.relu(threshold_F - pre_BF).sum(0) * norm_F}


def decoded(spec: SAESpec) -> int:
    """How many reconstructions `of_features` asks for."""
    return 2 if spec.kind == "gated" else 1


def decoder_norms(spec: SAESpec, params: SAEParams) -> jax.Array:
    """||W_dec,i|| [F]. Of a crosscoder the sum over layers sum_l ||W_dec,i^l||, which keeps its loss comparable with that of one
    SAE per layer. Source: Transformer Circuits update October 2024.
    """
    if not spec.layers:
        return jnp.linalg.norm(params.W_dec, axis=1)
    ends = itertools.accumulate(spec.layers)
    return sum(jnp.linalg.norm(params.W_dec[:, end - width:end], axis=1) for end, width in zip(ends, spec.layers, strict=True))


def _bent(options, norm_F, acts_BF):
    """sum_b p(f_i ||W_dec,i||), see `relu`."""
    if options.penalty == "l1":
        return acts_BF.sum(0) * norm_F
    bend = {"tanh": jnp.tanh, "log": jnp.log1p}[options.penalty]
    return bend(STEEPNESS * acts_BF * norm_F).sum(0) / STEEPNESS


def relu(options, params, seen, inputs):
    """mean_b [ ||x - x^||^2 + lambda sum_i p(a_i) ],  a_i = f_i ||W_dec,i||,  p of slope 1 at 0 by `sae.penalty`, c = 4.

    l1: p(a) = a. Source: Templeton et al. 2024, "Our SAE training". tanh: p(a) = tanh(c a) / c. Source: Transformer Circuits
    update February 2024. log: p(a) = log(1 + c a) / c. Both punish large activations less, and so shrink them less.
    """
    l1 = seen.mean("l1")
    return seen.mse + inputs.sparsity * l1, {"l1": l1}


def gated(options, params, seen, inputs):
    """mean_b [ ||x - x^||^2 + lambda sum_i g_i ||W_dec,i|| + ||x - x^_frozen(g)||^2 ],  g = max(pre-activation of the gate, 0).

    x^_frozen decodes with stop_gradient(W_dec, b_dec): it trains the gate, which passes no gradient in x^. The decoder norm is
    1 in the recipe. Communication beyond relu: one more reconstruction. Source: Rajamanoharan et al. 2024 (Gated SAEs),
    section 3.2.
    """
    l1 = seen.mean("l1")
    frozen_BD = seen.frozen_BD + lax.stop_gradient(params.b_dec + seen.through_BD)
    gate_error = squared_error(seen.y_BD, frozen_BD).mean()
    return seen.mse + inputs.sparsity * l1 + gate_error, {"l1": l1, "gate_error": gate_error}


def jumprelu(options, params, seen, inputs):
    """mean_b ||x - x^||^2 + lambda * (what `sae.penalty` says).

    l0: L0 = mean_b sum_i [f_i > 0]. target_l0: (L0 / k - 1)^2. Source: Rajamanoharan et al. 2024 (JumpReLU SAEs), section 5.
    tanh: mean_b sum_i tanh(4 f_i ||W_dec,i||), and mean_b sum_i max(threshold_i - pre_i, 0) ||W_dec,i|| with weight 3e-6.
    Gradients reach every parameter; the second term pulls features back that have stopped firing. Source: Transformer Circuits
    update January 2025, "Dictionary learning optimization techniques".
    """
    if options.penalty == "tanh":
        sparsity = seen.mean("tanh")
        return seen.mse + inputs.sparsity * sparsity + PRE_ACTIVATION * seen.mean("below"), {"sparsity": sparsity}
    rate_F = seen.sums["fires"] / len(seen.y_BD)
    if options.penalty == "l0":
        sparsity = rate_F.sum()
    else:
        sparsity = jnp.square(rate_F.sum() / inputs.target_l0 - 1)
    return seen.mse + inputs.sparsity * sparsity, {"sparsity": sparsity}


LOSSES = {"relu": relu, "gated": gated, "jumprelu": jumprelu}
