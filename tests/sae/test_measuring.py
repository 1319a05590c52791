"""What is measured without an array of rows x features is what the activations say."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.sae import SAEParams, inference, tiles
from saejax.sae.inference import SAE, SAEConfig

D, F, K = 12, 96, 5
SHAPES = {"relu": {}, "jumprelu": {}, "gated": {}, "topk": {}, "transcoder": {"d_out": 9}, "skip": {"d_out": 9, "skip": True},
          "layer_norm": {"input_norm": "layer_norm"}, "center": {"input_norm": "center"}, "groupmax": {}}
KIND = {"transcoder": "topk", "skip": "relu", "layer_norm": "topk", "center": "jumprelu"}
MESHES = [None, (1, 8), (2, 4), (4, 2), (8, 1)]


def made(name, mesh, k=K):
    rng, more = np.random.default_rng(0), SHAPES[name]
    kind, d_out = KIND.get(name, name), more.get("d_out", D)

    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    own = {"jumprelu": {"threshold": jnp.abs(array(F))}, "gated": {"r_mag": array(F), "b_mag": array(F)}}.get(kind, {})
    params = SAEParams(array(F, D), array(F), array(F, d_out), array(d_out), W_skip=array(D, d_out) if "skip" in more else None,
                       per_feature=own)
    cfg = SAEConfig(kind, D, F, k if kind in ("topk", "groupmax") else 0, name in ("relu", "topk"), ("h",), "m",
                    target="t" if "d_out" in more else "", **more)
    where = sharding.make_mesh(MeshOptions(*mesh)) if mesh else None
    return SAE(params, cfg, where)


def check(sae, rows):
    x = np.random.default_rng(1).standard_normal((rows, D)).astype(np.float32)
    counted = np.random.default_rng(2).random(rows) < 0.7
    recon, acts = (np.asarray(sharding.to_host(value)) for value in sae.reconstruct(x))
    found = sae.measure(x, counted)
    np.testing.assert_allclose(sharding.to_host(jnp.asarray(found.recon_BD)), recon, rtol=2e-5, atol=2e-4)
    assert np.array_equal(found.l0_B, (acts > 0).sum(1))
    assert np.array_equal(sharding.to_host(found.fired_F), ((acts > 0) & counted[:, None]).sum(0))


@pytest.mark.parametrize("mesh", [m if m in (None, (2, 4)) else pytest.param(m, marks=pytest.mark.slow) for m in MESHES])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_activations(name, mesh):
    check(made(name, mesh, 6 if name == "groupmax" else K), 37)


@pytest.mark.parametrize("mesh", [None, (2, 4)])
@pytest.mark.parametrize("name", ["relu", "jumprelu", "gated"])
def test_tile_by_tile(name, mesh, monkeypatch):
    """Tiles that do not divide the shard."""
    monkeypatch.setattr(tiles, "tile_width", lambda rows, features, chip: min(features, 7))
    check(made(name, mesh), 24)


@pytest.mark.parametrize("mesh", [(1, 8), (2, 4)])
@pytest.mark.parametrize("name", ["relu", "topk"])
def test_part_by_part(name, mesh, monkeypatch):
    """More rows than are taken at once; the last part is not full."""
    monkeypatch.setattr(inference, "ROWS", 16)
    check(made(name, mesh), 37)


@pytest.mark.parametrize("k", [1, 12, 40, 96])
@pytest.mark.parametrize("mesh", [None, (1, 8)])
def test_any_k(k, mesh):
    """As many features as a shard of 12 has, more, and all of them."""
    check(made("topk", mesh, k), 16)
