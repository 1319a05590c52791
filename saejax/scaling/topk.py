"""Loss over features n and kept features k: the surface of Gao et al. 2024, "Scaling and evaluating sparse autoencoders".

    L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)

Shapes: P points, R resamples.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from saejax.base.errors import ScalingError
from saejax.scaling.points import Left, Point, enough, usable
from saejax.scaling.sums import Estimate, Sum, estimate, finite_exp, named, resampled, resamples, widened

_LEAST = 10
_NAMES = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
_SHARES = (0.02, 0.1, 0.3, 0.6, 0.9)  # of the least loss of a k that the second term takes, in the starts


@dataclass(frozen=True, eq=False)
class TopKSurface:
    """What `fit_topk_surface` finds. parameters: by the names of the equation, with 90 % intervals. error: root mean square of
    the residuals in ln loss. features, k: the ranges that were fitted. runs: their names.
    """

    loss_name: str
    runs: tuple[str, ...]
    parameters: dict[str, Estimate]
    error: float
    features: tuple[int, int]
    k: tuple[int, int]
    left_out: tuple[Left, ...]
    seed: int
    noise_P: np.ndarray
    theta_6: np.ndarray
    draws_R6: np.ndarray

    @property
    def points(self) -> int:
        """How many were fitted."""
        return len(self.runs)

    def predict(self, features: float, k: float) -> Estimate:
        """Loss of one run, with an interval that one more run lies in. Raises `ScalingError` for 0 and less."""
        if not (0 < features < np.inf and 0 < k < np.inf):
            raise ScalingError(f"features={features!r}, k={k!r}: give numbers above 0")
        model = _surface(np.log([features]), np.log([k]))
        noise_R = np.random.default_rng(self.seed).choice(self.noise_P, len(self.draws_R6))
        return estimate(finite_exp(model.log(self.theta_6[None])[0, 0]),
                        finite_exp(model.log(self.draws_R6)[:, 0] + noise_R))

    def summary(self) -> dict:
        """Plain JSON."""
        return {"loss_name": self.loss_name, "points": self.points, "error": self.error, "features": list(self.features),
                "k": list(self.k), "parameters": {name: e._asdict() for name, e in self.parameters.items()},
                "left_out": [left._asdict() for left in self.left_out]}


def fit_topk_surface(points: Iterable[Point], *, bootstrap: int = 1000, seed: int = 0) -> TopKSurface:
    """Runs of one recipe that differ in features and k, each trained for long enough: steps are not in the equation.

    Least squares in ln loss; intervals from resampled residuals, as in `laws.fit`. Raises `ScalingError`: fewer than 10 runs or 3
    sizes or 3 values of k, runs that differ in more, runs of a kind without k.
    """
    kept, left = usable(points, varying=("k",))
    without = next((point for point in kept if point.k is None), None)
    if without is not None:
        raise ScalingError(f"run {without.run!r}: its kind has no k; this surface is of kinds that keep k features")
    enough(kept, _LEAST, "features", "k")
    resamples(bootstrap)
    n_P, k_P = (np.log([getattr(point, name) for point in kept]) for name in ("features", "k"))
    y_P = np.log([point.loss for point in kept])
    model = _surface(n_P, k_P)
    if np.linalg.matrix_rank(model.designs[0]) < model.designs[0].shape[1]:
        raise ScalingError("these runs do not cross: some sizes have to be trained with the same several k")
    starts = _starts(model, k_P, y_P)
    theta_6 = model.fit(starts, y_P)
    fitted_P = model.log(theta_6[None])[0]
    noise_P = widened(y_P - fitted_P, len(theta_6))
    draws_R6 = model.fit_each(np.vstack([theta_6, starts]), resampled(fitted_P, noise_P, bootstrap, seed))
    sizes, ks = ([getattr(point, name) for point in kept] for name in ("features", "k"))
    return TopKSurface(
        kept[0].loss_name, tuple(point.run for point in kept), named(_NAMES, theta_6, draws_R6, [lambda x: x] * 6),
        float(np.sqrt(np.mean((y_P - fitted_P) ** 2))), (min(sizes), max(sizes)), (min(ks), max(ks)), tuple(left), seed, noise_P,
        theta_6, draws_R6)


def _surface(n_P: np.ndarray, k_P: np.ndarray) -> Sum:
    """Of ln features and ln k."""
    one = np.ones_like(n_P)
    return Sum([np.stack([one, k_P, n_P, k_P * n_P], axis=1), np.stack([one, k_P], axis=1)])


def _starts(model: Sum, k_P: np.ndarray, y_P: np.ndarray) -> np.ndarray:
    """theta [S, 6]: the second term is a share of the least loss of each k, a line in logs, the first what it leaves."""
    least_P = np.array([y_P[k_P == k].min() for k in k_P])
    second, *_ = np.linalg.lstsq(model.designs[1], least_P, rcond=None)
    out = []
    for share in _SHARES:
        theta = second + [np.log(share), 0.0]
        rest_P = np.exp(y_P) - np.exp(model.designs[1] @ theta)
        first, *_ = np.linalg.lstsq(model.designs[0], np.log(rest_P.clip(0.02 * np.exp(y_P))), rcond=None)
        out.append(np.concatenate([first, theta]))
    return np.array(out)
