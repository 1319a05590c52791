"""Objectives: one pure function of (params, batch, state) per kind, returning the loss and what was seen on the way."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from saejax.base import sharding
from saejax.config import SAEOptions
from saejax.config.recipes import WITH_K
from saejax.sae import featurewise, losses, sparse, tiles
from saejax.sae.activations import activate, topk
from saejax.sae.losses import LossInputs, LossParts, dead_features, squared_error, variance_total
from saejax.sae.model import pre_activations_of, read, skipped
from saejax.sae.normalization import columns
from saejax.sae.params import SAEParams, SAESpec
from saejax.sae.prefixes import decode_at_rest, prefix_reconstructions
from saejax.sae.select import UpTo


@struct.dataclass
class Forward:
    """One pass over a batch: normalised rows to be reconstructed, reconstruction, which features fired, the smallest positive
    activation, features per row, the nested reconstructions (none without `sae.groups`), what a skip connection added to all of
    them. Dense path of kinds with k: pre-activations. Kinds without: sums over rows [F] by name, and what is decoded with a
    frozen W_dec.
    """

    y_BD: jax.Array
    recon_BD: jax.Array
    fired_F: jax.Array
    least: jax.Array
    l0: jax.Array
    through_BD: jax.Array | float = 0.0
    prefixes_GBD: jax.Array | None = None
    pre_BF: jax.Array | None = None
    sums: dict[str, jax.Array] = struct.field(default_factory=dict)
    frozen_BD: jax.Array | None = None

    def plus(self, through_BD: jax.Array | float) -> "Forward":
        """With what a skip connection adds."""
        prefixes_GBD = None if self.prefixes_GBD is None else self.prefixes_GBD + through_BD
        return self.replace(recon_BD=self.recon_BD + through_BD, prefixes_GBD=prefixes_GBD, through_BD=through_BD)

    def mean(self, name: str) -> jax.Array:
        """mean_b sum_i of one of `sums`."""
        return self.sums[name].sum() / len(self.y_BD)

    @property
    def mse(self) -> jax.Array:
        """mean_b ||x - x^||^2, with nested prefixes its sum over them (Bussmann et al. 2025, Matryoshka SAEs)."""
        if self.prefixes_GBD is None:
            return squared_error(self.y_BD, self.recon_BD).mean()
        return squared_error(self.y_BD, self.prefixes_GBD).mean(1).sum()


def _tiled(spec: SAESpec, options: SAEOptions, params: SAEParams, read_BD: jax.Array, y_BD: jax.Array) -> Forward:
    found, G = tiles.over_features(spec, options, params, read_BD), max(1, len(options.groups))
    prefixes_GBD = jnp.cumsum(found.parts_GBD[:G], axis=0) + params.b_dec
    return Forward(y_BD=y_BD, recon_BD=prefixes_GBD[-1], prefixes_GBD=prefixes_GBD if options.groups else None,
                   fired_F=found.count_F > 0, least=found.least, l0=found.count_F.sum(dtype=jnp.float32) / len(y_BD),
                   sums=found.sums, frozen_BD=found.parts_GBD[G:].sum(0) if found.parts_GBD.shape[0] > G else None)


def _dense(spec: SAESpec, options: SAEOptions, params: SAEParams, read_BD: jax.Array, y_BD: jax.Array,
           k: UpTo) -> Forward:
    pre_BF = pre_activations_of(spec, params, read_BD)
    acts_BF = activate(spec, params, pre_BF, k)
    prefixes_GBD = prefix_reconstructions(spec, params, acts_BF, options.groups) if options.groups else None
    recon_BD = decode_at_rest(spec, params, acts_BF) if prefixes_GBD is None else prefixes_GBD[-1]
    return Forward(y_BD=y_BD, recon_BD=recon_BD, prefixes_GBD=prefixes_GBD, fired_F=(acts_BF > 0).any(0),
                   least=jnp.where(acts_BF > 0, acts_BF, jnp.inf).min(), l0=(acts_BF > 0).sum(dtype=jnp.float32) / len(y_BD),
                   pre_BF=pre_BF)


def read_rows(spec: SAESpec, params: SAEParams, rows_BW: jax.Array) -> jax.Array:
    """What the encoder reads of rows at rest (`model.read`): one all-gather of [B, d_in] along `dict`."""
    return sharding.gathered(read(spec, params, columns(spec, rows_BW)[0]))


@struct.dataclass
class Sparse:
    """What is seen of a batch's pairs: `Forward`'s figures, and the nested groups' parts of the reconstruction, [G, B, d_out]."""

    parts_GBD: jax.Array
    fired_F: jax.Array
    least: jax.Array
    l0: jax.Array

    @classmethod
    def of(cls, spec: SAESpec, parts_GBD: jax.Array, pairs: sparse.Pairs) -> "Sparse":
        positive_Ln = pairs.values_Ln > 0
        return cls(parts_GBD, sparse.fired(spec, pairs), jnp.where(positive_Ln, pairs.values_Ln, jnp.inf).min(),
                   positive_Ln.sum(dtype=jnp.float32) / parts_GBD.shape[1])


def objective_of_decoded(spec: SAESpec, options: SAEOptions, shared: SAEParams, rows_BW: jax.Array, seen: Sparse,
                         inputs: LossInputs) -> tuple[jax.Array, tuple[LossParts, jax.Array]]:
    """`objective` without AuxK, from what the pairs decode to: a function of `seen.parts_GBD` and of the parameters that are not
    stored by feature. And the error that is left, [B, d_out].
    """
    x_BD, y_BD = columns(spec, rows_BW)
    prefixes_GBD = jnp.cumsum(seen.parts_GBD, axis=0) + shared.b_dec
    forward = Forward(y_BD=y_BD, recon_BD=prefixes_GBD[-1], prefixes_GBD=prefixes_GBD if options.groups else None,
                      fired_F=seen.fired_F, least=seen.least, l0=seen.l0).plus(skipped(spec, shared, x_BD))
    loss, own = _topk(spec, options, shared, forward, inputs)
    return loss, (_parts(loss, own, forward), y_BD - forward.recon_BD)


def objective(spec: SAESpec, options: SAEOptions, params: SAEParams, rows_BW: jax.Array, inputs: LossInputs) -> tuple[
        jax.Array, LossParts]:
    """The loss of a kind over a batch of normalised rows, and what it is made of (its `mse`: that of the whole dictionary).

    With `sae.aux_k`, aux_coef * aux is added to the loss of any kind, times Var(x) where the kind's loss is not divided by it.

    rows_BW: input columns, then those of a transcoder's target; at rest over all devices, as reconstruction and error are: only
    the input is gathered. In the formulas x is what is reconstructed. The sparse path (`saejax.sae.row_gradients`; kinds with k)
    gives the same up to rounding.
    """
    x_BD, y_BD = columns(spec, rows_BW)
    read_BD = read_rows(spec, params, rows_BW)
    by_feature = spec.kind in featurewise.LOSSES
    if by_feature:
        seen = _tiled(spec, options, params, read_BD, y_BD).plus(skipped(spec, params, x_BD))
        loss, own = featurewise.LOSSES[spec.kind](options, params, seen, inputs)
    else:
        seen = _dense(spec, options, params, read_BD, y_BD, inputs.k(spec)).plus(skipped(spec, params, x_BD))
        loss, own = _topk(spec, options, params, seen, inputs)
    if options.aux_k:
        error_BD = lax.stop_gradient(y_BD - seen.recon_BD)
        dead_F = dead_features(inputs, seen.fired_F)
        aux = losses.AuxK(options.aux_k, as_pairs=by_feature and tiles.several(spec, read_BD))
        own |= {"aux": losses.aux_loss(spec, aux, params, read_BD, error_BD, dead_F)}
        in_units_of_loss = 1.0 if spec.kind in WITH_K else 1 / inputs.inverse_variance
        loss = loss + options.aux_coef * own["aux"] * in_units_of_loss
    return loss, _parts(loss, own, seen)


def _parts(loss: jax.Array, own: dict[str, jax.Array], seen: Forward) -> LossParts:
    errors_B = squared_error(seen.y_BD, seen.recon_BD)
    return LossParts(loss=loss, mse=errors_B.mean(), l0=seen.l0, fvu=errors_B.sum() / variance_total(seen.y_BD),
                     fired_F=seen.fired_F, own=own, least=seen.least)


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
