"""Two subjects beside each other."""

from pathlib import Path

import numpy as np

from saejax.base.errors import ConfigError
from saejax.data.store import Store
from saejax.features.compare.dictionaries import LEAST, Comparison, compare
from saejax.features.compare.splitting import Dictionary, Splitting, split
from saejax.runs.opening import open_all, open_subject
from saejax.runs.subject import Subject

_PIECE, _COMPARED = 4096, 65_536  # rows encoded at once; rows on which the firing of two dictionaries is compared


def compare_subjects(a: str | Path | Subject, b: str | Path | Subject, *, rows: int | None = None,
                     least: float = LEAST) -> Comparison:
    """Which features two dictionaries share, which one lacks, which are split: by decoder rows both ways, and by the activations
    on `rows` rows (65,536) of the first one's store, or the second one's; by decoder rows alone where there is none, or they read
    different places. Raises `FeatureIndexError` for dictionaries of two places, `ConfigError` for rows where there are none.
    """
    if rows is not None and rows < 1:
        raise ConfigError(f"rows={rows}: activations are compared on one row at least")
    first, second = (s if isinstance(s, Subject) else open_subject(s) for s in (a, b))
    pieces, hookpoints = None, first.sae.cfg.hookpoints
    if hookpoints == second.sae.cfg.hookpoints:
        store = first.store or second.store
        if store is not None:
            stop = min(rows or _COMPARED, store.rows)
            pieces = (_kept(store, hookpoints, start, min(start + _PIECE, stop)) for start in range(0, stop, _PIECE))
    if rows is not None and pieces is None:
        raise ConfigError(f"rows={rows}: there are no activations to compare: neither has a store, or they read two places")
    return compare(first.sae, second.sae, pieces, least=least, progress=first.progress)


def split_subjects(*sources: str | Path | Subject, least: float = LEAST) -> Splitting:
    """Dictionaries of growing size at one place: which features of each come from which of the next smaller one, by decoder rows.
    Of a sweep, all its SAEs. Features that fired on none of the tokens of an SAE's index are left out; without an index all
    count. Raises `FeatureIndexError` for fewer than two SAEs, SAEs of several places or of one size.
    """
    subjects = [s for source in sources for s in ([source] if isinstance(source, Subject) else open_all(source))]
    return split([Dictionary(str(s.source), s.sae, s.index_if_any()) for s in subjects], least=least,
                 progress=all(s.progress for s in subjects))


def _kept(store: Store, hookpoints: tuple[str, ...], start: int, stop: int) -> np.ndarray:
    keep = store.keep(start, stop)
    return np.concatenate([store.read(name, start, stop)[keep] for name in hookpoints], axis=1).astype(np.float32)
