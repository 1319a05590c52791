"""A dictionary as a picture: every feature a point, near those whose decoder directions are like its own."""

import warnings

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.features.index.reader import FeatureIndex

LEAST = 16  # features below which a picture says nothing


def plane(index: FeatureIndex, *, seed: int = 0, progress: bool = True) -> np.ndarray:
    """Places [F, 2] float32 in [0, 1] by UMAP (McInnes, Healy & Melville 2018) on the index's cosine neighbours.

    The graph of UMAP is made of the 10 neighbours of each feature that the index holds, at distance 1 - cosine: neither decoder
    nor F x F cosines are needed. The same seed gives the same picture. Raises `FeatureIndexError` when the package umap-learn
    is missing, there are fewer than `LEAST` features, or the index has not the neighbours of all of them.
    """
    if index.features < LEAST:
        raise FeatureIndexError(f"{index.path}: {index.features} features are too few for a picture; {LEAST} are needed")
    own_F, ids = np.arange(index.features)[:, None], index.lists("cosine_ids")
    if not all(map(len, ids)):
        raise FeatureIndexError(f"{index.path}: a picture needs the neighbours of all features; build the index anew "
                                "with neighbours=all (saejax features)")
    try:
        from umap import UMAP
    except ImportError as error:
        raise FeatureIndexError(f"a picture of the features needs UMAP; run pip install 'saejax[umap]' ({error})") from error
    ids_FN = np.concatenate([own_F, np.array(ids)], axis=1)
    distance_FN = np.concatenate([own_F * 0, 1 - np.array(index.lists("cosine_scores"))], axis=1).clip(0).astype(np.float32)
    epochs = 500 if index.features <= 10_000 else 200  # as UMAP chooses
    with warnings.catch_warnings(), Progress("map", epochs, unit="epoch", enabled=progress) as bar:
        warnings.filterwarnings("ignore", message="precomputed_knn")  # no new points will be placed
        umap = UMAP(n_neighbors=ids_FN.shape[1], metric="cosine", min_dist=0.05, random_state=seed, n_jobs=1, n_epochs=epochs,
                    precomputed_knn=(ids_FN, distance_FN),
                    tqdm_kwds={"disable": False, "file": _Epochs(bar), "bar_format": "{n}", "mininterval": 0.5})
        places_F2 = umap.fit_transform(distance_FN)  # of what it is given it uses the number of rows
    low, high = places_F2.min(0), places_F2.max(0)
    return ((places_F2 - low) / np.maximum(high - low, 1e-9)).astype(np.float32)


class _Epochs:
    """A file that moves a bar: UMAP says how far it is only as text, here as the number of epochs."""

    def __init__(self, bar: Progress):
        self._bar, self._done = bar, 0

    def write(self, text: str) -> None:
        if text.strip().isdecimal():
            self._bar.advance(int(text) - self._done)
            self._done = int(text)

    def flush(self) -> None:
        """tqdm asks for it."""
