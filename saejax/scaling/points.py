"""Trained SAEs as points of a scaling study: their sizes, compute and loss; which of them one fit may take together."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from saejax.base.errors import ScalingError
from saejax.base.storage import read_json

SAME = ("recipe", "d_in", "batch", "k", "lr", "loss_name")  # in all points of a fit, but for what it varies
_COUNTS = ("d_in", "features", "steps", "batch", "dead_tokens")
_OPTIONAL = ("k", "flops_sparse", "loss", "alive", "dead_fraction")
_SHOWN = 4  # runs or differences that a message names


@dataclass(frozen=True)
class Point:
    """One trained SAE.

    recipe: everything else that must be equal in one fit (kind, lambda, optimizer, hookpoint, store, ...), by `recipe_of`.
    steps: of `batch` rows. k: features kept a row, None for kinds without k. flops_dense, flops_sparse: of the whole run, counted
    as if every product were dense, and with the kept features only; None where there is no such path. loss: the value
    that is fitted, > 0, None for a run that diverged; loss_name: what it is, as "fvu on held-out rows". alive, dead_fraction: at
    the end, counted over dead_tokens tokens; None where that was not counted. diverged: the reason, empty where it did not.
    Raises `ScalingError` for values that are not positive or not finite.
    """

    run: str
    recipe: str
    d_in: int
    features: int
    steps: int
    batch: int
    k: int | None
    lr: float
    flops_dense: float
    flops_sparse: float | None
    loss: float | None
    loss_name: str
    alive: int | None
    dead_fraction: float | None
    dead_tokens: int
    diverged: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("run", "recipe", "loss_name", "diverged"):
                good, wanted = isinstance(value, str), "text"
            elif value is None:
                good, wanted = name in _OPTIONAL and (name != "loss" or bool(self.diverged)), "a number"
            else:
                whole = isinstance(value, int) or name not in (*_COUNTS, "k", "alive")
                least = value >= 0 if name in ("alive", "dead_fraction") else _number(value) and value > 0
                good, wanted = whole and _number(value) and least, "a number above 0"
            if not good:
                hint = "; name the reason in `diverged` and leave the loss None if the run diverged" if name == "loss" else ""
                raise ScalingError(f"run {self.run!r}: {name} is {value!r}, not {wanted}{hint}")

    def compute(self, kind: str) -> float:
        """FLOPs of the training run. kind: "dense" or "sparse". Raises `ScalingError` for another or where it was not counted."""
        if kind not in ("dense", "sparse"):
            raise ScalingError(f"compute={kind!r}: choose dense or sparse")
        found = self.flops_dense if kind == "dense" else self.flops_sparse
        if found is None:
            raise ScalingError(f"run {self.run!r}: its sparse FLOPs were not counted; fit compute='dense'")
        return found

    def to_json(self) -> dict:
        """Plain JSON, `from_json` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping) -> "Point":
        """Raises `ScalingError` for unknown or missing keys and for values that `Point` refuses."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping) or not names - {"diverged"} <= values.keys() <= names:
            found = sorted(names ^ set(values)) if isinstance(values, Mapping) else values
            raise ScalingError(f"a point of a scaling study has other keys: {found!r}; make the file again with this version")
        return cls(**values)


class Left(NamedTuple):
    """What was left out of a fit, and why."""

    what: str
    why: str


def recipe_of(values: Mapping) -> str:
    """A canonical text of a recipe: sorted, compact JSON, so that equal recipes are equal strings. Raises `ScalingError` for NaN
    and for what JSON does not hold.
    """
    try:
        return json.dumps(dict(values), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ScalingError(f"a recipe is plain JSON: {error}") from error


def parsed_recipe(recipe: str) -> dict:
    """What `recipe_of` made a text of; another text stands under "key"."""
    try:
        found = json.loads(recipe)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"key": recipe}


def read_points(path: str | Path) -> list[Point]:
    """The points of a JSON file: a list, or under "points" as in a report. Raises `ScalingError`."""
    found = read_json(path, ScalingError)
    found = found.get("points") if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ScalingError(f"{path}: holds no list of points")
    return [Point.from_json(values) for values in found]


def named_apart(files: Iterable[tuple[str, Sequence[Point]]]) -> list[Point]:
    """The points of several files. A name that stands for different runs, as of studies that differ in what their sweeps do not
    vary, gets its file before it.
    """
    read = [(file, point) for file, points in files for point in points]
    several = Counter(point.run for point in dict.fromkeys(point for _, point in read))
    return [dataclasses.replace(point, run=f"{file}: {point.run}") if several[point.run] > 1 else point for file, point in read]


def usable(points: Iterable[Point], *, varying: Sequence[str] = ()) -> tuple[list[Point], list[Left]]:
    """(the points that a fit takes, the diverged runs that it leaves out). varying: which of `SAME` it varies.

    Raises `ScalingError` where a run stands twice or the others differ in more than features, steps and `varying`.
    """
    points = list(points)
    twice = sorted(run for run, n in Counter(point.run for point in points).items() if n > 1)
    if twice:
        raise ScalingError(f"runs that stand twice: {_few(map(repr, twice))}; give each once")
    left = [Left(point.run, f"diverged: {point.diverged}") for point in points if point.diverged]
    kept = [point for point in points if not point.diverged]
    differing = [text for name in SAME if name not in varying for text in _differences(kept, name)]
    if differing:
        what = ", ".join(("features", "steps", *varying))
        raise ScalingError(f"these runs differ in {_few(differing)}; one fit takes runs that differ in {what} only")
    return kept, left


def enough(points: Sequence[Point], least: int, *names: str) -> None:
    """Raises `ScalingError` where there are fewer than `least` points, or fewer than three values of any of these fields."""
    if len(points) < least:
        raise ScalingError(f"{len(points)} runs that did not diverge are too few for this fit; it takes at least {least}")
    for name in names:
        found = sorted({getattr(point, name) for point in points})
        if len(found) < 3:
            raise ScalingError(f"these runs have {len(found)} values of {name} ({_few(map(str, found))}); a fit takes at least 3")


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _differences(points: Sequence[Point], name: str) -> list[str]:
    """What differs, with the first run that has each of two values."""
    first: dict = {}
    for point in points:
        first.setdefault(getattr(point, name), point)
    if len(first) < 2:
        return []
    a, b, *_ = first.values()
    if name != "recipe":
        return [f"{name} ({getattr(a, name)!r} of {a.run!r}, {getattr(b, name)!r} of {b.run!r})"]
    of_a, of_b = parsed_recipe(a.recipe), parsed_recipe(b.recipe)
    keys = [key for key in sorted(of_a.keys() | of_b.keys()) if of_a.get(key) != of_b.get(key)]
    return [f"recipe, {key} ({of_a.get(key)!r} of {a.run!r}, {of_b.get(key)!r} of {b.run!r})" for key in keys]


def _few(texts: Iterable[str]) -> str:
    texts = list(texts)
    more = len(texts) - _SHOWN
    return ", ".join(texts[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
