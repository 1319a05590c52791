"""Least squares in logs of a sum of power laws, for many resamples at once, and the intervals that these give.

The model is ln y = ln sum_t exp(X_t theta_t), or c times that: each term is linear in its parameters once the log is taken.
Shapes: P points, R resamples, Q parameters.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from saejax.base.errors import ScalingError

LEVEL = 0.90  # of all intervals
_LEAST = 20   # resamples
_ROUNDS = 400
_FLOOR = 1e-9  # of a term's share of y in a start, so that it has a logarithm


class Estimate(NamedTuple):
    """A value with the ends of its 90 % interval."""

    value: float
    low: float
    high: float


def estimate(value: float, draws_R: np.ndarray) -> Estimate:
    """Percentile interval of the draws; NaN among them (a resample without a fit) counts not."""
    tail = (1 - LEVEL) / 2
    return Estimate(float(value), *(float(v) for v in np.nanquantile(draws_R, (tail, 1 - tail))))


def decades_beyond(value: float, fitted_range: tuple[float, float]) -> float:
    """By how many powers of ten a value lies outside of a range; 0 inside."""
    low, high = fitted_range
    return float(max(0.0, np.log10(value / high), np.log10(low / value)))


def finite_exp(x):
    """e^x, finite also for a resample in which a parameter is as good as free: 1e304 stands for more."""
    return np.exp(np.clip(x, -700.0, 700.0))


class Sum:
    """ln y_P = c ln sum_t exp(X_t theta_t). designs: X_t [P, Q_t]; theta is their parameters one after the other, and with
    `power` ln c behind them; without it c is 1.
    """

    def __init__(self, designs: Sequence[np.ndarray], power: bool = False):
        self.designs = [np.asarray(x, float) for x in designs]
        self._power = power
        self._split = np.cumsum([x.shape[1] for x in self.designs])

    def log(self, theta_RQ: np.ndarray) -> np.ndarray:
        """ln y [R, P]."""
        return self._powers(theta_RQ) * self._shares(theta_RQ)[0]

    def fit(self, starts_SQ: np.ndarray, y_P: np.ndarray) -> np.ndarray:
        """theta [Q]: the best of the least squares from all starts. y_P: logs."""
        return self.fit_each(starts_SQ, y_P[None])[0]

    def fit_each(self, starts_SQ: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
        """theta [R, Q]: that of `fit` for every row. For resamples, too, several starts: a term that has gone to 0 in the one
        that fits best has no slope there, and would stay 0 in all of them.
        """
        s, r = len(starts_SQ), len(y_RP)
        y_SRP = np.tile(y_RP, (s, 1))
        found = self.solve(np.repeat(starts_SQ, r, axis=0), y_SRP)
        cost_SR = ((self.log(found) - y_SRP) ** 2).sum(1).reshape(s, r)
        return found.reshape(s, r, -1)[cost_SR.argmin(0), np.arange(r)]

    def solve(self, theta_RQ: np.ndarray, y_RP: np.ndarray) -> np.ndarray:
        """theta [R, Q] that minimises sum (ln y - y_P)^2 for every row of y_RP, from theta_RQ on.

        Levenberg-Marquardt with exact derivatives; each X_t is made orthonormal first (X = Q R), so that logs of large numbers do
        not hurt. All rows move together: a thousand resamples take about as long as a few alone.
        """
        pairs = [np.linalg.qr(x) for x in self.designs]
        inner, last = Sum([q for q, _ in pairs], self._power), self._split[-1]
        theta = np.concatenate([part @ r.T for part, (_, r) in zip(self._parts(theta_RQ), pairs, strict=True)]
                               + [theta_RQ[:, last:]], axis=1)
        damping_R, eye = np.full(len(theta), 1e-3), np.eye(theta.shape[1])
        error_RP, slopes_RPQ = inner._linear(theta, y_RP)
        cost_R, moving_R = (error_RP ** 2).sum(1), np.ones(len(theta), bool)
        for _ in range(_ROUNDS):
            m = np.flatnonzero(moving_R)
            if not len(m):
                break
            slopes, error = slopes_RPQ[m], error_RP[m]
            normal = slopes.transpose(0, 2, 1) @ slopes
            scale = np.einsum("rqq->rq", normal) + 1e-12
            step = np.linalg.solve(normal + (damping_R[m, None] * scale)[:, :, None] * eye,
                                   slopes.transpose(0, 2, 1) @ error[:, :, None])[:, :, 0]
            tried = theta[m] + step
            new_error, new_slopes = inner._linear(tried, y_RP[m])
            new_cost = (new_error ** 2).sum(1)
            better = new_cost < cost_R[m]
            gained = cost_R[m] - new_cost <= 1e-13 * cost_R[m]
            b = m[better]
            theta[b], cost_R[b] = tried[better], new_cost[better]
            error_RP[b], slopes_RPQ[b] = new_error[better], new_slopes[better]
            damping_R[m] = np.where(better, damping_R[m] / 8, damping_R[m] * 4).clip(1e-12, None)
            moving_R[m] = ~((better & gained) | (damping_R[m] > 1e8))
        parts = inner._parts(theta)
        return np.concatenate([np.linalg.solve(r, part.T).T for part, (_, r) in zip(parts, pairs, strict=True)]
                              + [theta[:, last:]], axis=1)

    def _parts(self, theta_RQ: np.ndarray) -> list[np.ndarray]:
        return np.split(theta_RQ, self._split, axis=1)[:-1]

    def _powers(self, theta_RQ: np.ndarray) -> np.ndarray:
        """c [R, 1]."""
        return finite_exp(theta_RQ[:, -1:]) if self._power else np.ones((len(theta_RQ), 1))

    def _shares(self, theta_RQ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ln of the sum [R, P], each term's share of it [R, P, T])."""
        terms_RPT = np.stack([part @ x.T for part, x in zip(self._parts(theta_RQ), self.designs, strict=True)], axis=-1)
        log_RP = np.logaddexp.reduce(terms_RPT, axis=-1)
        return log_RP, np.exp(terms_RPT - log_RP[:, :, None])

    def _linear(self, theta_RQ: np.ndarray, y_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(y - ln y [R, P], d ln y / d theta [R, P, Q])."""
        log_RP, shares_RPT = self._shares(theta_RQ)
        c_R1 = self._powers(theta_RQ)
        slopes = [(c_R1[:, :, None] * shares_RPT[:, :, t, None]) * x for t, x in enumerate(self.designs)]
        slopes += [(c_R1 * log_RP)[:, :, None]] if self._power else []
        return y_RP - c_R1 * log_RP, np.concatenate(slopes, axis=2)


def starts_of(designs: Sequence[np.ndarray], exponents: Sequence[Sequence[float]], y_P: np.ndarray) -> np.ndarray:
    """theta [S, Q] for terms of the form [1] or [1, ln x]: with each row of exponents given, the factors are the non-negative
    least squares of relative errors, which is a linear problem.
    """
    out = []
    for row in exponents:
        given = iter(row)
        slopes = [next(given) if x.shape[1] == 2 else None for x in designs]
        logs = np.stack([0 * y_P if slope is None else slope * x[:, 1] for slope, x in zip(slopes, designs, strict=True)], axis=1)
        middle = logs.mean(0)
        factors, _ = nnls(np.exp(logs - middle - y_P[:, None]), np.ones(len(y_P)))
        factors = np.log(factors.clip(_FLOOR * np.exp(y_P.min()))) - middle
        out.append([value for factor, slope in zip(factors, slopes, strict=True)
                    for value in ([factor] if slope is None else [factor, slope])])
    return np.array(out)


def resampled(fitted_P: np.ndarray, residuals_P: np.ndarray, bootstrap: int, seed: int) -> np.ndarray:
    """[R, P]: the fitted values with residuals drawn anew, with replacement."""
    rng = np.random.default_rng(seed)
    return fitted_P + rng.choice(residuals_P, (bootstrap, len(fitted_P)))


def resamples(bootstrap: int) -> None:
    """Raises `ScalingError` for too few resamples."""
    if bootstrap < _LEAST:
        raise ScalingError(f"bootstrap={bootstrap}: an interval takes at least {_LEAST} resamples")


def widened(residuals_P: np.ndarray, parameters: int) -> np.ndarray:
    """Residuals times sqrt(P / (P - Q)): a fit of Q parameters makes them that much too small."""
    n = len(residuals_P)
    return residuals_P * np.sqrt(n / max(n - parameters, 1))


def named(names: Sequence[str], theta_Q: np.ndarray, draws_RQ: np.ndarray,
          maps: Sequence[Callable]) -> dict[str, Estimate]:
    """{name: its estimate}, each parameter mapped from what was fitted to what is told."""
    return {name: estimate(f(theta_Q[i]), f(draws_RQ[:, i])) for i, (name, f) in enumerate(zip(names, maps, strict=True))}
