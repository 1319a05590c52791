"""The lower envelope of loss against compute: the best number of features at each budget, and power laws through them.

Source: Templeton et al. 2024, "Scaling Monosemanticity", section on scaling laws. Shapes: M sizes, R resamples, N budgets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from saejax.base.errors import ScalingError
from saejax.scaling.points import Left, Point
from saejax.scaling.sums import Estimate, Sum, estimate, finite_exp, starts_of

LEAST = 3             # budgets that a power law takes
_WITH_OFFSET = 5      # that one with an offset takes: it has three parameters
_NEAR = np.log(4.0)   # a parabola takes what lies within this factor of the best, and its neighbours in any case
HALF = 0.5            # of the resamples: so many need an optimum, else what is left is a choice
_NO_OFFSET = 1e-6
_SAME = 0.1           # budgets whose logs differ by less are one
_EXPONENTS = [[-g] for g in (0.03, 0.1, 0.2, 0.4, 0.8)]
_FEW, _MANY = "few features", "many features"
_ADD = {_FEW: "add runs with fewer features and more steps", _MANY: "add runs with more features and fewer steps"}


@dataclass(frozen=True)
class Cost:
    """FLOPs of a step, linear in the features: `fixed` + `each` F. That of a whole run is `steps` times it."""

    fixed: float
    each: float

    @classmethod
    def of(cls, points: Sequence[Point], compute: str) -> "Cost":
        """The least squares of relative errors. Raises `ScalingError` where it is off by more than 2 % for a run."""
        features = np.array([point.features for point in points], float)
        steps = np.array([point.compute(compute) / point.steps for point in points])
        found, *_ = np.linalg.lstsq(np.stack([1 / steps, features / steps], axis=1), np.ones(len(points)), rcond=None)
        off = np.abs((found[0] + found[1] * features) / steps - 1)
        if off.max() > 0.02 or found[1] <= 0:
            worst = points[int(off.argmax())]
            raise ScalingError(f"run {worst.run!r}: its {compute} FLOPs a step are no linear function of the features, as "
                               "those of the others are; count all runs alike")
        return cls(float(found[0]), float(found[1]))

    def of_step(self, features):
        """FLOPs of a step."""
        return self.fixed + self.each * features


class Budget(NamedTuple):
    """The optimum at one budget of compute (FLOPs)."""

    compute: float
    features: Estimate
    steps: Estimate
    loss: Estimate


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """y = offset + factor (x / reference)^exponent; offset 0 where `offset` is None. The factor is what is told of y at the
    reference, in the middle of what was fitted: at x = 1 it would be an extrapolation. theta: (ln offset, ln factor, exponent).
    """

    reference: float
    factor: Estimate
    exponent: Estimate
    offset: Estimate | None
    theta_3: np.ndarray
    draws_R3: np.ndarray

    @classmethod
    def of(cls, reference: float, theta_3: np.ndarray, draws_R3: np.ndarray) -> "PowerLaw":
        def offset(theta_R3: np.ndarray) -> np.ndarray:  # a millionth of the factor and less is none
            return np.where(theta_R3[:, 0] < theta_R3[:, 1] + np.log(_NO_OFFSET), 0.0, finite_exp(theta_R3[:, 0]))

        with_offset = np.isfinite(theta_3[0])
        return cls(reference, estimate(finite_exp(theta_3[1]), finite_exp(draws_R3[:, 1])), estimate(theta_3[2], draws_R3[:, 2]),
                   estimate(offset(theta_3[None])[0], offset(draws_R3)) if with_offset else None, theta_3, draws_R3)

    def at(self, x: float, noise_P: np.ndarray | None = None, seed: int = 0) -> Estimate:
        """y and its 90 % interval; noise_P: residuals in logs of single runs, which then are in it."""
        draws_R = self._log(self.draws_R3, x)
        if noise_P is not None:
            draws_R = draws_R + np.random.default_rng(seed).choice(noise_P, len(draws_R))
        return estimate(finite_exp(self._log(self.theta_3[None], x)[0]), finite_exp(draws_R))

    def summary(self) -> dict:
        """Plain JSON."""
        return {"reference": self.reference, "factor": self.factor._asdict(), "exponent": self.exponent._asdict(),
                "offset": self.offset and self.offset._asdict()}

    def _log(self, theta_R3: np.ndarray, x: float) -> np.ndarray:
        return np.logaddexp(theta_R3[:, 0], theta_R3[:, 1] + theta_R3[:, 2] * np.log(x / self.reference))


@dataclass(frozen=True, eq=False)
class Profile:
    """Losses against features at one budget. x_M: ln features. y_RM: ln loss, one row a resample."""

    compute: float
    x_M: np.ndarray
    y_RM: np.ndarray


def vertices(x_M: np.ndarray, y_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(x*, y* at the bottom of a parabola, and the place of the least y) of every row [R].

    The parabola is the least squares through the values within a factor of 4 of the place of the least, its two neighbours in
    any case. x* is NaN where the least lies at an edge, or where the parabola has no bottom between the values it goes through.
    """
    best_R = y_RM.argmin(axis=1)
    x_R, y_R = np.full(len(y_RM), np.nan), np.full(len(y_RM), np.nan)
    for best in np.unique(best_R):
        if best in (0, len(x_M) - 1):
            continue
        near_M = np.abs(x_M - x_M[best]) <= _NEAR + 1e-9
        near_M[best - 1:best + 2] = True
        rows, x = np.flatnonzero(best_R == best), x_M[near_M] - x_M[best]
        c2, c1, c0 = np.polyfit(x, y_RM[rows][:, near_M].T, 2)
        bottom = -c1 / (2 * np.where(c2 > 0, c2, np.nan))
        bottom = np.where((bottom >= x[0]) & (bottom <= x[-1]), bottom, np.nan)
        x_R[rows], y_R[rows] = x_M[best] + bottom, c0 + c1 * bottom / 2
    return x_R, y_R, best_R


def profiles(points: Sequence[Point], cost: Cost, y_RP: np.ndarray) -> list[Profile]:
    """The profile at every budget that a run has. y_RP: ln loss.

    A size that was not trained with just this budget gives what its other runs say: a monotone cubic in logs (PCHIP) between the
    next shorter and longer one, never beyond; budgets that differ by less than 10 % are one. Runs of the same size and
    steps count as their mean in logs.
    """
    curves = []
    for features in sorted({point.features for point in points}):
        steps = sorted({point.steps for point in points if point.features == features})
        y_RS = np.stack([y_RP[:, [i for i, p in enumerate(points) if (p.features, p.steps) == (features, s)]].mean(1)
                         for s in steps], axis=1)
        x_S = np.log(steps) + np.log(cost.of_step(features))
        curve = PchipInterpolator(x_S, y_RS, axis=1) if len(steps) > 1 else lambda _, y=y_RS: y[:, 0]
        curves.append((np.log(features), x_S, curve))
    out = []
    for budget in distinct(np.concatenate([x_S for _, x_S, _ in curves])):
        there = [(x, curve(np.clip(budget, x_S[0], x_S[-1]))) for x, x_S, curve in curves
                 if x_S[0] - _SAME <= budget <= x_S[-1] + _SAME]
        out.append(Profile(float(np.exp(budget)), np.array([x for x, _ in there]), np.stack([y for _, y in there], axis=1)))
    return out


def optima(found: Sequence[Profile]) -> tuple[np.ndarray, np.ndarray, list[Left]]:
    """(x* [R, N], y* [R, N], budgets left out: there x* is NaN in all rows) of profiles whose first row is what was measured and
    whose second is what was fitted, both of which need an optimum inside.

    Raises `ScalingError` where fewer than three budgets are left, and says on which side the grid ends too early.
    """
    x, y, left, edges = [], [], [], []
    for profile in found:
        x_R, y_R, best_R = vertices(profile.x_M, profile.y_RM)
        side = _side(profile, x_R, best_R)
        if side:
            left.append(Left(f"budget {profile.compute:.3g} FLOPs", side[0]))
            edges += side[1]
            x_R = np.full_like(x_R, np.nan)
        x.append(x_R)
        y.append(y_R)
    if len(found) - len(left) < LEAST:
        sides = [side for side in (_FEW, _MANY) if side in edges]
        what = "; ".join(f"the grid does not reach the optimum on the side of {side} at {edges.count(side)} budgets, {_ADD[side]}"
                         for side in sides) or "give at least three sizes a budget, with losses that have one bottom"
        raise ScalingError(f"{len(found) - len(left)} of {len(found)} budgets have their optimum inside the grid and a power law "
                           f"takes {LEAST}: {what}")
    return np.stack(x, axis=1), np.stack(y, axis=1), left


def power_law(c_N: np.ndarray, y_RN: np.ndarray) -> PowerLaw:
    """Least squares of ln y over ln c in every row; the first row is the estimate. NaN in y: that budget does not count in its
    row, and a row with fewer than three is left out of the intervals. c_N: logs, too. Raises `ScalingError` where more than half
    of the rows are.
    """
    reference = c_N.mean()
    there_RN = np.isfinite(y_RN)
    n_R = np.where(there_RN.sum(1) >= LEAST, there_RN.sum(1), np.nan)
    if np.isfinite(n_R[1:]).mean() < HALF:
        raise ScalingError(f"more than half of the resamples leave fewer than {LEAST} budgets with an optimum inside the grid: "
                           "the losses are too noisy for it; space it wider or average over seeds")
    x_RN = np.where(there_RN, c_N - reference, 0.0)
    y_RN = np.where(there_RN, y_RN, 0.0)
    x_R, y_R = x_RN.sum(1) / n_R, y_RN.sum(1) / n_R
    slope_R = ((x_RN * y_RN).sum(1) - n_R * x_R * y_R) / ((x_RN ** 2).sum(1) - n_R * x_R ** 2)
    theta_R3 = np.stack([np.full_like(slope_R, -np.inf), y_R - slope_R * x_R, slope_R], axis=1)
    return PowerLaw.of(float(np.exp(reference)), theta_R3[0], theta_R3[1:][np.isfinite(n_R[1:])])


def offset_law(c_N: np.ndarray, y_RN: np.ndarray) -> PowerLaw | None:
    """As `power_law` with an offset; None for fewer than five budgets, or where more than half of the rows have a NaN. Such
    rows are left out of the intervals."""
    if len(c_N) < _WITH_OFFSET:
        return None
    reference = c_N.mean()
    designs = [np.ones((len(c_N), 1)), np.stack([np.ones(len(c_N)), c_N - reference], axis=1)]
    model, starts = Sum(designs), starts_of(designs, _EXPONENTS, y_RN[0])
    theta_3 = model.fit(starts, y_RN[0])
    rows_RN = y_RN[1:][np.isfinite(y_RN[1:]).all(1)]
    if len(rows_RN) < HALF * (len(y_RN) - 1):
        return None
    return PowerLaw.of(float(np.exp(reference)), theta_3, model.fit_each(starts, rows_RN))


def _side(profile: Profile, x_R: np.ndarray, best_R: np.ndarray) -> tuple[str, list[str]] | None:
    """(why a budget is left out, at which edges its optimum lies); None where it is not."""
    if len(profile.x_M) < 3:
        return f"sizes trained with it: {len(profile.x_M)}; a parabola takes 3", []
    if np.isfinite(x_R[:2]).all():
        within = float(np.isfinite(x_R[2:]).mean())
        return None if within >= HALF else (f"of the resamples only {within:.0%} have an optimum inside the grid", [])
    ends = {0: _FEW, len(profile.x_M) - 1: _MANY}
    edges = [ends[best] for best in best_R[:2].tolist() if best in ends]
    if not edges:
        return "no parabola through the losses near the least has its bottom among them", []
    of = "" if int(best_R[0]) in ends else " of the fitted surface"
    return f"the optimum{of} lies at the edge of the grid, on the side of {edges[0]}", edges[:1]


def distinct(logs: np.ndarray) -> list[float]:
    """The distinct budgets, in logs: means of those that differ by less than 10 %."""
    groups: list[list[float]] = []
    for value in np.sort(logs):
        if groups and value - groups[-1][0] < _SAME:
            groups[-1].append(float(value))
        else:
            groups.append([float(value)])
    return [float(np.mean(group)) for group in groups]
