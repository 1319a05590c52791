"""The points of a study -> its laws, its learning rates, and how runs that were held out of the fit came out."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from saejax.base.errors import ScalingError
from saejax.scaling.laws import Laws, fit
from saejax.scaling.points import Point
from saejax.scaling.rates import RateLaw, fit_lr
from saejax.scaling.sums import Estimate


class Held(NamedTuple):
    """A run that the fit did not see, and what the surface says of it."""

    point: Point
    predicted: Estimate

    @property
    def inside(self) -> bool:
        """Whether what was measured lies in the interval of one more run."""
        return self.predicted.low <= self.point.loss <= self.predicted.high


@dataclass(frozen=True, eq=False)
class Study:
    """What the points of a study give. laws: through the runs of the learning rate that most sizes and lengths have; rates:
    through those that were trained with several; None where there is no such law. lr: the learning rate of `laws`. held:
    runs that were left out of the fit. refused: why `laws` or `rates` could not be fitted, a line each.
    """

    points: tuple[Point, ...]
    laws: Laws | None
    rates: RateLaw | None
    lr: float | None
    held: tuple[Held, ...]
    refused: tuple[str, ...]


def study(points: Iterable[Point], *, compute: str = "dense", leave_out: tuple[int, int] | None = None) -> Study:
    """Fits whatever the points allow. compute: "dense" or "sparse". leave_out: (features, tokens); runs with at least so many of
    both are held out, predicted and compared. Raises `ScalingError` where no run or every run is held out.
    """
    points = list(dict.fromkeys(points))
    usual = _usual(points)
    own = [point for point in points if point.lr == usual]
    held = [point for point in own if leave_out and _at_least(point, *leave_out)]
    if leave_out and len(held) in (0, len(own)):
        raise ScalingError(f"leave_out={leave_out[0]},{leave_out[1]}: {'every' if held else 'no'} run has at least so many "
                           "features and tokens; nothing can be compared")
    refused: list[str] = []
    try:
        laws = fit([point for point in own if point not in held], compute=compute)
    except ScalingError as error:
        laws = None
        refused.append(f"no scaling laws: {error}")
    compared = [Held(point, laws.predict(point.features, point.steps)) for point in held if laws and not point.diverged]
    return Study(tuple(points), laws, _rates(points, compute, refused), usual, tuple(compared), tuple(refused))


def _usual(points: Sequence[Point]) -> float | None:
    """The learning rate that most sizes and lengths have; of several the smallest."""
    found = Counter(lr for _, _, lr in {(point.features, point.steps, point.lr) for point in points})
    return min(found, key=lambda lr: (-found[lr], lr), default=None)


def _at_least(point: Point, features: int, tokens: int) -> bool:
    return point.features >= features and point.steps * point.batch >= tokens


def _rates(points: Sequence[Point], compute: str, refused: list[str]) -> RateLaw | None:
    """Through the sizes and lengths that were trained with several learning rates; None where there are none."""
    several = Counter((features, steps) for features, steps, _ in {(p.features, p.steps, p.lr) for p in points})
    swept = [point for point in points if several[point.features, point.steps] > 1]
    if not swept:
        return None
    try:
        return fit_lr(swept, compute=compute)
    except ScalingError as error:
        refused.append(f"no law of the learning rate: {error}")
        return None
