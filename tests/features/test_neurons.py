"""Correlations of features and neurons against numpy's, in one go and after an interruption."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saejax.base.errors import FeatureIndexError, SteeringError
from saejax.data.text import Text
from saejax.features.compare import neurons
from saejax.features.compare.neurons import Options, correlate, parts, preceding, shares
from saejax.features.index.corpus import from_text
from saejax.lm.prompts import values
from tests import tiny_experiment as tiny
from tests.features.conftest import DEAD, FEATURES, make_sae
from tests.features.test_steering import random_sae

TOKENS = 32 * 21  # a last batch that is not full


@pytest.fixture(scope="module")
def text(config, lm_):
    return from_text(Text(config.text), lm_, (tiny.HOOKPOINT,), split="train", tokens=TOKENS)


@pytest.fixture(scope="module")
def expected(lm_, text):
    """np.corrcoef of all activations with all neurons of layers 0 and 1, and who fired how often."""
    tokens, keep = (np.concatenate(column) for column in zip(*text.make(), strict=True))
    names = ("blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post", tiny.HOOKPOINT)
    found = {name: np.asarray(value)[keep] for name, value in values(lm_.model, tokens, names).items()}
    acts = np.asarray(make_sae().encode(found[tiny.HOOKPOINT]), np.float64)
    g = np.concatenate([found[name] for name in names[:2]], axis=1).astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(acts.T, g.T)[:FEATURES, FEATURES:], (acts > 0).sum(0)


def same(a, b):
    for name in a.column_names:  # NaN is NaN
        np.testing.assert_array_equal(a[name], b[name])


def check(table, expected, features):
    r, fired = expected[0][features], expected[1][features]
    np.testing.assert_array_equal(table["feature"], features)
    np.testing.assert_allclose(table["fired"], fired, atol=1)  # of topk features as good as equal in last place
    alive = fired > 0
    column = {name: table[name].to_numpy()[alive] for name in table.column_names}
    np.testing.assert_allclose(column["correlation"], r[alive].max(1), atol=2e-3)
    np.testing.assert_allclose(np.abs(column["absolute"]), np.abs(r[alive]).max(1), atol=2e-3)
    at = column["layer"] * 80 + column["neuron"], column["absolute_layer"] * 80 + column["absolute_neuron"]
    for place, name in zip(at, ("correlation", "absolute"), strict=True):
        np.testing.assert_allclose(r[alive][np.arange(alive.sum()), place], column[name], atol=2e-3)
    assert np.isnan(table["correlation"].to_numpy()[~alive]).all() and set(DEAD) & set(features) <= set(features[~alive])


def test_the_table_is_what_numpy_says_also_after_an_interruption(lm_, text, expected, tmp_path, monkeypatch):
    options = Options(progress=False)
    table = correlate(tmp_path / "whole", make_sae(), lm_, text, options)
    check(table, expected, np.arange(FEATURES))
    same(pq.read_table(tmp_path / "whole" / neurons.TABLE), table)
    said = shares(table)
    enough = expected[1] >= neurons.LEAST_FIRED
    assert said["features"] + said["left_out"] == FEATURES and said["features"] == enough.sum()
    assert said["correlation"] == pytest.approx((expected[0][enough].max(1) <= neurons.LOW).mean(), abs=0.03)
    step, calls = neurons._step, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(neurons, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        correlate(tmp_path / "parts", make_sae(), lm_, text, Options(progress=False, save_seconds=0))
    again = correlate(tmp_path / "parts", make_sae(), lm_, text, options)
    same(again, table)
    assert len(calls) == 4 and not (tmp_path / "parts" / neurons.PROGRESS).exists()
    with pytest.raises(FeatureIndexError, match="choose another directory"):
        correlate(tmp_path / "parts", make_sae(seed=1), lm_, text, options)


def test_parts_are_shares_of_some_of_the_features():
    """Quarters by firings, and by layer of the best neuron; who fired too seldom is in none."""
    columns = {"feature": range(10), "fired": [29, 30, 31, 500, 40, 50, 60, 70, 0, 80],
               "correlation": [0.1, 0.2, 0.5, 0.29, 0.9, 0.1, 0.4, 0.1, np.nan, 0.8], "layer": [0, 0, 1, 1, 3, 0, 3, 1, 0, 0],
               "neuron": [0] * 10, "absolute": [0.1, -0.2, 0.5, -0.31, 0.9, 0.1, 0.4, -0.6, np.nan, 0.8],
               "absolute_layer": [0, 2, 1, 0, 3, 0, 3, 2, 0, 0], "absolute_neuron": [0] * 10}
    table = pa.table(columns, schema=neurons._SCHEMA)
    found = parts(table)
    ends = [(30, 31), (40, 50), (60, 70), (80, 500)]
    assert [(p["least"], p["most"]) for p in found["fired"]] == ends and {p["features"] for p in found["fired"]} == {2}
    assert [p["correlation"] for p in found["fired"]] == [0.5] * 4
    assert [p["absolute"] for p in found["fired"]] == [0.5, 0.5, 0, 0]
    assert [(p["layer"], p["features"]) for p in found["layer"]] == [(0, 3), (1, 3), (3, 2)]
    assert found["layer"][0]["correlation"] == pytest.approx(2 / 3) and found["layer"][2]["correlation"] == 0
    assert [(p["layer"], p["features"]) for p in found["absolute_layer"]] == [(0, 3), (1, 1), (2, 2), (3, 2)]
    assert found["absolute_layer"][2] == {"layer": 2, "features": 2, "absolute": 0.5}
    none = parts(table.slice(0, 1))
    assert none == {"fired": [], "layer": [], "absolute_layer": []}


@pytest.mark.slow
@pytest.mark.parametrize("on_a_mesh", [False, True])
def test_a_random_part_of_the_features(lm_, sae, text, expected, tmp_path, on_a_mesh):
    table = correlate(tmp_path, sae if on_a_mesh else make_sae(), lm_, text, Options(features=9, progress=False))
    features = table["feature"].to_numpy()
    assert len(features) == 9 and (np.diff(features) > 0).all()
    check(table, expected, features)


def test_how_many_features_fit():
    assert len(neurons._chosen(1 << 20, 15_360, None)) == (1 << 30) // (8 * 15_360)
    assert len(neurons._chosen(4608, 15_360, None)) == 4608


def test_neurons_before_the_sae(lm_):
    assert preceding(lm_, make_sae()) == ("blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post")
    assert preceding(lm_, random_sae("relu", hookpoint="blocks.1.hook_resid_mid")) == ("blocks.0.mlp.hook_post",)
    with pytest.raises(SteeringError, match="no neurons before it"):
        preceding(lm_, random_sae("relu", hookpoint="blocks.0.hook_resid_mid"))
