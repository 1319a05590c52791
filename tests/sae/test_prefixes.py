"""Nested reconstructions are those of the truncated dictionaries, wherever borders and shards fall."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base import sharding
from saejax.base.records import MeshOptions
from saejax.sae import SAEParams, SAESpec, param_shardings, tensors
from saejax.sae.prefixes import borders, prefix_reconstructions

SHARES = (0.1, 0.15, 0.05, 0.45, 0.25)  # borders 3, 8, 10, 24 of 32: beside, on and between the borders of shards
SPEC = SAESpec("batchtopk", 5, 32, k=4)


def case():
    rng = np.random.default_rng(0)
    W, b_dec = rng.standard_normal((32, 5)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    return SAEParams(jnp.asarray(W), jnp.zeros(32), jnp.asarray(W), jnp.asarray(b_dec)), rng.random((16, 32)).astype(np.float32)


def loss(params, acts_BF):
    weight = jnp.arange(1.0, 6.0)[:, None, None]
    return (weight * jnp.square(prefix_reconstructions(SPEC, params, acts_BF, SHARES))).sum()


@pytest.mark.parametrize("mesh_shape", [None, (1, 8), (2, 4), (8, 1)])
def test_equals_truncated_dictionaries_with_gradients(mesh_shape):
    params, acts = case()
    ends = borders(SHARES, 32)
    assert ends == (3, 8, 10, 24, 32)
    W, b = np.asarray(params.W_dec, np.float64), np.asarray(params.b_dec, np.float64)
    recons = [acts[:, :end] @ W[:end] + b for end in ends]
    grad_acts = sum(2 * (g + 1) * np.where(np.arange(32) < end, recons[g] @ W.T, 0) for g, end in enumerate(ends))
    grad_W = sum(2 * (g + 1) * np.where(np.arange(32) < end, acts, 0).T @ recons[g] for g, end in enumerate(ends))
    if mesh_shape is None:
        got, grads = prefix_reconstructions(SPEC, params, jnp.asarray(acts), SHARES), jax.grad(loss, (0, 1))(params, acts)
    else:
        mesh = sharding.make_mesh(MeshOptions(*mesh_shape))
        with jax.set_mesh(mesh):
            rows_features = sharding.sharding(mesh, "rows", "features")
            placed = jax.device_put(params, param_shardings(mesh, tensors(params))), sharding.place(acts, rows_features)
            got = jax.jit(lambda p, a: prefix_reconstructions(SPEC, p, a, SHARES))(*placed)
            grads = jax.jit(jax.grad(loss, (0, 1)))(*placed)
    np.testing.assert_allclose(got, recons, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(grads[1], grad_acts, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(grads[0].W_dec, grad_W, rtol=1e-4, atol=1e-3)


def test_shares_of_the_recipe_increase_up_to_the_whole():
    ends = borders((1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2 + 1 / 32), 4608)
    assert list(ends) == sorted(set(ends)) and ends[-1] == 4608
