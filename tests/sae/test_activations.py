"""Activation functions agree with what other libraries computed (arrays and outputs written by those libraries)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.sae import SAEParams, SAESpec, reconstruct

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize("peer", ["saelens", "dictionary_learning"])
def test_gated_as_other_libraries_compute_it(peer):
    """sae-lens 6.54.12 and dictionary-learning 0.1.0; random weights, decoder rows that are not unit, biases that are not 0."""
    saved = np.load(FIXTURES / f"gated_{peer}.npz")
    common = {name: jnp.asarray(saved[name]) for name in ("W_enc", "W_dec", "b_dec")}
    params = SAEParams(**common, b_enc=jnp.asarray(saved["b_gate"]),
                       per_feature={name: jnp.asarray(saved[name]) for name in ("r_mag", "b_mag")})
    recon, acts = reconstruct(SAESpec("gated", 32, 128, pre_bias=True), params, jnp.asarray(saved["x"]))
    np.testing.assert_allclose(acts, saved["feature_acts"], atol=1e-4)
    np.testing.assert_array_equal(np.asarray(acts) > 0, saved["feature_acts"] > 0)
    np.testing.assert_allclose(recon, saved["x_hat"], atol=1e-4)
