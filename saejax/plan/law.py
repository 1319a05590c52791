"""Points of a scaling study -> laws for the runs of one config, or why they say nothing of it."""

import dataclasses
from collections.abc import Iterable, Sequence

from saejax.base.errors import ScalingError
from saejax.config import Config
from saejax.sae import SAESpec
from saejax.scaling.points import Point, parsed_recipe
from saejax.scaling.recipe import recipe, sizes
from saejax.scaling.study import Study, study

# What orders rows and rounds sums: it moves a loss by less than a law knows it, and is named where it differs.
MINOR = ("data_seed", "stream.block_contexts", "stream.window_rows", "train.accumulate", "train.compute_dtype",
         "train.deterministic")
_SHOWN = 4  # keys that a message names


@dataclasses.dataclass(frozen=True, eq=False)
class Fitted:
    """found: the study, its `laws` are there. batch: of all its runs. k: every k that the points have, () for kinds without.
    minor: keys of small weight in which the config differs, as text.
    """

    found: Study
    batch: int
    k: tuple[int, ...]
    minor: tuple[str, ...]


def fitted(config: Config, spec: SAESpec, points: Iterable[Point], *, compute: str = "dense",
           leave_out: tuple[int, int] | None = None) -> Fitted:
    """The laws of the points that have the k of the config. compute: "dense" or "sparse" FLOPs. leave_out: (features, tokens);
    runs with at least so many of both do not count.

    Raises `ScalingError` where they are of another recipe, width, batch or k, and where no laws can be fitted.
    """
    points = list(points)
    if not points:
        raise ScalingError("law: there are no points")
    minor = _check_same(config, spec, points)
    wanted, there = sizes(config)["k"], sorted({point.k for point in points if point.k is not None})
    own = [point for point in points if point.k == wanted]
    if not own:
        raise ScalingError(f"law: its runs have k = {', '.join(map(str, there)) or 'none'}, and config.sae.k is {wanted}; a law "
                           "is at one k")
    found = study(own, compute=compute, leave_out=leave_out)
    if found.laws is None:
        raise ScalingError("law: " + "; ".join(found.refused))
    return Fitted(found, found.used[0].batch, tuple(there), tuple(minor))


def _check_same(config: Config, spec: SAESpec, points: Sequence[Point]) -> list[str]:
    """What differs in keys of small weight. Raises `ScalingError` for others: a law of another recipe says nothing of this one.
    """
    own = recipe(config) | {"train.batch": config.train.batch, "d_in": spec.d_in}
    own.pop("sae.d_in")  # what it comes to is d_in
    large, small = {}, {}
    for point in points:
        law = parsed_recipe(point.recipe) | {"train.batch": point.batch, "d_in": point.d_in}
        for key, value in own.items():
            if law.get(key) != value:
                (small if key in MINOR else large).setdefault(key, f"{key}: {law.get(key)!r} -> {value!r}")
    if large:
        shown = "; ".join(list(large.values())[:_SHOWN]) + (f"; and {len(large) - _SHOWN} more" if len(large) > _SHOWN else "")
        raise ScalingError(f"law: its runs have another recipe than the config ({shown}); a law says nothing of another recipe, "
                           "batch or width, so take points of this one")
    return list(small.values())
