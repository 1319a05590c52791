"""`train.init_from`: step 0 computes what the dictionary computes, on any mesh, or one line says why not."""

from pathlib import Path

import numpy as np
import pytest

import saejax
from saejax.base.errors import ConfigError
from saejax.formats.release import release
from saejax.train import loop
from tests.train.synthetic import make_config, make_store

FIXTURES = Path(__file__).parents[1] / "formats" / "fixtures"
STILL = {"train__lr": 1e-30, "sae__aux_k": 0}  # one step moves nothing that float32 sees


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["topk", "relu", "gated", "jumprelu", "skip_transcoder", "crosscoder"])
def test_goes_on_from_a_release(kind, store, tmp_path):
    """A release of a run, then a run from it under another normalisation: the same function after a step that does not move."""
    loop.train(make_config(kind, tmp_path / "first"), store)
    first = release(saejax.load(tmp_path / "first"), tmp_path / "released")
    config = make_config(kind, tmp_path / "second", train__init_from=str(first), sae__center=kind != "topk", **STILL)
    loop.train(config, store, saejax.load)
    a, b = saejax.load(first), saejax.load(tmp_path / "second")
    x = np.random.default_rng(0).standard_normal((20, a.cfg.d_in)).astype(np.float32) * 2
    for mine, theirs in zip(b.reconstruct(x), a.reconstruct(x), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-3, atol=2e-3 * float(np.abs(theirs).max()))


@pytest.mark.parametrize("source, kind, message", [
    ("saelens/jumprelu", "topk", "kind 'jumprelu', this run has 'topk'; d_in 32, this run has 16; d_sae 128, this run has 64"),
    ("saelens/standard__layer_norm", "relu", "input_norm 'layer_norm', this run has 'none'"),
])
def test_another_kind_or_shape_is_refused(source, kind, message, store, tmp_path):
    config = make_config(kind, tmp_path / "run", train__init_from=str(FIXTURES / source))
    with pytest.raises(ConfigError, match=message):
        loop.train(config, store, saejax.load)
    with pytest.raises(ConfigError, match="give `load=saejax.load`"):
        loop.train(config, store)
