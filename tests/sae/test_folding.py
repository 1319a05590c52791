"""Folding is its own inverse backwards and leaves the function alone."""

import numpy as np
import pytest

from saejax.base.errors import FormatError
from saejax.sae import SAEParams, tensors
from saejax.sae.folding import (
    decoder_norms,
    fold_decoder_norms,
    fold_input_scale,
    to_raw_units,
    unfold_decoder_norms,
    unfold_input_scale,
    with_pre_bias,
)
from saejax.sae.inference import SAE, SAEConfig

D, F = 6, 20
OWN = {"relu": (), "gated": ("b_mag", "r_mag"), "jumprelu": ("threshold",)}
KINDS = tuple(OWN)
X = (np.random.default_rng(2).standard_normal((9, D)) * 2).astype(np.float32)


def make(kind, pre_bias=True):
    rng = np.random.default_rng(0)
    values = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)} | dict.fromkeys(OWN[kind], (F,))
    arrays = {name: np.float32(rng.uniform(0.1, 1, shape) if name == "threshold" else rng.standard_normal(shape))
              for name, shape in values.items()}
    own = {name: arrays.pop(name) for name in OWN[kind]}
    cfg = SAEConfig(kind=kind, d_in=D, d_sae=F, k=0, pre_bias=pre_bias, hookpoints=("h",), model="m")
    return SAEParams(**arrays, per_feature=own), cfg


def same(params, other, rtol=2e-6):
    for name, value in tensors(params).items():
        np.testing.assert_allclose(tensors(other)[name], value, rtol=rtol, atol=1e-6)


def run(params, cfg, x=X):
    recon, acts = SAE(params, cfg).reconstruct(x)
    return np.asarray(recon), np.asarray(acts)


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_norms(kind):
    params, cfg = make(kind)
    norms = decoder_norms(params)
    folded = fold_decoder_norms(kind, params)
    np.testing.assert_allclose(np.linalg.norm(folded.W_dec, axis=1), 1, rtol=1e-6)
    same(params, unfold_decoder_norms(folded, norms))
    (recon, acts), (recon_folded, acts_folded) = run(params, cfg), run(folded, cfg)
    assert (acts > 0).any()
    np.testing.assert_allclose(recon_folded, recon, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(acts_folded, acts * norms, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pre_bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_input_scale(kind, pre_bias):
    params, cfg = make(kind, pre_bias)
    s = 0.3
    folded = fold_input_scale(params, s)
    same(params, unfold_input_scale(folded, s))
    recon, acts = run(params, cfg, X * s)
    for got, factor in ((folded, 1.0), (to_raw_units(params, s), s)):
        recon_folded, acts_folded = run(got, cfg)
        np.testing.assert_allclose(recon_folded, recon / s, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(acts_folded, acts / factor, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(to_raw_units(params, s).W_enc, params.W_enc, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has", [True, False])
def test_pre_bias(kind, has):
    params, cfg = make(kind, has)
    other = with_pre_bias(params, has, not has)
    assert with_pre_bias(params, has, has) is params
    same(params, with_pre_bias(other, not has, has), rtol=1e-5)
    for a, b in zip(run(params, cfg), run(other, make(kind, not has)[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "groupmax"])
def test_kinds_that_compare_features_are_refused(kind):
    with pytest.raises(FormatError, match="would change which features win"):
        fold_decoder_norms(kind, make("relu")[0])
