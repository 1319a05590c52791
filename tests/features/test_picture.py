"""The picture of a dictionary: groups of like directions stay together (needs umap-learn, which is optional)."""

import re

import numpy as np
import pytest

from saejax.base.errors import FeatureIndexError
from saejax.features.compare import picture


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


def test_too_few_features_and_a_missing_package_say_so(monkeypatch):
    with pytest.raises(FeatureIndexError, match="too few"):
        picture.plane(Neighbours(np.eye(11)))
    monkeypatch.setitem(__import__("sys").modules, "umap", None)
    with pytest.raises(FeatureIndexError, match=r"saejax\[umap\]"):
        picture.plane(Neighbours(groups(0)))
