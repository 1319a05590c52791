"""Two dictionaries at one place: which features they share, which one of them lacks, which are split into several.

By direction: a feature's match in the other dictionary is the one of the highest cosine of decoder rows. By firing: the one whose
activations on shared text correlate most (`firing`), whatever the directions say. Two features are shared when each is the
other's match and cosine, or correlation, is at least `LEAST`. By direction a feature is missing when its match is below, and
split when it is the match of two or more. After Bricken et al. 2023 ("universality") and Templeton et al. 2024 (feature
splitting); the bound is a convention, one for both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.storage import disk_errors
from saejax.features.compare.firing import Firing, correlate
from saejax.features.index.logits import rows_of
from saejax.features.index.neighbours import nearest_both_ways
from saejax.sae.inference import SAE

LEAST, _BLOCK = 0.7, 1024


@dataclass(frozen=True)
class Comparison:
    """Of dictionaries A and B. match_A [F_A]: the feature of B that matches best, cosine_A [F_A]; match_B and cosine_B [F_B].

    firing: matches by activations on shared text, and how the pairs of match_A and match_B correlate; None where no rows were
    given.
    """

    match_A: np.ndarray
    cosine_A: np.ndarray
    match_B: np.ndarray
    cosine_B: np.ndarray
    firing: Firing | None = None
    least: float = LEAST

    @property
    def shared(self) -> np.ndarray:
        """[S, 2] pairs (feature of A, feature of B) that are each other's match by direction."""
        return _mutual(self.match_A, self.match_B, self.cosine_A, self.least)

    @property
    def shared_by_firing(self) -> np.ndarray:
        """[S, 2] pairs that are each other's match by firing; none without rows."""
        f = self.firing
        return np.zeros((0, 2), int) if f is None else _mutual(f.match_A, f.match_B, f.r_A, self.least)

    @property
    def only_A(self) -> np.ndarray:
        """Features of A without a match in B."""
        return np.flatnonzero(self.cosine_A < self.least)

    @property
    def only_B(self) -> np.ndarray:
        """Features of B without a match in A."""
        return np.flatnonzero(self.cosine_B < self.least)

    @property
    def split(self) -> dict[int, list[int]]:
        """{feature of A: features of B whose match it is}, where these are two or more."""
        out: dict[int, list[int]] = {}
        for b in np.flatnonzero(self.cosine_B >= self.least).tolist():
            out.setdefault(int(self.match_B[b]), []).append(b)
        return {a: found for a, found in sorted(out.items()) if len(found) > 1}

    def shares(self) -> dict[str, float]:
        """Shared features of A, of B, without a match in the other, and features of A that B splits; as shares, with the mean
        cosine of the shared ones. With rows `by_firing` besides, see `firing_shares`.
        """
        pairs, F_A, F_B = self.shared, len(self.match_A), len(self.match_B)
        out = {"shared_A": len(pairs) / F_A, "shared_B": len(pairs) / F_B, "only_A": len(self.only_A) / F_A,
               "only_B": len(self.only_B) / F_B, "split_A": len(self.split) / F_A,
               "cosine": float(self.cosine_A[pairs[:, 0]].mean()) if len(pairs) else None}
        return out if self.firing is None or not self.firing.rows else out | {"by_firing": self.firing_shares()}

    def firing_shares(self) -> dict[str, float]:
        """Features shared by firing, of A and of B, with their mean `correlation`, and `paired`: the mean correlation of those
        shared by direction. Of A: shared both ways as one pair (`same`) or as two (`other`), shared by direction or by firing
        alone, and `silent`: without a match by firing.
        """
        pairs, of_F = self.shared_by_firing, np.full((2, len(self.match_A)), -1)
        for partners, (a, b) in zip(of_F, (self.shared.T, pairs.T), strict=True):
            partners[a] = b
        direction, firing = of_F >= 0
        both, equal = direction & firing, of_F[0] == of_F[1]
        shares = {"shared_A": firing, "same_A": both & equal, "other_A": both & ~equal, "direction_alone_A": direction & ~firing,
                  "firing_alone_A": firing & ~direction, "silent_A": self.firing.match_A < 0}
        return {name: float(which.mean()) for name, which in shares.items()} | {
            "shared_B": len(pairs) / len(self.match_B), "correlation": _mean(self.firing.r_A[pairs[:, 0]]),
            "paired": _mean(self.firing.pair_A[self.shared[:, 0]]), "rows": self.firing.rows}

    def __repr__(self) -> str:
        s = self.shares()
        return (f"Comparison({len(self.match_A):,} and {len(self.match_B):,} features: {100 * s['shared_A']:.1f} % and "
                f"{100 * s['shared_B']:.1f} % shared)")


def compare(a: SAE, b: SAE, rows: Iterable[np.ndarray] | None = None, *, least: float = LEAST,
            progress: bool = True) -> Comparison:
    """Matches of all features both ways. rows: pieces [N, d_in] of raw activations that both read, for the firing.

    2 F_A F_B D operations for both ways, in blocks of 1,024 features of A; with rows what `firing.correlate` says. Raises
    `FeatureIndexError` for dictionaries that write to different places.
    """
    if not 0 <= least <= 1:
        raise FeatureIndexError(f"least={least}: cosines and correlations of a match are between 0 and 1")
    if a.cfg.targets != b.cfg.targets or a.params.W_dec.shape[1] != b.params.W_dec.shape[1]:
        raise FeatureIndexError(f"one decoder writes to {', '.join(a.cfg.targets)}, {a.params.W_dec.shape[1]} wide, the other to "
                                f"{', '.join(b.cfg.targets)}, {b.params.W_dec.shape[1]} wide: directions of two places")
    with Progress("compare", a.cfg.d_sae, unit="feature", enabled=progress) as bar:
        match_A, cosine_A, match_B, cosine_B = nearest_both_ways(b.params.W_dec, _blocks(a, bar), b.mesh)
    firing = None
    if rows is not None:
        with Progress("activations", None, unit="row", enabled=progress) as bar:
            firing = correlate(a, b, _told(rows, bar), match_A, match_B)
    return Comparison(match_A, cosine_A, match_B, cosine_B, firing, least)


def write(found: Comparison, file: Path) -> None:
    """The matches as a .parquet file, a row a feature: `dictionary` A or B, `feature`, `match` and `cosine` by direction,
    `paired` the correlation of these two, `firing_match` (-1: none) and `correlation` by firing. Raises `DiskError`.
    """
    F_A, F_B, f = len(found.match_A), len(found.match_B), found.firing
    none = [np.full(F, np.nan) for F in (F_A, F_B)]
    columns = {"match": (found.match_A, found.match_B), "cosine": (found.cosine_A, found.cosine_B),
               "paired": none if f is None else (f.pair_A, f.pair_B),
               "firing_match": [np.full(F, -1) for F in (F_A, F_B)] if f is None else (f.match_A, f.match_B),
               "correlation": none if f is None else (f.r_A, f.r_B)}
    table = pa.table({"dictionary": ["A"] * F_A + ["B"] * F_B, "feature": np.concatenate([np.arange(F_A), np.arange(F_B)]),
                      **{name: np.concatenate(parts) for name, parts in columns.items()}})
    with disk_errors(file):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)


def _blocks(sae: SAE, bar: Progress) -> Iterable[np.ndarray]:
    for first in range(0, sae.cfg.d_sae, _BLOCK):
        last = min(first + _BLOCK, sae.cfg.d_sae)
        yield rows_of(sae, sae.params.W_dec, first, last)
        bar.advance(last - first)


def _told(rows: Iterable[np.ndarray], bar: Progress) -> Iterable[np.ndarray]:
    for x in rows:
        yield x
        bar.advance(len(x))


def _mutual(match_A: np.ndarray, match_B: np.ndarray, score_A: np.ndarray, least: float) -> np.ndarray:
    mutual = (match_A >= 0) & (match_B[match_A] == np.arange(len(match_A))) & (score_A >= least)
    return np.stack([np.flatnonzero(mutual), match_A[mutual]], axis=1)


def _mean(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
