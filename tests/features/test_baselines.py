"""What features are held against: neurons are the model's own, random directions fire as often as is said."""

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base.errors import FeatureIndexError
from saejax.data.text import Text
from saejax.features.index import baselines
from saejax.features.index.corpus import from_text
from saejax.lm.prompts import values
from tests import tiny_experiment as tiny
from tests.features.conftest import make_sae
from tests.features.test_steering import random_sae


def test_neurons_are_the_positive_parts_of_hidden_units(lm_, config):
    """To the last bit, in the order of the units, of the layer whose MLP wrote last."""
    found = baselines.neurons(make_sae(), lm_, 3, None)
    tokens = next(iter(from_text(Text(config.text), lm_, (tiny.HOOKPOINT,), split="train", tokens=320).make()))[0]
    [place] = found.cfg.hookpoints
    assert place == f"blocks.{baselines.below(tiny.HOOKPOINT)}.mlp.hook_post"
    hidden = np.asarray(values(lm_.model, tokens, (place,))[place])
    units = found.cfg.metadata["units"]
    acts = np.asarray(found.encode(hidden))
    np.testing.assert_array_equal(acts, np.maximum(hidden, 0)[..., units])
    assert (acts > 0).any() and (hidden[..., units] < 0).any(), "both signs there, one of them kept"
    out = np.asarray(lm_.model.blocks["down"][...][baselines.below(tiny.HOOKPOINT)], np.float32)
    np.testing.assert_array_equal(found.params.W_dec, out[units])


def test_no_neurons_below_the_first_layer(lm_):
    with pytest.raises(FeatureIndexError, match="no MLP below blocks.0.hook_resid_mid"):
        baselines.neurons(random_sae("relu", hookpoint="blocks.0.hook_resid_mid"), lm_, 0, None)


@pytest.mark.parametrize("density, firing", [(0.01, 20), (0.5, 1000), (1e-9, 1), (1.0, 1999)])
def test_sparse_directions_fire_as_often_as_is_said(density, firing):
    """Each of them, on the rows by which their thresholds were set; whatever mean and scale of the rows."""
    rng = np.random.default_rng(0)
    x_RD = (rng.standard_normal((2000, tiny.D_IN)) * rng.uniform(0.1, 9, tiny.D_IN) + 5).astype(jnp.bfloat16)
    mean_D = x_RD.astype(np.float32).mean(0)
    found = baselines.sparse_directions(make_sae(), x_RD, mean_D=mean_D, density=density, seed=1, mesh=None)
    fired = np.asarray(found.encode(x_RD.astype(np.float32)) > 0).sum(0)
    assert len(fired) == baselines.UNITS and np.abs(fired - firing).max() <= 1 and (fired == firing).mean() > 0.9
    assert found.cfg.metadata["density"] == firing / 2000
    plain = baselines.make("directions", make_sae(), None, mean_D=mean_D, k=0, seed=1, mesh=None)
    np.testing.assert_array_equal(found.params.W_enc, plain.params.W_enc)
    acts, pre = np.asarray(found.encode(x_RD.astype(np.float32))), np.asarray(plain.encode(x_RD.astype(np.float32)))
    if density < 0.4:  # a threshold above 0 is taken off
        assert ((acts > 0) <= (pre > 0)).all() and (acts <= pre).all()
    pairs = baselines.sparse_directions(make_sae(), np.repeat(x_RD[:1001], 2, axis=0), mean_D=mean_D, density=21 / 2002, seed=1,
                                        mesh=None)
    fired = np.asarray(pairs.encode(x_RD[:1001].astype(np.float32)) > 0).sum(0)
    assert set(fired.tolist()) <= {10, 11}, "equal rows fire together"
    again = baselines.sparse_directions(make_sae(), x_RD, mean_D=mean_D, density=density, seed=1, mesh=None)
    np.testing.assert_array_equal(found.params.b_enc, again.params.b_enc)
