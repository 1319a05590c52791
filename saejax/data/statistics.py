"""Statistics of the kept rows of a store: sums of a shard, their total, the exact median norm, and the file they are kept in."""

import io
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from saejax.base.errors import NonFiniteError, StoreCorruptError
from saejax.base.records import ActivationStats

_F32_MAX = float(np.finfo(np.float32).max)
_ROWS_AT_ONCE = 256


@dataclass
class ShardSums:
    """Sums over the kept rows of one hookpoint: of a shard or, added in the order of the shards, of all of them."""

    x_D: np.ndarray
    norm: float
    sq_norm: float

    def add(self, part: "ShardSums") -> None:
        self.x_D += part.x_D
        self.norm += part.norm
        self.sq_norm += part.sq_norm

    def array(self) -> np.ndarray:
        """float64 [D + 2]: sum of x, of ||x||, of ||x||^2."""
        return np.concatenate([self.x_D, [self.norm, self.sq_norm]]).astype("<f8")

    @classmethod
    def of(cls, values: np.ndarray) -> "ShardSums":
        """Of what `array` gave."""
        return cls(values[:-2].astype(np.float64), float(values[-2]), float(values[-1]))

    @classmethod
    def zero(cls, width: int) -> "ShardSums":
        return cls(np.zeros(width, np.float64), 0.0, 0.0)


@dataclass(frozen=True)
class Totals:
    """What `statistics.npz` holds of one hookpoint."""

    sums: ShardSums
    median_norm: float
    outliers: int

    def stats(self, kept: int) -> ActivationStats:
        """Over `kept` rows, raw units."""
        return ActivationStats(kept, self.sums.x_D / kept, self.sums.norm / kept, self.sums.sq_norm / kept, self.median_norm)


def to_npz(totals: dict[str, Totals]) -> bytes:
    """The file that holds them: of a hookpoint `<name>.sums` (float64 [D + 2]), `<name>.median_norm`, `<name>.outliers`."""
    arrays = {}
    for name, found in totals.items():
        arrays |= {f"{name}.sums": found.sums.array(), f"{name}.median_norm": np.float64(found.median_norm),
                   f"{name}.outliers": np.int64(found.outliers)}
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def from_npz(data: bytes, source: object, hookpoints: Iterable[tuple[str, int]], kept: int) -> dict[str, Totals]:
    """What `to_npz` wrote. Raises `StoreCorruptError` naming `source`."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile and numpy raise many classes
        raise StoreCorruptError(f"{source}: not readable ({' '.join(str(error).split())[:200]})") from error
    totals = {}
    for name, width in hookpoints:
        sums, median, outliers = (found.get(f"{name}.{what}") for what in ("sums", "median_norm", "outliers"))
        if (sums is None or sums.shape != (width + 2,) or sums.dtype != np.float64 or not np.isfinite(sums).all()
                or median is None or median.shape != () or median.dtype != np.float64 or not math.isfinite(median)
                or outliers is None or outliers.shape != () or outliers.dtype != np.int64 or not 0 <= outliers <= kept):
            raise StoreCorruptError(f"{source}: does not hold the figures of {name} of width {width}")
        totals[name] = Totals(ShardSums.of(sums), float(median), int(outliers))
    return totals


class _Scratch(threading.local):
    """Room for 256 rows as float32 and for their squares, one of each thread: fresh memory costs more than the arithmetic."""

    width = 0

    def rows(self, n: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Zeros uint16 [n, D, 2], of which only [..., 1] may be written, and float32 [n, D]."""
        if self.width != width:
            self.width, self._halves = width, np.zeros((_ROWS_AT_ONCE, width, 2), "<u2")
            self._squares = np.empty((_ROWS_AT_ONCE, width), np.float32)
        return self._halves[:n], self._squares[:n]


_scratch = _Scratch()


def row_statistics(x_ND: np.ndarray, keep_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float64 [N] ||x||^2 of bfloat16 rows, and float64 [D] the sum of the kept rows.

    x is summed in float32 over 256 rows at a time and in float64 over these parts; ||x||^2 of a row is computed in float32
    (float64 where that overflows).
    """
    bits, width = x_ND.view(np.uint16), x_ND.shape[1]
    squares_N = np.empty(len(x_ND), np.float64)
    total_D = np.zeros(width, np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        for a in range(0, len(x_ND), _ROWS_AT_ONCE):
            rows = slice(a, min(a + _ROWS_AT_ONCE, len(x_ND)))
            halves, squares = _scratch.rows(rows.stop - a, width)
            # bfloat16 is the upper half of float32: moving it there is the exact cast, and many times faster than astype.
            halves[..., 1] = bits[rows]
            y = halves.reshape(len(halves), 2 * width).view("<f4")
            sq_N = np.multiply(y, y, out=squares).sum(axis=1)
            if not np.isfinite(sq_N).all():
                sq_N = np.square(y, dtype=np.float64).sum(axis=1)
            squares_N[rows] = sq_N
            halves[~keep_N[rows]] = 0
            total_D += y.sum(axis=0)
    return squares_N, total_D


def norms_of(squares_N: np.ndarray) -> np.ndarray:
    """float64 norms that float32 can hold; NaN and Inf stay what they are."""
    norms_N = np.sqrt(squares_N)
    np.minimum(norms_N, _F32_MAX, out=norms_N, where=np.isfinite(norms_N))
    return norms_N


def check_finite(x_ND: np.ndarray, norms_N: np.ndarray, hookpoint: str, first_context: int, context: int) -> None:
    """Raises `NonFiniteError` with the number of bad rows and the first (context, token) of them."""
    bad = np.flatnonzero(~np.isfinite(norms_N))
    if bad.size:
        raise NonFiniteError(non_finite_message(hookpoint, bad.size, len(x_ND), [
            (first_context + int(r) // context, int(r) % context) for r in bad[:5]]))


def non_finite_message(hookpoint: str, bad: int, of: int, places: list[tuple[int, int]]) -> str:
    where = ", ".join(f"({c}, {t})" for c, t in places)
    return (f"{hookpoint}: {bad} of {of} activation rows hold NaN or Inf, first at (context, token) {where}; check "
            "the weights, or use config.lm.dtype='float32'")


def exact_median(parts: Callable[[], Iterable[np.ndarray]], count: int) -> float:
    """Median of `count` non-negative float32 values that `parts()` yields in pieces, in bounded memory.

    The bits of non-negative floats order as integers: one pass counts their upper halves, a second one the lower halves
    in the one or two buckets that hold the middle. All values may lie in one bucket, as norms behind a layer norm do.
    """
    upper = np.zeros(1 << 16, np.int64)
    for part in parts():
        upper += np.bincount(part.view(np.uint32) >> 16, minlength=1 << 16)
    places = [_bucket(upper, rank) for rank in ((count - 1) // 2, count // 2)]
    lower = {bucket: np.zeros(1 << 16, np.int64) for bucket, _ in places}
    for part in parts():
        bits = part.view(np.uint32)
        for bucket, histogram in lower.items():
            histogram += np.bincount(bits[bits >> 16 == bucket] & 0xFFFF, minlength=1 << 16)
    middle = np.array([bucket << 16 | _bucket(lower[bucket], rank)[0] for bucket, rank in places], np.uint32)
    return float(middle.view(np.float32).astype(np.float64).mean())


def _bucket(histogram: np.ndarray, rank: int) -> tuple[int, int]:
    """The bucket that holds the value of this rank, and the rank of that value inside it."""
    ends = np.cumsum(histogram)
    bucket = int(np.searchsorted(ends, rank, side="right"))
    return bucket, rank - int(ends[bucket] - histogram[bucket])
