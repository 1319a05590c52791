"""A folded SAE on raw activations equals the trained one on normalised ones, on every kind, mesh and array type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import sharding
from saejax.config import MeshOptions
from saejax.errors import FormatError
from saejax.sae import SAEParams, SAESpec, reconstruct
from saejax.sae.inference import SAE, SAEConfig, fold
from saejax.sae.params import PER_FEATURE

SPECS = [SAESpec("relu", 12, 64), SAESpec("topk", 12, 64, k=5, pre_bias=True), SAESpec("gated", 12, 64, pre_bias=True),
         SAESpec("jumprelu", 12, 64)]


def make(spec):
    rng = np.random.default_rng(3)
    W_dec = rng.standard_normal((64, 12))
    if spec.kind == "topk":
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    params = SAEParams(*(jnp.asarray(v, jnp.float32) for v in (
        rng.standard_normal((64, 12)), rng.standard_normal(64) * 0.1, W_dec, rng.standard_normal(12))),
        per_feature={name: jnp.asarray(rng.uniform(-2, 0, 64), jnp.float32) for name in PER_FEATURE.get(spec.kind, ())})
    scale = jnp.float32(0.037)
    cfg = SAEConfig(kind=spec.kind, d_in=12, d_sae=64, k=spec.k, pre_bias=spec.pre_bias, hookpoint="h", model="m")
    x = rng.standard_normal((3, 7, 12)).astype(np.float32) * 30
    return params, scale, cfg, x


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
def test_fold_keeps_the_function_and_states_units(spec):
    params, scale, cfg, x = make(spec)
    recon, acts = reconstruct(spec, params, x.reshape(-1, 12) * scale)
    sae = SAE(fold(spec, params, scale), cfg)
    np.testing.assert_allclose(sae(x).reshape(-1, 12), recon / scale, rtol=2e-5, atol=2e-3)
    norms = np.linalg.norm(params.W_dec, axis=1)
    assert 0 < (np.asarray(acts) > 0).mean() < 0.7
    np.testing.assert_allclose(sae.encode(x).reshape(-1, 64), acts * norms / scale, rtol=2e-5, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.kind)
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)])
def test_mesh_agrees_with_one_device(spec, shape):
    params, scale, cfg, x = make(spec)
    folded = fold(spec, params, scale)
    one, many = SAE(folded, cfg), SAE(folded, cfg, sharding.make_mesh(MeshOptions(*shape)))
    np.testing.assert_allclose(many.encode(x), one.encode(jnp.asarray(x)), rtol=1e-5, atol=1e-3)
    recon, acts = many.reconstruct(x[0, 0])
    assert recon.shape == (12,) and acts.shape == (64,)
    np.testing.assert_allclose(recon, one(x[0, 0]), rtol=1e-5, atol=1e-3)


def test_inside_jit_and_grad():
    params, scale, cfg, x = make(SPECS[1])
    sae = SAE(fold(SPECS[1], params, scale), cfg)
    np.testing.assert_allclose(jax.jit(lambda x: sae(x))(x), sae(x), rtol=1e-5, atol=1e-3)
    assert np.isfinite(jax.grad(lambda x: (sae(x) ** 2).sum())(jnp.asarray(x))).all()


def test_wrong_width_is_one_line():
    params, scale, cfg, _ = make(SPECS[0])
    with pytest.raises(FormatError, match=r"expects \[\.\.\., 12\], got shape \(4, 13\)"):
        SAE(fold(SPECS[0], params, scale), cfg).encode(np.zeros((4, 13)))
