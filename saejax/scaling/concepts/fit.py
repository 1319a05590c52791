"""How likely a concept of a given frequency has a feature of its own, by size of the dictionary.

    P(present | f) = 1 / (1 + exp(-s (ln f - ln f50)))

for each size by maximum likelihood. Where frequency tells present from absent concepts without an exception the likelihood has no
maximum, and Firth's penalised one is taken: + ln det(I) / 2, I the Fisher information. Intervals: 95 %, percentiles of refits to
concepts drawn with replacement.

Collapsed: one such curve in ln(f x alive) for all sizes. Templeton et al. 2024: f50 lies a little below 1 / alive.

Source: Templeton et al. 2024; Firth 1993; Heinze and Schemper 2002 (separation); Efron 1979 (bootstrap).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import chi2

from saejax.base.errors import ConceptError

LEAST_NEAR = 20  # concepts within a decade of the 50 % point
DRAWS, LEVEL = 1000, 0.95
_STEPS, _CLOSE = 100, 1e-9
_LARGEST = 700.0  # e to it is about the largest number

Interval = tuple[float, float]


@dataclass(frozen=True)
class Size:
    """A dictionary with `alive` features: names, frequencies and presence of N concepts."""

    label: str
    alive: int
    names: tuple[str, ...]
    frequency_N: np.ndarray
    present_N: np.ndarray

    def __post_init__(self):
        if not len(self.names) == len(self.frequency_N) == len(self.present_N) or self.alive < 1:
            raise ConceptError(f"{self.label}: {len(self.names)} names, {len(self.frequency_N)} frequencies, "
                               f"{len(self.present_N)} answers, {self.alive} alive features; give one of each for every concept, "
                               "and a dictionary that is not dead")

    def found(self) -> tuple["Size", list[str]]:
        """(this size without concepts of frequency 0, their names)."""
        there = np.asarray(self.frequency_N) > 0
        names = np.array(self.names, object)
        return Size(self.label, self.alive, tuple(names[there]), np.asarray(self.frequency_N, np.float64)[there],
                    np.asarray(self.present_N, bool)[there]), names[~there].tolist()


@dataclass(frozen=True)
class Curve:
    """s and ln f50 of a curve, its log likelihood, and whether it is Firth's."""

    slope: float
    ln_f50: float
    log_likelihood: float
    firth: bool

    @property
    def f50(self) -> float:
        """Where half are present; of a curve that hardly rises this is beyond all numbers."""
        return math.exp(min(self.ln_f50, _LARGEST))

    def __call__(self, f) -> np.ndarray:
        """P(present) at frequencies f."""
        return expit(self.slope * (np.log(f) - self.ln_f50))


@dataclass(frozen=True)
class Fit:
    """The curve of a size. Where `refused` says why there is none, all but label, alive, concepts and near is None.

    near: concepts within a decade of f50. absent: names of those that the text does not have. Intervals are of 95 %.
    """

    label: str
    alive: int
    concepts: int
    absent: list[str]
    near: int = 0
    curve: Curve | None = None
    f50: float | None = None
    f50_interval: Interval | None = None
    slope_interval: Interval | None = None
    refused: str = ""

    @property
    def f50_alive(self) -> float | None:
        """f50 x alive features: the same for all sizes if the curves collapse."""
        return None if self.f50 is None else self.f50 * self.alive

    @property
    def f50_alive_interval(self) -> Interval | None:
        return None if self.f50_interval is None else tuple(end * self.alive for end in self.f50_interval)


@dataclass(frozen=True)
class Collapse:
    """One curve in f x alive for all sizes that have a fit. statistic = 2 (log likelihood of separate curves - of the one), p of
    it under chi-squared with `freedom` degrees of freedom: as if concepts of two sizes were drawn apart.
    """

    sizes: list[Fit]
    curve: Curve | None = None
    f50_alive: float | None = None
    f50_alive_interval: Interval | None = None
    statistic: float | None = None
    freedom: int = 0
    p: float | None = None
    refused: str = ""


def fit(size: Size, *, draws: int = DRAWS, seed: int = 0) -> Fit:
    """The curve of a size, or why there is none."""
    size, absent = size.found()
    out = Fit(size.label, size.alive, len(size.names), absent)
    x, y = np.log(size.frequency_N), size.present_N
    if refused := _one_sided(y):
        return _refused(out, refused)
    curve = _curve(x, y)
    if curve.slope <= 0:
        return _refused(out, "frequent concepts are present no more often than rare ones")
    near = int((np.abs(x - curve.ln_f50) <= math.log(10)).sum())
    if near < LEAST_NEAR:
        return _refused(out, f"{near} concepts lie within a decade of the 50 % point ({curve.f50:.3g}), at least "
                        f"{LEAST_NEAR} are needed", near)
    drawn = _bootstrap([(x, y)], [size.names], draws, seed)
    if (falls := float((drawn[1] <= 0).mean())) > (1 - LEVEL) / 2:
        return _refused(out, f"in {falls:.0%} of the draws frequent concepts are present no more often than rare ones", near)
    return Fit(size.label, size.alive, len(size.names), absent, near, curve, curve.f50,
               *(_interval(values) for values in drawn))


def collapse(sizes: Sequence[Size], *, draws: int = DRAWS, seed: int = 0) -> Collapse:
    """Separate curves and the one of all sizes that have one. Concepts are drawn by name, of all sizes at once."""
    fits = [fit(size, draws=draws, seed=seed) for size in sizes]
    used = [(size.found()[0], one) for size, one in zip(sizes, fits, strict=True) if one.curve]
    if len(used) < 2:
        return Collapse(fits, refused=f"{len(used)} of {len(sizes)} sizes have a curve, a common one needs two")
    points = [(np.log(size.frequency_N * size.alive), size.present_N) for size, _ in used]
    curve = _curve(*map(np.concatenate, zip(*points, strict=True)))
    statistic = max(0.0, 2 * (sum(one.curve.log_likelihood for _, one in used) - curve.log_likelihood))
    freedom = 2 * (len(used) - 1)
    f50, _ = _bootstrap(points, [size.names for size, _ in used], draws, seed)
    return Collapse(fits, curve, curve.f50, _interval(f50), statistic, freedom, float(chi2.sf(statistic, freedom)))


def binned(frequency_N: np.ndarray, present_N: np.ndarray, bins: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """(geometric mean of frequency, share present) of about equally many concepts each, by rising frequency; none of 0."""
    there = np.flatnonzero(frequency_N > 0)
    order = there[np.argsort(frequency_N[there], kind="stable")]
    parts = np.array_split(order, min(bins, len(order))) if len(order) else []
    return (np.array([np.exp(np.log(frequency_N[part]).mean()) for part in parts]),
            np.array([present_N[part].mean() for part in parts]))


def _refused(out: Fit, why: str, near: int = 0) -> Fit:
    return Fit(out.label, out.alive, out.concepts, out.absent, near, refused=f"{out.label}: {why}")


def _one_sided(y: np.ndarray) -> str:
    if not len(y):
        return "the text has none of the concepts"
    return "" if 0 < y.sum() < len(y) else f"all {len(y)} concepts are {'present' if y.all() else 'absent'}"


def _curve(x_N: np.ndarray, y_N: np.ndarray) -> Curve:
    """Of x = ln f. Both answers occur."""
    center, scale = x_N.mean(), max(x_N.std(), 1e-12)
    z_N = (x_N - center) / scale
    firth = z_N[y_N].min() >= z_N[~y_N].max() or z_N[y_N].max() <= z_N[~y_N].min()
    a, b = _newton(z_N, y_N, firth)
    signed_N = np.where(y_N, 1, -1) * (a + b * z_N)
    slope, ln_f50 = b / scale, center - scale * a / b if b else math.nan
    return Curve(float(slope), float(ln_f50), float(-np.logaddexp(0, -signed_N).sum()), bool(firth))


def _newton(z_N: np.ndarray, y_N: np.ndarray, firth: bool) -> np.ndarray:
    """[intercept, slope] that maximise the (penalised) log likelihood of logit P = intercept + slope z; steps are halved until
    it does not fall.
    """
    X_N2 = np.stack([np.ones_like(z_N), z_N], 1)

    def value(beta: np.ndarray) -> float:
        eta_N = X_N2 @ beta
        found = -np.logaddexp(0, np.where(y_N, -eta_N, eta_N)).sum()
        return found + 0.5 * np.linalg.slogdet(_information(X_N2, eta_N))[1] if firth else found

    beta = np.zeros(2)
    best = value(beta)
    for _ in range(_STEPS):
        eta_N = X_N2 @ beta
        p_N, information = expit(eta_N), _information(X_N2, eta_N)
        residual_N = y_N - p_N
        if firth:
            leverage_N = p_N * (1 - p_N) * np.einsum("ni,ij,nj->n", X_N2, np.linalg.pinv(information), X_N2)
            residual_N = residual_N + leverage_N * (0.5 - p_N)
        step = np.linalg.pinv(information) @ (X_N2.T @ residual_N)
        while (found := value(beta + step)) < best and np.abs(step).max() > _CLOSE:
            step = step / 2
        if found <= best:
            break
        beta, best = beta + step, found
        if np.abs(step).max() < _CLOSE:
            break
    return beta


def _information(X_N2: np.ndarray, eta_N: np.ndarray) -> np.ndarray:
    p_N = expit(eta_N)
    return (X_N2 * (p_N * (1 - p_N))[:, None]).T @ X_N2


def _bootstrap(points: list[tuple[np.ndarray, np.ndarray]], names: list[tuple[str, ...]], draws: int,
               seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(f50, slope) [draws] of one curve through all points, concepts drawn by name. Where all are present f50 is 0, where all are
    absent infinite, and there is no slope; where the curve falls there is no f50.
    """
    rng, unique = np.random.default_rng(seed), sorted(set().union(*names))
    place = {name: i for i, name in enumerate(unique)}
    who_P = np.array([place[name] for some in names for name in some])
    x_P, y_P = (np.concatenate(column) for column in zip(*points, strict=True))
    f50, slope = np.full(draws, np.nan), np.full(draws, np.nan)
    for draw in range(draws):
        times = np.bincount(rng.integers(0, len(unique), len(unique)), minlength=len(unique))[who_P]
        x, y = np.repeat(x_P, times), np.repeat(y_P, times)
        if _one_sided(y):
            f50[draw] = 0.0 if len(y) and y.all() else np.inf
        else:
            curve = _curve(x, y)
            slope[draw] = curve.slope
            if curve.slope > 0:
                f50[draw] = curve.f50
    return f50, slope


def _interval(values: np.ndarray) -> Interval:
    values = np.sort(values[~np.isnan(values)])
    if not len(values):
        return math.nan, math.nan
    ends = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2]) * (len(values) - 1)
    return float(values[math.floor(ends[0])]), float(values[math.ceil(ends[1])])
