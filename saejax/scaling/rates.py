"""The best learning rate at each budget of compute, and a power law through these.

Source: Templeton et al. 2024, "Scaling Monosemanticity": at several budgets the learning rate is swept at the optimal number of
features and steps. Shapes: P points, R resamples, N budgets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saejax.base.errors import ScalingError
from saejax.scaling.envelope import HALF, LEAST, PowerLaw, distinct, power_law, vertices
from saejax.scaling.points import Left, Point, usable
from saejax.scaling.sums import Estimate, estimate, resampled, resamples, widened


class BestRate(NamedTuple):
    """The best learning rate at one budget (FLOPs), of runs with these features and steps."""

    compute: float
    features: int
    steps: int
    lr: Estimate


@dataclass(frozen=True, eq=False)
class RateLaw:
    """LR*(C), a power law over compute ("dense" or "sparse" FLOPs) through the best learning rates at `budgets`."""

    compute: str
    loss_name: str
    budgets: tuple[BestRate, ...]
    law: PowerLaw
    left_out: tuple[Left, ...]

    def summary(self) -> dict:
        """Plain JSON."""
        return {"compute": self.compute, "loss_name": self.loss_name, "law": self.law.summary(),
                "budgets": [b._asdict() | {"lr": b.lr._asdict()} for b in self.budgets],
                "left_out": [left._asdict() for left in self.left_out]}


def fit_lr(points: Iterable[Point], *, compute: str = "dense", bootstrap: int = 1000, seed: int = 0) -> RateLaw:
    """Runs of one recipe at several budgets (each: the same features and steps), several learning rates at each.

    At each budget ln loss is a parabola in ln lr through what lies within a factor of 4 of the best; its bottom is LR*.
    Intervals: 90 %, from resampled residuals of one model of these points, parabolas of a common width whose bottoms lie where
    they may. So the residuals of all budgets count together; one parabola through three points would have none.

    Raises `ScalingError`: mixed recipes, a best learning rate at the edge of the sweep at so many budgets that fewer than three
    are left, and points that are too few for residuals.
    """
    kept, left = usable(points, varying=("lr",))
    resamples(bootstrap)
    groups: dict[tuple[int, int], list[Point]] = {}
    for point in kept:
        groups.setdefault((point.features, point.steps), []).append(point)
    sweeps = sorted((_mean(sorted(group, key=lambda p: p.lr), compute) for group in groups.values()), key=lambda s: s.compute)
    inside = []
    for sweep in sweeps:
        x_R, _, best_R = vertices(sweep.x_M, sweep.y_M[None])
        if np.isfinite(x_R[0]):
            inside.append(sweep)
        else:
            left.append(Left(f"budget {sweep.compute:.3g} FLOPs", _why(sweep, int(best_R[0]))))
    _enough(inside, sweeps, left)
    x_RN = _resampled(inside, bootstrap, seed)
    held_N = np.isfinite(x_RN[1:]).mean(0) >= HALF
    left += [Left(f"budget {sweep.compute:.3g} FLOPs", "fewer than half of the resamples have their best inside the sweep")
             for sweep, held in zip(inside, held_N, strict=True) if not held]
    inside, x_RN = [sweep for sweep, held in zip(inside, held_N, strict=True) if held], x_RN[:, held_N]
    _enough(inside, sweeps, left)
    c_N = np.log([sweep.compute for sweep in inside])
    budgets = tuple(BestRate(sweep.compute, sweep.features, sweep.steps, estimate(np.exp(x_R[0]), np.exp(x_R[1:])))
                    for sweep, x_R in zip(inside, x_RN.T, strict=True))
    return RateLaw(compute, kept[0].loss_name, budgets, power_law(c_N, x_RN), tuple(left))


@dataclass(frozen=True, eq=False)
class _Sweep:
    """One budget. x_M: ln lr, y_M: ln loss; runs of one learning rate count as their mean."""

    compute: float
    features: int
    steps: int
    x_M: np.ndarray
    y_M: np.ndarray


def _mean(group: Sequence[Point], compute: str) -> _Sweep:
    rates = sorted({point.lr for point in group})
    losses = [np.mean([np.log(point.loss) for point in group if point.lr == lr]) for lr in rates]
    first = group[0]
    return _Sweep(first.compute(compute), first.features, first.steps, np.log(rates), np.array(losses))


def _enough(inside: Sequence[_Sweep], sweeps: Sequence[_Sweep], left: Sequence[Left]) -> None:
    found, there = (len(distinct(np.log([sweep.compute for sweep in some]))) for some in (inside, sweeps))
    if found < LEAST:
        reasons = "; ".join(f"{what}: {why}" for what, why in left if what.startswith("budget"))
        raise ScalingError(f"{found} of {there} budgets have their best learning rate inside the sweep and a power "
                           f"law takes {LEAST}; {reasons or 'sweep more budgets'}")


def _why(sweep: _Sweep, best: int) -> str:
    if len(sweep.x_M) < 3:
        return f"{len(sweep.x_M)} learning rates, a parabola takes 3"
    if best == 0:
        return f"the best learning rate, {np.exp(sweep.x_M[0]):.3g}, is the smallest; add smaller ones"
    if best == len(sweep.x_M) - 1:
        return f"the best learning rate, {np.exp(sweep.x_M[-1]):.3g}, is the largest; add larger ones"
    return "no parabola through the losses near the least has its bottom among them"


def _resampled(sweeps: Sequence[_Sweep], bootstrap: int, seed: int) -> np.ndarray:
    """ln LR* [1 + R, N]: measured, then resamples, each as what it differs by from the fitted, added to the measured."""
    x_P, y_P = np.concatenate([s.x_M for s in sweeps]), np.concatenate([s.y_M for s in sweeps])
    at_P = np.repeat(np.arange(len(sweeps)), [len(s.x_M) for s in sweeps])
    lowest_P = np.array([s.x_M[s.y_M.argmin()] for s in sweeps])[at_P]
    used_P = np.abs(x_P - lowest_P) <= np.log(4.0) + 1e-9
    used_P |= np.concatenate([np.abs(np.arange(len(s.x_M)) - s.y_M.argmin()) <= 1 for s in sweeps])
    middle, own = x_P.mean(), np.eye(len(sweeps))[at_P]
    x_P = x_P - middle
    design = np.concatenate([own, own * x_P[:, None], x_P[:, None] ** 2], axis=1)
    spare = int(used_P.sum()) - design.shape[1]
    if spare < 2:
        raise ScalingError(f"{int(used_P.sum())} runs near the best learning rates leave nothing to tell the noise from; sweep "
                           "at least five learning rates a budget, at most a factor of 2 apart")
    found, *_ = np.linalg.lstsq(design[used_P], y_P[used_P], rcond=None)
    fitted_P = design @ found
    noise_P = widened((y_P - fitted_P)[used_P], design.shape[1])
    base_P = np.where(used_P, fitted_P, y_P)  # far from the bottom the model says nothing
    drawn_RP = np.concatenate([y_P[None], base_P[None], resampled(base_P, noise_P, bootstrap, seed)])
    out = []
    for number, sweep in enumerate(sweeps):
        x_R = vertices(sweep.x_M, drawn_RP[:, at_P == number])[0]
        out.append(np.concatenate([x_R[:1], x_R[:1] + x_R[2:] - x_R[1]]))
    return np.stack(out, axis=1)
