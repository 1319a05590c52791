"""The picture of a dictionary: groups of like directions stay together (needs umap-learn, which is optional)."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from saejax.base.errors import FeatureIndexError
from saejax.features.compare import picture
from saejax.features.index import neighbours
from saejax.sae import SAEParams
from saejax.sae.inference import SAE, SAEConfig


class Neighbours:
    """What a picture reads of an index: exact cosine neighbours of `directions_FD`."""

    path, has_all_neighbours = "index", True

    def __init__(self, directions_FD: np.ndarray, n: int = 10):
        unit_FD = directions_FD / np.linalg.norm(directions_FD, axis=1, keepdims=True)
        cosine_FF = unit_FD @ unit_FD.T
        np.fill_diagonal(cosine_FF, -np.inf)
        ids_FN = np.argsort(-cosine_FF, axis=1)[:, :n]
        self.features = len(directions_FD)
        self._lists = {"cosine_ids": ids_FN, "cosine_scores": np.take_along_axis(cosine_FF, ids_FN, 1)}

    def heads(self, name: str, n: int) -> np.ndarray:
        return self._lists[name][:, :n]


def groups(seed: int, number: int = 12, each: int = 40) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.repeat(rng.standard_normal((number, 32)), each, 0) + 0.5 * rng.standard_normal((number * each, 32))


def test_groups_of_like_directions_stay_together_and_a_seed_repeats(capsys):
    pytest.importorskip("umap", reason="umap-learn is optional")
    index, label_F = Neighbours(groups(0)), np.repeat(np.arange(12), 40)
    found = picture.plane(index)
    places_F2 = found.places_S2
    assert found.features_S.tolist() == list(range(480))
    assert places_F2.shape == (480, 2) and places_F2.min() == 0 and places_F2.max() == 1
    middle_G2 = np.stack([places_F2[label_F == g].mean(0) for g in range(12)])
    nearest_F = np.linalg.norm(places_F2[:, None] - middle_G2, axis=2).argmin(1)
    assert (nearest_F == label_F).mean() > 0.95
    capsys.readouterr()
    np.testing.assert_array_equal(picture.plane(index).places_S2, places_F2)
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(r"map: 100% 500/500 \[.*epoch/s\]\n", err)
    picture.plane(index, progress=False)
    assert capsys.readouterr() == ("", "")


class Sampled(Neighbours):
    """An index that has the neighbours of some; every third feature is dead."""

    has_all_neighbours = False

    def column(self, name: str) -> np.ndarray:
        assert name == "fired"
        return np.arange(self.features) % 3


def decoder(directions_FD: np.ndarray) -> SAE:
    W_FD = jnp.asarray(directions_FD, jnp.float32)
    F, D = W_FD.shape
    return SAE(SAEParams(W_enc=W_FD, b_enc=jnp.zeros(F), W_dec=W_FD, b_dec=jnp.zeros(D)),
               SAEConfig("topk", D, F, 8, False, ("blocks.0.hook_resid_post",), "tiny"))


def test_neighbours_of_a_sample_are_those_within_it():
    directions_FD, number_S = groups(1), np.flatnonzero(np.random.default_rng(0).random(480) < 0.3)
    near_SN, cosine_SN = picture._within(decoder(directions_FD), number_S)
    unit_SD = directions_FD[number_S] / np.linalg.norm(directions_FD[number_S], axis=1, keepdims=True)
    np.testing.assert_allclose(cosine_SN, Neighbours(directions_FD[number_S]).heads("cosine_scores", 10), atol=1e-5)
    np.testing.assert_allclose(cosine_SN, np.einsum("sd,snd->sn", unit_SD, unit_SD[near_SN]), atol=1e-5)
    assert (near_SN != np.arange(len(number_S))[:, None]).all() and all(len(set(near)) == 10 for near in near_SN.tolist())


def test_a_sample_is_placed_by_its_own_neighbours(monkeypatch):
    pytest.importorskip("umap", reason="umap-learn is optional")
    monkeypatch.setattr(neighbours, "SAMPLED", 200)
    directions_FD, label_F = groups(2), np.repeat(np.arange(12), 40)
    index = Sampled(directions_FD)
    found = picture.plane(index, decoder(directions_FD), progress=False)
    assert len(found.features_S) == 200 and (found.features_S % 3 > 0).all() and (np.diff(found.features_S) > 0).all()
    label_S = label_F[found.features_S]
    middle_G2 = np.stack([found.places_S2[label_S == g].mean(0) for g in range(12)])
    nearest_S = np.linalg.norm(found.places_S2[:, None] - middle_G2, axis=2).argmin(1)
    assert (nearest_S == label_S).mean() > 0.95


def test_a_sample_of_few_is_refused(monkeypatch):
    monkeypatch.setattr(neighbours, "SAMPLED", 9)
    with pytest.raises(FeatureIndexError, match="9 features are too few"):
        picture.plane(Sampled(groups(0)), decoder(groups(0)))


def test_too_few_features_and_a_missing_package_say_so(monkeypatch):
    with pytest.raises(FeatureIndexError, match="too few"):
        picture.plane(Neighbours(np.eye(11)))
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(FeatureIndexError, match=r"saejax\[umap\]"):
        picture.plane(Neighbours(groups(0)))
