"""A dictionary as a picture: every feature a point, near those whose decoder directions are like its own."""

import warnings
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.features.index.logits import rows_at
from saejax.features.index.neighbours import SAMPLE, chosen, nearest
from saejax.features.index.reader import FeatureIndex
from saejax.features.index.tables import NEAR
from saejax.sae.inference import SAE

LEAST = 16  # features below which a picture says nothing


@dataclass(frozen=True)
class Picture:
    """Places [S, 2] float32 in [0, 1] of the features whose numbers are `features_S`, rising."""

    features_S: np.ndarray
    places_S2: np.ndarray


def plane(index: FeatureIndex, sae: SAE | None = None, *, seed: int = 0, progress: bool = True) -> Picture:
    """A picture by UMAP (McInnes, Healy & Melville 2018) on 10 cosine neighbours of each feature, at distance 1 - cosine.

    Where the index has the neighbours of all features, these are placed: neither decoder nor F x F cosines are needed. Else the
    sample of `neighbours.chosen` is placed, by its decoder rows in `sae`: neighbours in the index lie anywhere in the dictionary,
    and UMAP wants those within what it places. The same seed gives the same picture. Raises `FeatureIndexError` when the package
    umap-learn is missing, fewer than `LEAST` features are to be placed, or a sample is and `sae` is not given.
    """
    if index.has_all_neighbours:
        number_S = np.arange(index.features)
    elif sae is None:
        raise FeatureIndexError(f"{index.path}: has not the neighbours of all features, and of an index alone no sample can be "
                                "placed; name the SAE and its index, or build the index anew with neighbours=all")
    else:
        number_S = np.flatnonzero(chosen(SAMPLE, index.column("fired")))
    if len(number_S) < LEAST:
        raise FeatureIndexError(f"{index.path}: {len(number_S)} features are too few for a picture; {LEAST} are needed")
    try:
        from umap import UMAP
    except ImportError as error:
        raise FeatureIndexError(f"a picture of the features needs UMAP; run pip install 'saejax[umap]' ({error})") from error
    near_SN, cosine_SN = _known(index) if index.has_all_neighbours else _within(sae, number_S)
    own_S = np.arange(len(number_S))[:, None]
    ids_SN = np.concatenate([own_S, near_SN], axis=1)
    distance_SN = np.concatenate([own_S * 0, 1 - cosine_SN], axis=1).clip(0).astype(np.float32)
    epochs = 500 if len(number_S) <= 10_000 else 200  # as UMAP chooses
    with warnings.catch_warnings(), Progress("map", epochs, unit="epoch", enabled=progress) as bar:
        warnings.filterwarnings("ignore", message="precomputed_knn")  # no new points will be placed
        umap = UMAP(n_neighbors=ids_SN.shape[1], metric="cosine", min_dist=0.05, random_state=seed, n_jobs=1, n_epochs=epochs,
                    precomputed_knn=(ids_SN, distance_SN),
                    tqdm_kwds={"disable": False, "file": _Epochs(bar), "bar_format": "{n}", "mininterval": 0.5})
        places_S2 = umap.fit_transform(distance_SN)  # of what it is given it uses the number of rows
    low, high = places_S2.min(0), places_S2.max(0)
    return Picture(number_S, ((places_S2 - low) / np.maximum(high - low, 1e-9)).astype(np.float32))


def _known(index: FeatureIndex) -> tuple[np.ndarray, np.ndarray]:
    """(feature [F, N], cosine [F, N]) as the index has them."""
    count = min(NEAR, index.features - 1)
    return index.heads("cosine_ids", count), index.heads("cosine_scores", count)


def _within(sae: SAE, number_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place in number_S [S, N], cosine [S, N]) of the decoder rows of some features, among these, on one device."""
    rows_SD = rows_at(sae, sae.params.W_dec, number_S)
    return nearest(jnp.asarray(rows_SD), rows_SD, min(NEAR, len(number_S) - 1), None, own=np.arange(len(number_S)))


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
