"""The threshold that replaces topk's selection is exact, the same on every mesh, and says what it reached."""

import dataclasses

import jax
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.sae import SAEParams
from saejax.sae import calibrate as module
from saejax.sae.calibrate import calibrate, passes, scaled
from saejax.sae.inference import SAE, SAEConfig

D, F, N, K = 6, 64, 203, 5


def made(rng, *, whole: bool, mesh=None) -> tuple[SAE, np.ndarray]:
    """A jumprelu SAE with thresholds between 1/2 and 2, and rows; whole: small integers, whose products are exact."""
    draw = (lambda *shape: rng.integers(-3, 4, shape).astype(np.float32)) if whole else (
        lambda *shape: rng.standard_normal(shape).astype(np.float32))
    params = SAEParams(W_enc=draw(F, D), b_enc=draw(F), W_dec=draw(F, D), b_dec=draw(D),
                       per_feature={"threshold": rng.choice(np.array([0.5, 1, 2], np.float32), F)})
    x = draw(N, D)
    cfg = SAEConfig(kind="jumprelu", d_in=D, d_sae=F, k=0, pre_bias=True, hookpoints=("x",), model="none")
    return SAE(params if mesh else jax.device_put(params), cfg, mesh), x


def ratios(sae: SAE, x: np.ndarray) -> np.ndarray:
    """By what a feature's threshold could be multiplied until it no longer fires, sorted from above."""
    p = sae.params
    pre = (x - np.asarray(p.b_dec)) @ np.asarray(p.W_enc).T + np.asarray(p.b_enc)
    return np.sort((pre / np.asarray(p.per_feature["threshold"])).ravel())[::-1]


@pytest.mark.parametrize("k", [1, K, 20])
def test_it_lies_half_way_between_what_fires_and_what_does_not(k):
    """Integers over powers of two: sums and quotients are exact, and many values tie."""
    sae, x = made(np.random.default_rng(0), whole=True)
    all_ = ratios(sae, x)
    found = calibrate(sae, x, k)
    assert found.factor == (all_[N * k] + all_[all_ > all_[N * k]].min()) / 2 > 0
    assert found.l0 * N == pytest.approx((all_ > found.factor).sum()) and (all_ > found.factor).sum() < N * k < (
        all_ >= all_[N * k]).sum(), "values tie at the border"
    acts = np.asarray(scaled(sae, found.factor).encode(x))
    assert (acts > 0).sum() / N == found.l0


def test_mean_l0_is_k_without_ties():
    sae, x = made(np.random.default_rng(1), whole=False)
    found = calibrate(sae, x, K)
    assert (found.l0, found.rows, found.k) == (K, N, K)
    assert (np.asarray(scaled(sae, found.factor).encode(x)) > 0).sum() == pytest.approx(N * K, abs=1)
    assert found.factor == pytest.approx(ratios(sae, x)[N * K - 1:N * K + 1].mean(), rel=1e-5)


def test_fewer_positive_values_than_k():
    sae, x = made(np.random.default_rng(2), whole=False)
    found = calibrate(sae, x, F)
    assert found.factor == 0 and found.l0 == (ratios(sae, x) > 0).sum() / N < F
    silent = SAE(sae.params.replace(b_enc=sae.params.b_enc - 1e6), sae.cfg)
    assert (calibrate(silent, x, K).factor, calibrate(silent, x, K).l0) == (0, 0)


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)])
def test_a_mesh_gives_the_same_bits(monkeypatch, shape, norm):
    """Also in many tiles, of which the last is not full."""
    monkeypatch.setattr(module, "_LEAST", 3)
    monkeypatch.setattr(module, "_TILE", 0)
    sae, x = made(np.random.default_rng(3), whole=norm == "none")
    sae = SAE(sae.params, dataclasses.replace(sae.cfg, input_norm=norm))
    seen = []
    expected = calibrate(sae, x, K, seen.append)
    assert sum(seen) == passes() * N and max(seen) == 3
    mesh = sharding.make_mesh(MeshOptions(*shape))
    assert calibrate(SAE(jax.device_get(sae.params), sae.cfg, mesh), x, K) == expected


def test_counts_pass_32_bits():
    """Each device's counts are kept in two words."""
    sae, x = made(np.random.default_rng(4), whole=True)
    (n,) = module._counts(sae, x, np.ones(1, np.float32), lambda n: None)
    full, zero = np.full((1, 1), 2**32 - 7, np.uint32), np.zeros((1, 1), np.uint32)
    low, high = module._added(sae.cfg.spec, "none", sae.params, x, np.ones(N, bool), np.ones(1, np.float32), (full, zero))
    assert n > 7 and (int(low[0, 0]), int(high[0, 0])) == (n - 7, 1)


def test_no_array_has_all_factors():
    """Comparisons are summed as they are made."""
    sae, x = made(np.random.default_rng(5), whole=False)
    zero = np.zeros((1, module.PARTS), np.uint32)
    compiled = module._added.lower(sae.cfg.spec, "none", sae.params, x, np.ones(N, bool), np.ones(module.PARTS, np.float32),
                                   (zero, zero)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * N * F
