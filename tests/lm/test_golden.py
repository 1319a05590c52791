"""The decoder against transformers + torch; `benchmarks/lm_golden.py` writes the golden files."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saejax import lm
from saejax.lm import hf_config, weights
from tests.lm import tiny_llama

GOLDEN = Path(__file__).parent / "golden"
LOGITS_ATOL = 1e-3
RESIDUAL_RTOL = 1e-5


def residual_names(cfg) -> list[str]:
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(cfg.n_layers))]


@jax.jit
def everything(model, tokens_BT):
    """(logits by the scanned forward, residual stream before layer 0 and after each layer by the tapped one)."""
    names = residual_names(model.cfg)
    kept = lm.capture(model, tokens_BT, names)
    return model(tokens_BT), jnp.stack([kept[name] for name in names])


def relative(found, wanted) -> np.ndarray:
    """||found - wanted|| / ||wanted|| per token."""
    return np.linalg.norm(np.asarray(found) - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def test_smollm2_equals_torch(smollm2):
    golden = np.load(GOLDEN / "smollm2.npz")
    tokens_BT = jnp.asarray(golden["tokens"])
    logits_BTV, residual = everything(smollm2.model, tokens_BT)
    rows, columns = golden["positions"].T
    error = relative(residual[:, rows, columns], golden["residual"])
    assert error.max() <= RESIDUAL_RTOL, f"by layer: {error.max(axis=1)}"
    assert np.abs(np.asarray(logits_BTV)[..., golden["logit_columns"]] - golden["logits"]).max() <= LOGITS_ATOL
    nll = jax.jit(lm.cross_entropy)(logits_BTV, tokens_BT)
    assert nll.shape == golden["nll"].shape and nll.dtype == jnp.float32
    np.testing.assert_allclose(nll, golden["nll"], atol=LOGITS_ATOL)


def test_tiny_llama_equals_torch(tiny, tokens_BT):
    golden = np.load(GOLDEN / "tiny_llama.npz")
    logits_BTV, residual = everything(tiny, tokens_BT)
    assert relative(residual, golden["residual"]).max() <= RESIDUAL_RTOL
    assert np.abs(np.asarray(logits_BTV) - golden["logits"]).max() <= LOGITS_ATOL


@pytest.mark.parametrize("field, value", [("rms_norm_eps", 1e-6), ("rope_parameters", None)])
def test_no_field_is_ignored(tiny_folder, tokens_BT, field, value):
    golden = np.load(GOLDEN / "tiny_llama.npz")
    cfg = hf_config.from_hf(tiny_llama.CONFIG | {field: value})
    model = weights.from_safetensors(cfg, tiny_folder, dtype=jnp.float32)
    assert np.abs(np.asarray(model(tokens_BT)) - golden["logits"]).max() > 10 * LOGITS_ATOL


def test_old_spelling_of_rope_theta(tiny_folder, tokens_BT):
    golden = np.load(GOLDEN / "tiny_llama.npz")
    old = {key: value for key, value in tiny_llama.CONFIG.items() if key != "rope_parameters"}
    cfg = hf_config.from_hf(old | {"rope_theta": 700, "rope_scaling": None})
    model = weights.from_safetensors(cfg, tiny_folder, dtype=jnp.float32)
    assert np.abs(np.asarray(model(tokens_BT)) - golden["logits"]).max() <= LOGITS_ATOL
