"""Scaling laws of SAEs: loss over features, steps and compute, from a grid of trained runs.

Two fits of the same points: a surface over features and steps (`surface`), and the procedure of Templeton et al. 2024: the best
number of features at each budget of compute, and power laws through these. Shapes: P points, R resamples, N budgets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saejax.base.errors import ScalingError
from saejax.scaling.envelope import Budget, Cost, PowerLaw, offset_law, optima, power_law, profiles
from saejax.scaling.points import Left, Point, enough, usable
from saejax.scaling.sums import Estimate, decades_beyond, estimate, finite_exp, resamples
from saejax.scaling.surface import Surface, fit_surface

_LEAST = 9


class Optimum(NamedTuple):
    """What a budget of compute (FLOPs) buys at best. decades: by how many powers of ten it lies outside of the budgets that were
    fitted, 0 inside.
    """

    compute: float
    features: Estimate
    steps: Estimate
    loss: Estimate
    decades: float


@dataclass(frozen=True, eq=False)
class Laws:
    """What `fit` finds. compute: "dense" or "sparse" FLOPs. features, steps, loss: power laws over compute through the optima of
    `budgets`, `loss` without and `loss_with_offset` with an irreducible offset (None for fewer than five budgets).
    """

    compute: str
    loss_name: str
    points: int
    surface: Surface
    budgets: tuple[Budget, ...]
    features: PowerLaw
    steps: PowerLaw
    loss: PowerLaw
    loss_with_offset: PowerLaw | None
    left_out: tuple[Left, ...]
    cost: Cost

    @property
    def has_offset(self) -> bool:
        """Whether an irreducible loss above 0 fits best. Without one the law of the loss falls to 0."""
        return self.loss_with_offset is not None and self.loss_with_offset.offset.value > 0

    @property
    def fitted_range(self) -> tuple[float, float]:
        """The least and the largest budget (FLOPs) whose optimum was found."""
        return self.budgets[0].compute, self.budgets[-1].compute

    def decades(self, compute: float) -> float:
        """By how many powers of ten a budget lies outside of the fitted range; 0 inside."""
        return decades_beyond(compute, self.fitted_range)

    def predict(self, features: float, steps: float) -> Estimate:
        """Loss of one run of the surface, and an interval that one more lies in: the scatter of parameters and runs, of both
        forms. Raises `ScalingError` for sizes of 0 and less.
        """
        _positive(features=features, steps=steps)
        return self.surface.loss(np.log(features), np.log(steps))

    def optimal(self, compute: float, *, by: str = "envelope") -> Optimum:
        """The best features and steps for a budget (FLOPs), and the loss of one run there, its own scatter included.

        by: "envelope", the power laws over compute, the loss with an offset where there is one; or "surface", whose least loss
        along the budget is found numerically. Raises `ScalingError` for a budget of 0 or less, or another `by`.
        """
        _positive(compute=compute)
        if by == "envelope":
            law = self.loss_with_offset or self.loss
            return Optimum(compute, self.features.at(compute), self.steps.at(compute),
                           law.at(compute, self.surface.noise_P, self.surface.seed), self.decades(compute))
        if by != "surface":
            raise ScalingError(f"by={by!r}: choose envelope or surface")
        u_R, s_R = self.surface.best(compute, self.cost)
        return Optimum(compute, _of_logs(u_R), _of_logs(s_R), self.surface.loss(u_R[0], s_R[0]), self.decades(compute))

    def least(self, features_G: np.ndarray, steps_G: np.ndarray) -> tuple[Estimate, Estimate]:
        """(features, steps) of the run that has the least loss of the surface among G runs: where something else than FLOPs is
        limited. The intervals say how far the parameters' scatter moves the choice.
        """
        u_G, s_G = np.log(features_G), np.log(steps_G)
        best_R = self.surface.log(u_G, s_G).argmin(axis=1)
        return _of_logs(u_G[best_R]), _of_logs(s_G[best_R])

    def summary(self) -> dict:
        """Plain JSON of all but the resamples; the points and the seed give these again."""
        return {"compute": self.compute, "loss_name": self.loss_name, "points": self.points,
                "fitted_range": list(self.fitted_range), "surface": self.surface.summary(),
                "budgets": [{"compute": b.compute} | {name: getattr(b, name)._asdict() for name in ("features", "steps", "loss")}
                            for b in self.budgets],
                "features": self.features.summary(), "steps": self.steps.summary(), "loss": self.loss.summary(),
                "loss_with_offset": self.loss_with_offset and self.loss_with_offset.summary(),
                "left_out": [left._asdict() for left in self.left_out]}


def fit(points: Iterable[Point], *, compute: str = "dense", bootstrap: int = 1000, seed: int = 0) -> Laws:
    """The surface and the envelope of a grid of runs with one recipe, batch and learning rate. compute: "dense" or "sparse".

    Least squares in ln loss, so a relative error counts alike everywhere. Intervals: 90 %, from `bootstrap` resamples of the
    surface's residuals. The grid was chosen, not drawn: resampling whole points would leave holes in it, which no parabola
    crosses. The envelope is made anew in every resample, and what it moves by is added to what was measured.

    Raises `ScalingError`: fewer than 9 runs or 3 sizes or 3 numbers of steps, runs that differ in more than these, fewer than
    three budgets with an optimum inside the grid. Diverged runs and budgets with an optimum at the edge are left out and named.
    """
    kept, left = usable(points)
    enough(kept, _LEAST, "features", "steps")
    resamples(bootstrap)
    cost = Cost.of(kept, compute)
    y_P = np.log([point.loss for point in kept])
    n_P, s_P = (np.log([getattr(point, name) for point in kept]) for name in ("features", "steps"))
    surface, drawn_RP = fit_surface(n_P, s_P, y_P, bootstrap, seed)

    c_N, x_RN, y_RN, fitted_N, edges = _optima(kept, cost, np.concatenate([y_P[None], surface.log(n_P, s_P)[:1], drawn_RP]))
    # Noise may bend the measured envelope so that no offset fits; all resamples about it alone would say so, too.
    both_RN = np.concatenate([y_RN, y_RN[1:] - y_RN[:1] + fitted_N])
    s_RN = c_N - np.log(cost.of_step(np.exp(x_RN)))
    return Laws(
        compute, kept[0].loss_name, len(kept), surface, _told(c_N, x_RN, s_RN, y_RN), power_law(c_N, x_RN), power_law(c_N, s_RN),
        power_law(c_N, y_RN), offset_law(c_N, both_RN), (*left, *edges), cost)


def _optima(points: Sequence[Point], cost: Cost, y_RP: np.ndarray):
    """(ln compute [N], ln features and ln loss at the optimum [1 + R, N] of the budgets that have one inside, ln loss there of
    the fitted surface [N], the other budgets).

    Rows of y_RP: measured, fitted, resamples; each resample is what it differs by from the fitted, added to the measured.
    """
    found = profiles(points, cost, y_RP)
    x_RN, y_RN, left = optima(found)
    inside_N = np.isfinite(x_RN[0])
    c_N = np.log([profile.compute for profile in found])[inside_N]
    moved = [np.concatenate([v[:1], v[:1] + v[2:] - v[1]]) for v in (x_RN[:, inside_N], y_RN[:, inside_N])]
    return c_N, *moved, y_RN[1, inside_N], left


def _told(c_N: np.ndarray, *logs_RN: np.ndarray) -> tuple[Budget, ...]:
    return tuple(Budget(float(np.exp(c)), *(_of_logs(v[:, i]) for v in logs_RN))
                 for i, c in enumerate(c_N))


def _of_logs(log_R: np.ndarray) -> Estimate:
    """Of the estimate and its resamples."""
    return estimate(finite_exp(log_R[0]), finite_exp(log_R[1:]))


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not np.isfinite(value) or value <= 0:
            raise ScalingError(f"{name}={value!r}: give a number above 0")
