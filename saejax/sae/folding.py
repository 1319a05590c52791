"""Folding and unfolding of decoder norms and input scales, of SAEs that take raw or scaled activations.

All of it rests on relu(c z) = c relu(z) for c > 0. Thresholds and the magnitude bias of gated SAEs are in the units of
pre-activations and scale like b_enc; `r_mag` is a ratio and stays.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from saejax.base.errors import FormatError
from saejax.sae.params import SAEParams
from saejax.sae.products import product

_RATIOS = ("r_mag",)


def decoder_norms(params: SAEParams) -> jax.Array:
    """||W_dec,i|| of every feature, float32 [F], at least 1e-8."""
    return jnp.maximum(jnp.linalg.norm(params.W_dec, axis=1), 1e-8)


def scale_features(params: SAEParams, by_F: jax.Array) -> SAEParams:
    """The same function with feature i's activation multiplied by by_F[i] > 0: encoder, biases and thresholds times it, decoder
    rows divided by it. Keeps the active set except for kinds that compare features (topk, groupmax).
    """
    own = {name: value if name in _RATIOS else value * by_F for name, value in params.per_feature.items()}
    return replace(params, W_enc=params.W_enc * by_F[:, None], b_enc=params.b_enc * by_F, W_dec=params.W_dec / by_F[:, None],
                   per_feature=own)


def fold_decoder_norms(kind: str, params: SAEParams) -> SAEParams:
    """Unit decoder rows: activations become the length of a feature's contribution. Source: Transformer Circuits, April 2024.

    Raises `FormatError` for topk and groupmax, where it would change which features are active.
    """
    if kind in ("topk", "groupmax"):
        raise FormatError(f"{kind}: folding decoder norms would change which features win; only an SAE that selects by "
                          "activation x decoder norm can be folded")
    return scale_features(params, decoder_norms(params))


def unfold_decoder_norms(params: SAEParams, norms_F: jax.Array) -> SAEParams:
    """The inverse of `fold_decoder_norms`, given the norms that were folded."""
    return scale_features(params, 1 / norms_F)


def fold_input_scale(params: SAEParams, read: float, written: float | None = None) -> SAEParams:
    """Weights for raw activations x of an SAE that reads x * read and reconstructs y * written (default: read).

    W_enc *= read, W_dec /= written, b_dec /= written, W_skip *= read / written; b_enc and thresholds stay, so activations stay in
    units of the scaled input. Source: SAELens, `fold_activation_norm_scaling_factor`.
    """
    written = read if written is None else written
    skip = None if params.W_skip is None else params.W_skip * (read / written)
    return replace(params, W_enc=params.W_enc * read, W_dec=params.W_dec / written, b_dec=params.b_dec / written, W_skip=skip)


def unfold_input_scale(params: SAEParams, read: float, written: float | None = None) -> SAEParams:
    """The inverse of `fold_input_scale`."""
    return fold_input_scale(params, 1 / read, None if written is None else 1 / written)


def to_raw_units(params: SAEParams, read: float, written: float | None = None) -> SAEParams:
    """`fold_input_scale` with activations, biases and thresholds divided by `read`: features in units of raw activations, W_enc
    as it was. Source: dictionary_learning, `scale_biases(1 / read)`.
    """
    folded = fold_input_scale(params, read, written)
    return scale_features(folded, jnp.full_like(params.b_enc, 1 / read))


def with_pre_bias(params: SAEParams, has: bool, wants: bool) -> SAEParams:
    """The same function with an encoder that reads x - b_dec (wants) instead of x (has), or the other way round.

    b_enc and the magnitude bias of gated SAEs take up +- W_enc b_dec; thresholds stay. Exact but for the rounding of that sum.
    """
    if has == wants:
        return params
    shift_F = product("fd,d->f", params.W_enc, params.b_dec, jnp.float32) * (1.0 if wants else -1.0)
    own = dict(params.per_feature)
    if "b_mag" in own:
        own["b_mag"] = own["b_mag"] + jnp.exp(own["r_mag"]) * shift_F
    return replace(params, b_enc=params.b_enc + shift_F, per_feature=own)
