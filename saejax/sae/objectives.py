"""Objectives: one pure function of (params, batch, state) per kind, returning the loss and what was seen on the way."""

import itertools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax import sharding
from saejax.config import SAEOptions
from saejax.recipes import WITH_K
from saejax.sae import sparse
from saejax.sae.activations import activate, fires, thresholds, topk
from saejax.sae.losses import LossInputs, LossParts, aux_loss, squared_error, variance_total
from saejax.sae.model import pre_activations_of, read, skipped
from saejax.sae.normalization import columns
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.prefixes import borders, decode_at_rest, prefix_reconstructions
from saejax.sae.select import UpTo


@struct.dataclass
class Forward:
    """One pass over a batch: normalised rows to be reconstructed, reconstruction, which features fired, the smallest positive
    activation, features per row, the nested reconstructions (none without `sae.groups`), what a skip connection added to all of
    them; pre-activations and activations (none on the sparse path).
    """

    y_BD: jax.Array
    recon_BD: jax.Array
    fired_F: jax.Array
    least: jax.Array
    l0: jax.Array
    through_BD: jax.Array | float = 0.0
    prefixes_GBD: jax.Array | None = None
    pre_BF: jax.Array | None = None
    acts_BF: jax.Array | None = None

    def plus(self, through_BD: jax.Array | float) -> "Forward":
        """With what a skip connection adds."""
        prefixes_GBD = None if self.prefixes_GBD is None else self.prefixes_GBD + through_BD
        return self.replace(recon_BD=self.recon_BD + through_BD, prefixes_GBD=prefixes_GBD, through_BD=through_BD)

    @property
    def mse(self) -> jax.Array:
        """mean_b ||x - x^||^2, with nested prefixes its sum over them (Bussmann et al. 2025, Matryoshka SAEs)."""
        if self.prefixes_GBD is None:
            return squared_error(self.y_BD, self.recon_BD).mean()
        return squared_error(self.y_BD, self.prefixes_GBD).mean(1).sum()


def _dense(spec: SAESpec, options: SAEOptions, params: SAEParams, read_BD: jax.Array, y_BD: jax.Array,
           k: UpTo) -> Forward:
    pre_BF = pre_activations_of(spec, params, read_BD)
    acts_BF = activate(spec, params, pre_BF, k)
    prefixes_GBD = prefix_reconstructions(spec, params, acts_BF, options.groups) if options.groups else None
    recon_BD = decode_at_rest(spec, params, acts_BF) if prefixes_GBD is None else prefixes_GBD[-1]
    return Forward(y_BD=y_BD, recon_BD=recon_BD, prefixes_GBD=prefixes_GBD, fired_F=(acts_BF > 0).any(0),
                   least=jnp.where(acts_BF > 0, acts_BF, jnp.inf).min(), l0=(acts_BF > 0).sum(dtype=jnp.float32) / len(y_BD),
                   pre_BF=pre_BF, acts_BF=acts_BF)


def _sparse(spec: SAESpec, options: SAEOptions, params: SAEParams, read_BD: jax.Array, y_BD: jax.Array,
            k: UpTo) -> Forward:
    over_batch = spec.kind == "batchtopk"
    pairs, missing = sparse.encode(spec, params, read_BD, k, over_batch=over_batch)

    def of_pairs(params: SAEParams, pairs: sparse.Pairs) -> Forward:
        return _of_pairs(spec, options, params, y_BD, pairs)

    if not over_batch:
        return of_pairs(params, pairs)

    def counted(params: SAEParams, pairs: sparse.Pairs) -> Forward:
        return of_pairs(params, sparse.encode(spec, params, read_BD, k, over_batch=True, counted=True)[0])

    keep = jax.checkpoint_policies.save_only_these_names(sparse.SAVED)
    return lax.cond(sharding.any_member(missing), jax.checkpoint(counted, policy=keep), of_pairs, params, pairs)


def _of_pairs(spec: SAESpec, options: SAEOptions, params: SAEParams, y_BD: jax.Array, pairs: sparse.Pairs,
              learned: tuple[jax.Array, jax.Array] | None = None) -> Forward:
    ends = borders(options.groups, spec.d_sae) if options.groups else (spec.d_sae,)
    prefixes_GBD = sparse.decode_groups(spec, params, pairs, len(y_BD), ends, learned)
    positive_P = pairs.values_P > 0
    return Forward(y_BD=y_BD, recon_BD=prefixes_GBD[-1], prefixes_GBD=prefixes_GBD if options.groups else None,
                   fired_F=sparse.fired(spec, pairs), least=jnp.where(positive_P, pairs.values_P, jnp.inf).min(),
                   l0=positive_P.sum(dtype=jnp.float32) / len(y_BD))


def read_rows(spec: SAESpec, params: SAEParams, rows_BW: jax.Array) -> jax.Array:
    """What the encoder reads of rows at rest (`model.read`): one all-gather of [B, d_in] along `dict`."""
    return sharding.gathered(read(spec, params, columns(spec, rows_BW)[0]))


def objective_of_rows(spec: SAESpec, options: SAEOptions, params: SAEParams, pairs: sparse.Pairs, learned: SAEParams,
                      rows: sparse.Rows, read_BD: jax.Array, rows_BW: jax.Array,
                      inputs: LossInputs) -> tuple[jax.Array, tuple[LossParts, jax.Array]]:
    """`objective` without AuxK of pairs that are selected already, as a function of `learned` (`sparse.attached`), and the error
    that is left, [B, d_out].
    """
    x_BD, y_BD = columns(spec, rows_BW)
    params = jax.tree.map(lax.stop_gradient, params)
    pairs, place_P = sparse.attached(spec, pairs, read_BD, learned, rows)
    params = params.replace(b_dec=learned.b_dec, W_skip=learned.W_skip)
    seen = _of_pairs(spec, options, params, y_BD, pairs, (learned.W_dec, place_P)).plus(skipped(spec, params, x_BD))
    loss, own = _topk(spec, options, params, seen, inputs)
    return loss, (_parts(loss, own, seen), y_BD - seen.recon_BD)


def objective(spec: SAESpec, options: SAEOptions, params: SAEParams, rows_BW: jax.Array, inputs: LossInputs, *,
              as_pairs: bool = False) -> tuple[jax.Array, LossParts]:
    """The loss of a kind over a batch of normalised rows, and what it is made of (its `mse`: that of the whole dictionary).

    With `sae.aux_k`, aux_coef * aux is added to the loss of any kind, times Var(x) where the kind's loss is not divided by it.

    rows_BW: input columns, then those of a transcoder's target; at rest over all devices, as reconstruction and error are: only
    the input is gathered. In the formulas x is what is reconstructed. as_pairs: take the sparse path (`saejax.sae.sparse`; kinds
    with k), which gives the same up to rounding.
    """
    x_BD, y_BD = columns(spec, rows_BW)
    read_BD = read_rows(spec, params, rows_BW)
    seen = (_sparse if as_pairs else _dense)(spec, options, params, read_BD, y_BD, inputs.k(spec))
    seen = seen.plus(skipped(spec, params, x_BD))
    of_kind = {"relu": _relu, "topk": _topk, "batchtopk": _topk, "gated": _gated, "jumprelu": _jumprelu}[spec.kind]
    loss, own = of_kind(spec, options, params, seen, inputs)
    if options.aux_k:
        error_BD = lax.stop_gradient(y_BD - seen.recon_BD)
        own |= {"aux": aux_loss(spec, params, read_BD, error_BD, seen.fired_F, inputs, options.aux_k, as_pairs=as_pairs)}
        in_units_of_loss = 1.0 if spec.kind in WITH_K else 1 / inputs.inverse_variance
        loss = loss + options.aux_coef * own["aux"] * in_units_of_loss
    return loss, _parts(loss, own, seen)


def _parts(loss: jax.Array, own: dict[str, jax.Array], seen: Forward) -> LossParts:
    errors_B = squared_error(seen.y_BD, seen.recon_BD)
    return LossParts(loss=loss, mse=errors_B.mean(), l0=seen.l0, fvu=errors_B.sum() / variance_total(seen.y_BD),
                     fired_F=seen.fired_F, own=own, least=seen.least)


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
    k than it was trained with (one more selection and reconstruction). Source: Gao et al. 2024, multi-TopK.
    """
    loss = seen.mse * inputs.inverse_variance
    if options.multi_topk:
        wider_BD = decode_at_rest(spec, params, topk(seen.pre_BF, inputs.k(spec) * 4)) + seen.through_BD
        loss = loss + squared_error(seen.y_BD, wider_BD).mean() * inputs.inverse_variance / 8
    return loss, {}


def _gated(spec, options, params, seen, inputs):
    """mean_b [ ||x - x^||^2 + lambda sum_i g_i ||W_dec,i|| + ||x - x^_frozen(g)||^2 ],  g = max(pre-activation of the gate, 0).

    x^_frozen decodes with stop_gradient(W_dec, b_dec): it trains the gate, which passes no gradient in x^. The decoder norm is
    1 in the recipe. Communication beyond relu: one more reconstruction. Source: Rajamanoharan et al. 2024 (Gated SAEs),
    section 3.2.
    """
    gate_BF = jax.nn.relu(seen.pre_BF)
    l1 = _weighted_l1(_decoder_norms(spec, options, params), gate_BF)
    frozen_BD = decode_at_rest(spec, lax.stop_gradient(params), gate_BF) + lax.stop_gradient(seen.through_BD)
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
