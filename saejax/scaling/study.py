"""The points of a study -> its laws, learning rates, surface over k, and how runs that were held out of the fit came out."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from saejax.base.errors import ScalingError
from saejax.scaling.laws import Laws, fit
from saejax.scaling.points import Point
from saejax.scaling.rates import RateLaw, fit_lr
from saejax.scaling.sums import Estimate, decades_beyond
from saejax.scaling.topk import TopKSurface, fit_topk_surface


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
    """What the points of a study give. laws: through the runs of the learning rate and k that most sizes and lengths have;
    rates: through those that were trained with several learning rates; topk: through the longest of those that were trained
    with several k; None where there is no such law. held: runs that were left out of the fit. refused: why a law could not be
    fitted, a line each. grid: the runs that `laws` are of, with those that were held out.
    """

    points: tuple[Point, ...]
    laws: Laws | None
    rates: RateLaw | None = None
    topk: TopKSurface | None = None
    held: tuple[Held, ...] = ()
    refused: tuple[str, ...] = ()
    grid: tuple[Point, ...] = ()

    @property
    def used(self) -> tuple[Point, ...]:
        """The runs that `laws` were fitted to."""
        held = {held.point for held in self.held}
        return tuple(point for point in self.grid if not point.diverged and point not in held)

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """The least and the most features and steps of these runs."""
        found = {name: [getattr(point, name) for point in self.used] for name in ("features", "steps")}
        return {name: (min(values), max(values)) for name, values in found.items()}

    def decades(self, features: float, steps: float) -> dict[str, float]:
        """By how many powers of ten a run lies outside of the fitted budgets and of `ranges`; 0 inside. Takes `laws`."""
        return {"budgets": self.laws.decades(self.laws.cost.of_step(features) * steps),
                "features": decades_beyond(features, self.ranges["features"]),
                "steps": decades_beyond(steps, self.ranges["steps"])}

    @property
    def lr(self) -> float | None:
        """The learning rate of `laws`."""
        return self.grid[0].lr if self.grid else None


def study(points: Iterable[Point], *, compute: str = "dense", leave_out: tuple[int, int] | None = None) -> Study:
    """Fits whatever the points allow. compute: "dense" or "sparse". leave_out: (features, tokens); runs with at least so many of
    both are held out, predicted and compared. Raises `ScalingError` where no run or every run is held out.
    """
    points = list(dict.fromkeys(points))
    well = [point for point in points if not point.diverged]
    lr = _usual(well or points, "lr")
    of_lr = [point for point in points if point.lr == lr]
    k = _usual([point for point in well if point.lr == lr] or of_lr, "k")
    of_k = [point for point in points if point.k in (k, None)]  # None: another kind, which a fit refuses
    own = [point for point in of_k if point.lr == lr]
    held = [point for point in own if leave_out and _at_least(point, *leave_out)]
    if leave_out and len(held) in (0, len(own)):
        raise ScalingError(f"leave_out={leave_out[0]},{leave_out[1]}: {'every' if held else 'no'} run has at least so many "
                           "features and tokens; nothing can be compared")
    refused: list[str] = []

    def fitted(what: str, make: Callable, *given, **options):
        try:
            return make(*given, **options)
        except ScalingError as error:
            refused.append(f"no {what}: {error}")
            return None

    laws = fitted("scaling laws", fit, [point for point in own if point not in held], compute=compute)
    of_rates, of_ks = _varied(of_k, "lr"), _longest(_varied(of_lr, "k"))
    rates = fitted("law of the learning rate", fit_lr, of_rates, compute=compute) if of_rates else None
    topk = fitted("surface over k", fit_topk_surface, of_ks) if of_ks else None
    compared = [Held(point, laws.predict(point.features, point.steps)) for point in held if laws and not point.diverged]
    return Study(tuple(points), laws, rates, topk, tuple(compared), tuple(refused), tuple(own))


def _usual(points: Sequence[Point], name: str) -> float | None:
    """The value of a field that most sizes and lengths have; of several the smallest."""
    found = Counter(value for _, _, value in {(point.features, point.steps, getattr(point, name)) for point in points})
    return min((value for value in found if value is not None), key=lambda value: (-found[value], value), default=None)


def _at_least(point: Point, features: int, tokens: int) -> bool:
    return point.features >= features and point.steps * point.batch >= tokens


def _varied(points: Sequence[Point], name: str) -> list[Point]:
    """Those whose size and length stands there with several values of a field."""
    several = Counter((features, steps) for features, steps, _ in {(p.features, p.steps, getattr(p, name)) for p in points})
    return [point for point in points if several[point.features, point.steps] > 1]


def _longest(points: Sequence[Point]) -> list[Point]:
    """Those of the most steps."""
    steps = max((point.steps for point in points), default=0)
    return [point for point in points if point.steps == steps]
