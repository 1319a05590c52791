"""Two subjects beside each other."""

from pathlib import Path

import numpy as np

from saejax.data.store import Store
from saejax.features.compare.dictionaries import LEAST, Comparison, compare
from saejax.runs.subject import Subject, open_subject

_PIECE, _COMPARED = 4096, 65_536  # rows encoded at once; rows on which the firing of two dictionaries is compared


def compare_subjects(a: str | Path | Subject, b: str | Path | Subject, *, rows: int = _COMPARED,
                     least: float = LEAST) -> Comparison:
    """Which features two dictionaries share, which one lacks, which are split; by decoder rows both ways, and where the first has
    a store by the firing of matched features on `rows` rows of it. Raises `FeatureIndexError` for dictionaries of two places.
    """
    first, second = (s if isinstance(s, Subject) else open_subject(s) for s in (a, b))
    store, pieces = first.store, None
    if store is not None and first.sae.cfg.hookpoints == second.sae.cfg.hookpoints:
        starts = range(0, min(rows, store.rows), _PIECE)
        pieces = (_kept(store, first.sae.cfg.hookpoints, start, min(start + _PIECE, store.rows)) for start in starts)
    return compare(first.sae, second.sae, pieces, least=least, progress=first.progress)


def _kept(store: Store, hookpoints: tuple[str, ...], start: int, stop: int) -> np.ndarray:
    keep = store.keep(start, stop)
    return np.concatenate([store.read(name, start, stop)[keep] for name in hookpoints], axis=1).astype(np.float32)
