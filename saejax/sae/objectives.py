"""Objectives: one pure function of (params, batch, state) per kind, returning the loss and what was seen on the way."""

import itertools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.config import SAEOptions
from saejax.recipes import WITH_K
from saejax.sae.activations import activate, fires, thresholds, topk
from saejax.sae.losses import LossInputs, LossParts, aux_loss, squared_error, variance_total
from saejax.sae.model import decode, pre_activations, skipped
from saejax.sae.normalization import columns
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.prefixes import prefix_reconstructions


@struct.dataclass
class Forward:
    """One pass over a batch: normalised rows to be reconstructed, pre-activations, activations, reconstruction, which features
    fired, the nested reconstructions (none without `sae.groups`), and what a skip connection added to all of them.
    """

    y_BD: jax.Array
    pre_BF: jax.Array
    acts_BF: jax.Array
    recon_BD: jax.Array
    fired_F: jax.Array
    prefixes_GBD: jax.Array | None
    through_BD: jax.Array | float

    @property
    def mse(self) -> jax.Array:
        """mean_b ||x - x^||^2, with nested prefixes its sum over them (Bussmann et al. 2025, Matryoshka SAEs)."""
        if self.prefixes_GBD is None:
            return squared_error(self.y_BD, self.recon_BD).mean()
        return squared_error(self.y_BD, self.prefixes_GBD).mean(1).sum()


def objective(spec: SAESpec, options: SAEOptions, params: SAEParams, rows_BW: jax.Array,
              inputs: LossInputs) -> tuple[jax.Array, LossParts]:
    """The loss of a kind over a batch of normalised rows, and what it is made of (its `mse`: that of the whole dictionary).

    With `sae.aux_k`, aux_coef * aux is added to the loss of any kind, times Var(x) where the kind's loss is not divided by it.

    rows_BW: input columns, then those of a transcoder's target. In the formulas x is what is reconstructed.
    """
    x_BD, y_BD = columns(spec, rows_BW)
    pre_BF = pre_activations(spec, params, x_BD)
    acts_BF = activate(spec, params, pre_BF)
    prefixes_GBD = prefix_reconstructions(spec, params, acts_BF, options.groups) if options.groups else None
    recon_BD = decode(spec, params, acts_BF) if prefixes_GBD is None else prefixes_GBD[-1]
    through_BD = skipped(spec, params, x_BD)
    recon_BD, prefixes_GBD = recon_BD + through_BD, None if prefixes_GBD is None else prefixes_GBD + through_BD
    seen = Forward(y_BD=y_BD, pre_BF=pre_BF, acts_BF=acts_BF, recon_BD=recon_BD, fired_F=(acts_BF > 0).any(0),
                   prefixes_GBD=prefixes_GBD, through_BD=through_BD)
    of_kind = {"relu": _relu, "topk": _topk, "batchtopk": _topk, "gated": _gated, "jumprelu": _jumprelu}[spec.kind]
    loss, own = of_kind(spec, options, params, seen, inputs)
    if options.aux_k:
        error_BD = lax.stop_gradient(y_BD - recon_BD)
        own |= {"aux": aux_loss(spec, params, pre_BF, error_BD, seen.fired_F, inputs, options.aux_k)}
        in_units_of_loss = 1.0 if spec.kind in WITH_K else 1 / inputs.inverse_variance
        loss = loss + options.aux_coef * own["aux"] * in_units_of_loss
    errors_B = squared_error(y_BD, seen.recon_BD)
    l0 = (acts_BF > 0).sum(dtype=jnp.float32) / y_BD.shape[0]
    fvu = errors_B.sum() / variance_total(y_BD)
    return loss, LossParts(loss=loss, mse=errors_B.mean(), l0=l0, fvu=fvu, fired_F=seen.fired_F, own=own,
                           least=jnp.where(acts_BF > 0, acts_BF, jnp.inf).min(),
                           above=(pre_BF > inputs.threshold).sum(dtype=jnp.float32) / y_BD.shape[0])


def _decoder_norms(spec: SAESpec, options: SAEOptions, params: SAEParams) -> jax.Array:
    """||W_dec,i|| [F]. Of a crosscoder with `crosscoder_norm` l1 the sum over layers sum_l ||W_dec,i^l||, which keeps its loss
    comparable with that of one SAE per layer; with l2 the norm of the whole row. Source: Transformer Circuits update October
    2024.
    """
    if not spec.layers or options.crosscoder_norm == "l2":
        return jnp.linalg.norm(params.W_dec, axis=1)
    ends = itertools.accumulate(spec.layers)
    return sum(jnp.linalg.norm(params.W_dec[:, end - width:end], axis=1) for end, width in zip(ends, spec.layers, strict=True))


def _weighted_l1(norm_F: jax.Array, acts_BF: jax.Array) -> jax.Array:
    """mean_b sum_i f_i ||W_dec,i||."""
    return (acts_BF.sum(0) * norm_F).sum() / acts_BF.shape[0]


def _relu(spec, options, params, seen, inputs):
    """mean_b [ ||x - x^||^2 + lambda sum_i p(a_i) ],  a_i = f_i ||W_dec,i||,  p of slope 1 at 0 by `sae.penalty`.

    l1: p(a) = a. Source: Templeton et al. 2024, "Our SAE training". tanh: p(a) = tanh(c a) / c. Source: Transformer Circuits
    update February 2024. log: p(a) = log(1 + c a) / c. Both punish large activations less, and so shrink them less.
    """
    norm_F = _decoder_norms(spec, options, params)
    if options.penalty == "l1":
        l1 = _weighted_l1(norm_F, seen.acts_BF)
    else:
        bend, c = {"tanh": jnp.tanh, "log": jnp.log1p}[options.penalty], options.penalty_scale
        l1 = bend(c * seen.acts_BF * norm_F).sum(0).sum() / (c * seen.acts_BF.shape[0])
    return seen.mse + inputs.sparsity * l1, {"l1": l1}


def _topk(spec, options, params, seen, inputs):
    """mean_b ||x - x^||^2 / Var(x). Source: Gao et al. 2024, section 2.3.

    With `sae.multi_topk` the error with 4 k features is added at 1/8: L(k) + L(4k) / 8, so that the SAE can be used with another
    k than it was trained with (one more selection and all-reduce of [B, D]). Source: Gao et al. 2024, multi-TopK.
    """
    loss = seen.mse * inputs.inverse_variance
    if options.multi_topk:
        wider_BD = decode(spec, params, topk(seen.pre_BF, 4 * spec.k)) + seen.through_BD
        loss = loss + squared_error(seen.y_BD, wider_BD).mean() * inputs.inverse_variance / 8
    return loss, {}


def _gated(spec, options, params, seen, inputs):
    """mean_b [ ||x - x^||^2 + lambda sum_i g_i ||W_dec,i|| + ||x - x^_frozen(g)||^2 ],  g = max(pre-activation of the gate, 0).

    x^_frozen decodes with stop_gradient(W_dec, b_dec): it trains the gate, which passes no gradient in x^. The decoder norm is
    1 in the recipe. Communication beyond relu: one more all-reduce of [B, D]. Source: Rajamanoharan et al. 2024 (Gated SAEs),
    section 3.2.
    """
    gate_BF = jax.nn.relu(seen.pre_BF)
    l1 = _weighted_l1(_decoder_norms(spec, options, params), gate_BF)
    frozen_BD = decode(spec, lax.stop_gradient(params), gate_BF) + lax.stop_gradient(seen.through_BD)
    gate_error = squared_error(seen.y_BD, frozen_BD).mean()
    return seen.mse + inputs.sparsity * l1 + gate_error, {"l1": l1, "gate_error": gate_error}


def _jumprelu(spec, options, params, seen, inputs):
    """mean_b ||x - x^||^2 + lambda * (what `sae.objective` says), see the functions below."""
    threshold_F = thresholds(params)
    if options.objective == "tanh":
        sparsity, pre_act = _tanh(options, _decoder_norms(spec, options, params), seen, threshold_F)
        return seen.mse + inputs.sparsity * sparsity + options.pre_act_coef * pre_act, {"sparsity": sparsity}
    rate_F = fires(seen.pre_BF, threshold_F, spec.bandwidth).mean(0)
    if options.objective == "l0":
        sparsity = rate_F.sum()
    else:
        sparsity = jnp.square(rate_F.sum() / inputs.target_l0 - 1)
    loss = seen.mse + inputs.sparsity * sparsity
    if options.frequency_coef:
        loss = loss + options.frequency_coef * jnp.square(jax.nn.relu(rate_F / options.max_frequency - 1)).sum()
    return loss, {"sparsity": sparsity}


def _tanh(options, norm_F, seen, threshold_F):
    """(mean_b sum_i tanh(c f_i ||W_dec,i||),  mean_b sum_i max(threshold_i - pre_i, 0) ||W_dec,i||).

    Gradients reach every parameter; the second term pulls features back that have stopped firing. Source: Transformer Circuits
    update January 2025, "Dictionary learning optimization techniques".
    """
    sparsity = jnp.tanh(options.penalty_scale * seen.acts_BF * norm_F).sum(0).sum()
    pre_act = (jax.nn.relu(threshold_F - seen.pre_BF).sum(0) * norm_F).sum()
    return sparsity / seen.y_BD.shape[0], pre_act / seen.y_BD.shape[0]
