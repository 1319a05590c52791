"""The surface of the loss L over features N and steps S, in one of two forms with five parameters each.

    sum      L(N, S) = E + A N^-a + B S^-b         Hoffmann et al. 2022, approach 3
    power    L(N, S) = (A N^-a + B S^-b)^c         Kaplan et al. 2020, equation 1.5

with features and steps for parameters and tokens. Shapes: P points, R resamples.
"""

import functools
import itertools
from dataclasses import dataclass

import numpy as np

from saejax.scaling.envelope import Cost
from saejax.scaling.sums import Estimate, Sum, estimate, finite_exp, named, resampled, starts_of, widened

SUM, POWER = "sum", "power"
EQUATIONS = {SUM: "L(N, S) = E + A N^-a + B S^-b", POWER: "L(N, S) = (A N^-a + B S^-b)^c"}
_NAMES = {SUM: ("E", "A", "a", "B", "b"), POWER: ("A", "a", "B", "b", "c")}
_MAPS = {"E": finite_exp, "A": finite_exp, "a": np.negative, "B": finite_exp, "b": np.negative, "c": finite_exp}
_EXPONENTS = [[-a, -b] for a, b in itertools.product((0.1, 0.3, 0.6, 1.2), repeat=2)]
_POWERS = (0.25, 0.5, 1.0, 2.0)
_LIKELIER = 20.0  # times, so much the points have to be under the power for it to be taken


@dataclass(frozen=True, eq=False)
class Surface:
    """What `fit_surface` finds. theta_R5: parameters as they are fitted, the best first, then one row a resample. errors: of each
    form the root mean square of the residuals in ln loss. noise_P: residuals, widened. other: the form that was not taken.
    """

    form: str
    errors: dict[str, float]
    theta_R5: np.ndarray
    noise_P: np.ndarray
    seed: int
    other: "Surface | None" = None

    @property
    def error(self) -> float:
        """Root mean square of the residuals in ln loss."""
        return self.errors[self.form]

    @functools.cached_property
    def parameters(self) -> dict[str, Estimate]:
        """By the names of the equation."""
        names = _NAMES[self.form]
        return named(names, self.theta_R5[0], self.theta_R5[1:], [_MAPS[name] for name in names])

    def log(self, n_P: np.ndarray, s_P: np.ndarray) -> np.ndarray:
        """ln L [R, P] at ln features and ln steps."""
        return _model(self.form, n_P, s_P).log(self.theta_R5)

    def loss(self, n: float, s: float) -> Estimate:
        """L of one more run at ln features and ln steps. The interval has the parameters' scatter and the runs' own, and reaches
        over those of both forms: which of them holds outside of the runs, the runs do not tell.
        """
        y_R = self.log(np.array([n]), np.array([s]))[:, 0]
        noise_R = np.random.default_rng(self.seed).choice(self.noise_P, len(y_R) - 1)
        own = estimate(finite_exp(y_R[0]), finite_exp(y_R[1:] + noise_R))
        if self.other is None:
            return own
        theirs = self.other.loss(n, s)
        return Estimate(own.value, min(own.low, theirs.low), max(own.high, theirs.high))

    def best(self, compute: float, cost: Cost) -> tuple[np.ndarray, np.ndarray]:
        """(ln features, ln steps), each [R], of the least loss along a budget: where the slope of A N^-a + B S^-b changes sign,
        by bisection.
        """
        first = _NAMES[self.form].index("A")
        A, a, B, b = self.theta_R5[:, first:first + 4].T
        low_R, high_R = np.zeros(len(A)), np.full(len(A), np.log(compute / cost.each))
        for _ in range(60):
            u_R = (low_R + high_R) / 2
            step_R = cost.of_step(np.exp(u_R))
            s_R = np.log(compute / step_R)
            slope_R = a * finite_exp(A + a * u_R) - b * finite_exp(B + b * s_R) * cost.each * np.exp(u_R) / step_R
            low_R, high_R = np.where(slope_R < 0, u_R, low_R), np.where(slope_R < 0, high_R, u_R)
        return u_R, np.log(compute) - np.log(cost.of_step(np.exp(u_R)))

    def summary(self) -> dict:
        """Plain JSON."""
        return {"form": self.form, "equation": EQUATIONS[self.form], "errors": self.errors, "bootstrap": len(self.theta_R5) - 1,
                "seed": self.seed, "parameters": {name: e._asdict() for name, e in self.parameters.items()}}


def fit_surface(n_P: np.ndarray, s_P: np.ndarray, y_P: np.ndarray, bootstrap: int, seed: int) -> tuple[Surface, np.ndarray]:
    """(the surface through ln losses at ln features and ln steps, what was drawn for its resamples [R, P]).

    Both forms are fitted by least squares in ln L. The sum is taken unless the points are 20 times likelier under the power,
    (error of the sum / error of the power)^P > 20. Resamples: fitted values with residuals drawn anew.
    """
    models = {form: _model(form, n_P, s_P) for form in (SUM, POWER)}
    starts = {form: _starts(form, model, y_P) for form, model in models.items()}
    theta = {form: model.fit(starts[form], y_P) for form, model in models.items()}
    errors = {form: float(np.sqrt(np.mean((model.log(theta[form][None])[0] - y_P) ** 2))) for form, model in models.items()}
    gain = np.log(max(errors[SUM], 1e-12)) - np.log(max(errors[POWER], 1e-12))
    forms = (POWER, SUM) if len(y_P) * gain > np.log(_LIKELIER) else (SUM, POWER)
    surface = None
    for form in reversed(forms):  # the one that is taken last
        fitted_P = models[form].log(theta[form][None])[0]
        noise_P = widened(y_P - fitted_P, len(theta[form]))
        drawn_RP = resampled(fitted_P, noise_P, bootstrap, seed)
        from_SQ = np.vstack([theta[form], *(starts[form] if form == SUM else [])])  # no term of the power goes to 0
        draws = models[form].fit_each(from_SQ, drawn_RP)
        surface = Surface(form, errors, np.concatenate([theta[form][None], draws]), noise_P, seed, surface)
    return surface, drawn_RP


def _model(form: str, n_P: np.ndarray, s_P: np.ndarray) -> Sum:
    one = np.ones_like(n_P)
    terms = [np.stack([one, n_P], axis=1), np.stack([one, s_P], axis=1)]
    return Sum([one[:, None], *terms]) if form == SUM else Sum(terms, power=True)


def _starts(form: str, model: Sum, y_P: np.ndarray) -> np.ndarray:
    if form == SUM:
        return starts_of(model.designs, _EXPONENTS, y_P)
    inner = [(starts_of(model.designs, _EXPONENTS, y_P / c), c) for c in _POWERS]
    return np.concatenate([np.hstack([starts, np.full((len(starts), 1), np.log(c))]) for starts, c in inner])
