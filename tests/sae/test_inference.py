"""A folded SAE on raw activations equals the trained one on normalised ones, on every kind, mesh and array type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.errors import FormatError
from saejax.base.records import MeshOptions
from saejax.sae import SAEParams, SAESpec, reconstruct
from saejax.sae.inference import SAE, SAEConfig, fold
from saejax.sae.normalization import Normalization
from saejax.sae.params import PER_FEATURE

SPECS = [SAESpec("relu", 12, 64), SAESpec("topk", 12, 64, k=5, pre_bias=True), SAESpec("gated", 12, 64, pre_bias=True),
         SAESpec("jumprelu", 12, 64), SAESpec("relu", 12, 64, d_out=9), SAESpec("topk", 12, 64, k=5, d_out=9, skip=True),
         SAESpec("jumprelu", 12, 64, d_out=9, skip=True), SAESpec("relu", 12, 64, layers=(8, 4), pre_bias=True)]


def name(spec):
    return f"{spec.kind} {spec.shape}"


def make(spec):
    rng = np.random.default_rng(3)
    d_out = spec.width_out
    W_dec = rng.standard_normal((64, d_out))
    if spec.kind == "topk":
        W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    params = SAEParams(*(jnp.asarray(v, jnp.float32) for v in (
        rng.standard_normal((64, 12)), rng.standard_normal(64) * 0.1, W_dec, rng.standard_normal(d_out))),
        W_skip=jnp.asarray(rng.standard_normal((12, d_out)), jnp.float32) if spec.skip else None,
        per_feature={name: jnp.asarray(rng.uniform(-2, 0, 64), jnp.float32) for name in PER_FEATURE.get(spec.kind, ())})
    scales = np.repeat(np.float32([0.037, 0.05] if spec.layers else [0.037]), spec.layers or 12)
    if spec.d_out is not None:
        scales = np.concatenate([scales, np.full(d_out, 0.4, np.float32)])
    center = rng.standard_normal(len(scales)) * 5
    cfg = SAEConfig(kind=spec.kind, d_in=12, d_sae=64, k=spec.k, pre_bias=spec.pre_bias, model="m", d_out=spec.d_out,
                    hookpoints=("h", "g")[: max(1, len(spec.layers))], target="t" if spec.d_out else "", skip=spec.skip,
                    layers=spec.layers)
    x = rng.standard_normal((3, 7, 12)).astype(np.float32) * 30
    return params, Normalization(jnp.asarray(scales), jnp.asarray(center, jnp.float32)), cfg, x


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_fold_keeps_the_function_and_states_units(spec):
    params, normalization, cfg, x = make(spec)
    read, written = normalization.parts(spec)
    recon, acts = reconstruct(spec, params, read.apply(jnp.asarray(x.reshape(-1, 12))))
    sae = SAE(fold(spec, params, normalization), cfg)
    np.testing.assert_allclose(sae(x).reshape(-1, spec.width_out), recon / written.scale + written.center, rtol=2e-5, atol=2e-3)
    units = np.linalg.norm(params.W_dec / written.scale, axis=1)
    assert 0 < (np.asarray(acts) > 0).mean() < 0.7
    np.testing.assert_allclose(sae.encode(x).reshape(-1, 64), acts * units, rtol=2e-5, atol=2e-3)
    np.testing.assert_allclose(np.linalg.norm(sae.W_dec, axis=1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=name)
@pytest.mark.parametrize("shape", [(1, 8), (2, 4), (8, 1)])
def test_mesh_agrees_with_one_device(spec, shape):
    params, scale, cfg, x = make(spec)
    folded = fold(spec, params, scale)
    one, many = SAE(folded, cfg), SAE(folded, cfg, sharding.make_mesh(MeshOptions(*shape)))
    np.testing.assert_allclose(many.encode(x), one.encode(jnp.asarray(x)), rtol=1e-5, atol=1e-3)
    recon, acts = many.reconstruct(x[0, 0])
    assert recon.shape == (spec.width_out,) and acts.shape == (64,)
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
