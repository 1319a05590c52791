"""Two dictionaries at one place: which features they share, which one of them lacks, which are split into several.

A feature's match in the other dictionary is the one of the highest cosine of decoder rows. Two features are shared when each is
the other's match and the cosine is at least `LEAST`; a feature is missing when its match is below; it is split when it is the
match of two or more. After Bricken et al. 2023 ("universality") and Templeton et al. 2024 (feature splitting), who look at
cosines of decoder rows; the bound is a convention.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saejax.base import sharding
from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.storage import disk_errors
from saejax.features.index.logits import rows_of
from saejax.features.index.neighbours import nearest
from saejax.sae.inference import SAE

LEAST, _BLOCK = 0.7, 1024


@dataclass(frozen=True)
class Comparison:
    """Of dictionaries A and B. match_A [F_A]: the feature of B that matches best, cosine_A [F_A]; match_B and cosine_B [F_B].

    firing_A [F_A]: Pearson correlation of firing (active or not) between a feature and its match, NaN where one of them never
    fired; None where no rows were given.
    """

    match_A: np.ndarray
    cosine_A: np.ndarray
    match_B: np.ndarray
    cosine_B: np.ndarray
    firing_A: np.ndarray | None = None
    least: float = LEAST

    @property
    def shared(self) -> np.ndarray:
        """[S, 2] pairs (feature of A, feature of B) that are each other's match."""
        mutual = (self.match_B[self.match_A] == np.arange(len(self.match_A))) & (self.cosine_A >= self.least)
        return np.stack([np.flatnonzero(mutual), self.match_A[mutual]], axis=1)

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
        cosine of the shared ones.
        """
        pairs, F_A, F_B = self.shared, len(self.match_A), len(self.match_B)
        firing = [] if self.firing_A is None else self.firing_A[pairs[:, 0]]
        out = {"shared_A": len(pairs) / F_A, "shared_B": len(pairs) / F_B, "only_A": len(self.only_A) / F_A,
               "only_B": len(self.only_B) / F_B, "split_A": len(self.split) / F_A,
               "cosine": float(self.cosine_A[pairs[:, 0]].mean()) if len(pairs) else float("nan")}
        return out | ({"firing": float(np.nanmean(firing))} if len(firing) and np.isfinite(firing).any() else {})

    def __repr__(self) -> str:
        s = self.shares()
        return (f"Comparison({len(self.match_A):,} and {len(self.match_B):,} features: {100 * s['shared_A']:.1f} % and "
                f"{100 * s['shared_B']:.1f} % shared)")


def compare(a: SAE, b: SAE, rows: Iterable[np.ndarray] | None = None, *, least: float = LEAST,
            progress: bool = True) -> Comparison:
    """Matches of all features both ways. rows: pieces [N, d_in] of raw activations that both read, for the firing.

    2 F_A F_B D operations each way, in blocks of 1,024 features; with rows two encodings. Raises `FeatureIndexError` for
    dictionaries that write to different places.
    """
    if a.cfg.targets != b.cfg.targets or a.params.W_dec.shape[1] != b.params.W_dec.shape[1]:
        raise FeatureIndexError(f"one decoder writes to {', '.join(a.cfg.targets)}, {a.params.W_dec.shape[1]} wide, the other to "
                                f"{', '.join(b.cfg.targets)}, {b.params.W_dec.shape[1]} wide: directions of two places")
    with Progress("compare", a.cfg.d_sae + b.cfg.d_sae, unit="feature", enabled=progress) as bar:
        match_A, cosine_A = _matches(a, b, bar)
        match_B, cosine_B = _matches(b, a, bar)
    firing = None if rows is None else _firing(a, b, match_A, rows)
    return Comparison(match_A, cosine_A, match_B, cosine_B, firing, least)


def write(found: Comparison, file: Path) -> None:
    """The matches as a .parquet file, a row a feature: `dictionary` A or B, `feature`, `match`, `cosine`, `firing` (of A). Raises
    `DiskError`.
    """
    F_A, F_B = len(found.match_A), len(found.match_B)
    firing = np.full(F_A, np.nan) if found.firing_A is None else found.firing_A
    table = pa.table({"dictionary": ["A"] * F_A + ["B"] * F_B, "feature": np.concatenate([np.arange(F_A), np.arange(F_B)]),
                      "match": np.concatenate([found.match_A, found.match_B]),
                      "cosine": np.concatenate([found.cosine_A, found.cosine_B]),
                      "firing": np.concatenate([firing, np.full(F_B, np.nan)])})
    with disk_errors(file):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, file)


def _matches(of: SAE, among: SAE, bar: Progress) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for first in range(0, of.cfg.d_sae, _BLOCK):
        last = min(first + _BLOCK, of.cfg.d_sae)
        ids, cosines = nearest(among.params.W_dec, rows_of(of, of.params.W_dec, first, last), 1, among.mesh)
        found.append((np.asarray(ids)[:, 0], np.asarray(cosines)[:, 0]))
        bar.advance(last - first)
    return tuple(np.concatenate(column) for column in zip(*found, strict=True))


@jax.jit
def _counts(acts_a: jax.Array, acts_b: jax.Array) -> jax.Array:
    """[3, F]: rows on which a fires, b fires, both."""
    a, b = acts_a > 0, acts_b > 0
    return jnp.stack([x.sum(0) for x in (a, b, a & b)])


def _firing(a: SAE, b: SAE, match_A: np.ndarray, rows: Iterable[np.ndarray]) -> np.ndarray:
    counts, total = np.zeros((3, a.cfg.d_sae)), 0
    for x in rows:
        acts_a, acts_b = sharding.to_host(a.encode(x)), sharding.to_host(b.encode(x))[:, match_A]
        counts, total = counts + np.asarray(_counts(acts_a, acts_b)), total + len(x)
    if not total:
        return np.full(a.cfg.d_sae, np.nan)
    p, q, both = counts / total
    with np.errstate(invalid="ignore", divide="ignore"):
        return (both - p * q) / np.sqrt(p * (1 - p) * q * (1 - q))
