"""Feature splitting: dictionaries of growing size at one place, and the features of each that come from one of the size before.

Every feature of a dictionary goes to the feature of the next smaller one whose decoder row is nearest by cosine: its parent,
where the cosine is at least `LEAST`; a feature without a parent is new. Features that fired on none of the tokens of their index
are left out on both sides, as the directions of dead ones are at random; of a dictionary without an index all count. After
Templeton et al. 2024 ("feature splitting"), where one feature of the smallest dictionary is eleven in the largest.
"""

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from saejax.base.errors import FeatureIndexError
from saejax.base.logs import Progress
from saejax.base.text import visible
from saejax.features.compare.dictionaries import LEAST
from saejax.features.index.logits import rows_at
from saejax.features.index.neighbours import nearest_both_ways
from saejax.features.index.reader import FeatureIndex, sae_fingerprint
from saejax.sae.inference import SAE

BINS = ("0", "1", "2", "3", "4-7", "8+")  # children of a feature
MOST, WIDE = 80, 12                       # features of a tree that are shown, children of one of them
_TOKENS, _BLOCK = 4, 1024


@dataclass(frozen=True)
class Dictionary:
    """An SAE by a name, and its index where there is one."""

    name: str
    sae: SAE
    index: FeatureIndex | None = None


@dataclass(frozen=True)
class Level:
    """A dictionary among others. fired_F: which features count; known: an index says so. parent_F: the nearest feature of the
    level before, -1 in the smallest and of features that do not count, with cosine_F NaN. fires_on: tokens of each feature, safe
    to look at; empty lists where nothing is known. index: the directory.
    """

    name: str
    fingerprint: str
    known: bool
    fired_F: np.ndarray
    parent_F: np.ndarray
    cosine_F: np.ndarray
    fires_on: pa.ListArray | pa.ChunkedArray
    index: Path | None = None

    @property
    def features(self) -> int:
        return len(self.fired_F)


class Line(NamedTuple):
    """A feature of a tree. cosine: to its parent, None where it has none. more: children that are not shown."""

    level: int
    feature: int
    cosine: float | None
    more: int


@dataclass(frozen=True)
class Splitting:
    """Levels of growing size."""

    levels: tuple[Level, ...]
    least: float = LEAST

    def shares(self, level: int) -> dict:
        """How a level is split by the next. Of its features that count: `children` of one in the mean, `histogram` of these, the
        shares with `none`, `one` and `several`. Of the next one's: the share without a parent (`new`), and the mean `cosine` of
        the others to theirs.
        """
        small, large = self.levels[level], self.levels[level + 1]
        children = self.children_of_each(level)[small.fired_F]
        of_bins = np.searchsorted([1, 2, 3, 4, 8], children, "right")
        is_child_F = self._are_children[level + 1]
        return {"smaller": small.features, "larger": large.features, "children": float(children.mean()),
                "histogram": dict(zip(BINS, np.bincount(of_bins, minlength=len(BINS)).tolist(), strict=True)),
                "none": float((children == 0).mean()), "one": float((children == 1).mean()),
                "several": float((children > 1).mean()), "new": 1 - int(is_child_F.sum()) / int(large.fired_F.sum()),
                "cosine": float(large.cosine_F[is_child_F].mean()) if is_child_F.any() else None}

    def children_of_each(self, level: int) -> np.ndarray:
        """[F]: how many features of the next level have this one as parent."""
        return np.diff(self._children[level][0])

    def children(self, level: int, feature: int) -> list[int]:
        """Features of the next level whose parent this is, the nearest first."""
        if level + 1 == len(self.levels):
            return []
        begin, order = self._children[level]
        return order[begin[feature]:begin[feature + 1]].tolist()

    @functools.cached_property
    def descendants(self) -> tuple[np.ndarray, ...]:
        """[F] of each level: how many features of all larger dictionaries come from this one."""
        found = [np.zeros(self.levels[-1].features, np.int64)]
        for level in range(len(self.levels) - 1, 0, -1):
            is_child_F = self._are_children[level]
            below = np.bincount(self.levels[level].parent_F[is_child_F], found[0][is_child_F] + 1,
                                self.levels[level - 1].features)
            found.insert(0, below.astype(np.int64))
        return tuple(found)

    def roots(self, n: int) -> list[int]:
        """The n features of the smallest dictionary with the most descendants; fewer where fewer have any."""
        first = self.descendants[0]
        return [int(f) for f in np.argsort(-first, kind="stable")[:n] if first[f]]

    def new(self, level: int, n: int) -> list[int]:
        """The n features of a level that count and are farthest from any of the level before, the farthest first."""
        found = np.flatnonzero(self.levels[level].fired_F & ~self._are_children[level])
        return found[np.argsort(self.levels[level].cosine_F[found], kind="stable")[:n]].tolist()

    def has_relatives(self, level: int, feature: int) -> bool:
        """Whether a feature has a parent or children."""
        return bool(self._are_children[level][feature]) or bool(self.children(level, feature))

    def tree(self, level: int, feature: int) -> list[Line]:
        """A feature and what comes from it, the nearest first, a line below the one that it comes from. Of large trees `MOST`
        lines are there, those of the smaller dictionaries first, and of a feature `WIDE` children.
        """
        shown, waiting, room = {}, deque([(level, feature)]), MOST - 1
        while waiting:
            place = waiting.popleft()
            shown[place] = self.children(*place)[:min(WIDE, room)]
            room -= len(shown[place])
            waiting.extend((place[0] + 1, child) for child in shown[place])

        def lines(place: tuple[int, int]) -> Iterable[Line]:
            yield Line(*place, self._cosine(*place), self._count(*place) - len(shown[place]))
            for child in shown[place]:
                yield from lines((place[0] + 1, child))

        return list(lines((level, feature)))

    def family(self, level: int, feature: int) -> list[Line]:
        """`tree` below what the feature comes from: its parent, the parent of that, up to one that is new."""
        above, at = [], feature
        for here in range(level, 0, -1):
            if not self._are_children[here][at]:
                break
            at = int(self.levels[here].parent_F[at])
            above.insert(0, Line(here - 1, at, self._cosine(here - 1, at), self._count(here - 1, at) - 1))
        return above + self.tree(level, feature)

    def fires_on(self, level: int, feature: int) -> list[str]:
        """The tokens that a feature fires on most, safe to look at; none where nothing is known."""
        return self.levels[level].fires_on[feature].as_py()

    def _cosine(self, level: int, feature: int) -> float | None:
        return float(self.levels[level].cosine_F[feature]) if self._are_children[level][feature] else None

    def _count(self, level: int, feature: int) -> int:
        return 0 if level + 1 == len(self.levels) else int(np.diff(self._children[level][0][feature:feature + 2])[0])

    @functools.cached_property
    def _are_children(self) -> tuple[np.ndarray, ...]:
        return tuple((level.parent_F >= 0) & (level.cosine_F >= self.least) for level in self.levels)

    @functools.cached_property
    def _children(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Of each level but the last (where the children of each feature begin [F + 1], the children)."""
        found = []
        for small, large, is_child_F in zip(self.levels, self.levels[1:], self._are_children[1:], strict=False):
            child = np.flatnonzero(is_child_F)
            parent = large.parent_F[child]
            order = child[np.lexsort((-large.cosine_F[child], parent))]
            found.append((np.concatenate([[0], np.cumsum(np.bincount(parent, minlength=small.features))]), order))
        return tuple(found)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{level.features:,}" for level in self.levels)
        new = ", ".join(f"{100 * self.shares(level)['new']:.1f} %" for level in range(len(self.levels) - 1))
        return f"Splitting({sizes} features; new in each: {new})"


def split(dictionaries: Sequence[Dictionary], *, least: float = LEAST, progress: bool = True) -> Splitting:
    """How each dictionary is split by the next larger one, in whatever order they are given.

    2 F_A F_B D operations for each two neighbours, in blocks of 1,024 features of the smaller one; the rows of the larger one
    stay where they are. On the host some 20 bytes a feature, and its tokens. Raises `FeatureIndexError` for fewer than two,
    dictionaries of several places or of one size, and one of which nothing fires.
    """
    if not 0 <= least <= 1:
        raise FeatureIndexError(f"least={least}: the cosine of a child and its parent is between 0 and 1")
    ordered = sorted(dictionaries, key=lambda one: one.sae.cfg.d_sae)
    _check_matched(ordered)
    levels: list[Level] = []
    with Progress("split", sum(one.sae.cfg.d_sae for one in ordered[:-1]), unit="feature", enabled=progress) as bar:
        for number, one in enumerate(ordered):
            fired_F = _fired(one)
            parent_F, cosine_F = np.full(len(fired_F), -1, np.int32), np.full(len(fired_F), np.nan, np.float32)
            if number:
                found = nearest_both_ways(one.sae.params.W_dec, _blocks(ordered[number - 1], levels[-1].fired_F, bar),
                                          one.sae.mesh)
                numbers = np.flatnonzero(levels[-1].fired_F)
                parent_F[fired_F], cosine_F[fired_F] = numbers[found[2][fired_F]], found[3][fired_F]
            fingerprint = one.index.manifest["sae"]["fingerprint"] if one.index else sae_fingerprint(one.sae)
            levels.append(Level(one.name, fingerprint, one.index is not None, fired_F, parent_F, cosine_F, _fires_on(one),
                                one.index.path if one.index else None))
    return Splitting(tuple(levels), least)


def _check_matched(ordered: Sequence[Dictionary]) -> None:
    if len(ordered) < 2:
        raise FeatureIndexError(f"{len(ordered)} SAE: features are split between dictionaries of several sizes; give two or more")
    first = ordered[0]
    for one, larger in zip(ordered, ordered[1:], strict=False):
        if one.sae.cfg.d_sae == larger.sae.cfg.d_sae:
            raise FeatureIndexError(f"{one.name} and {larger.name}: both have {one.sae.cfg.d_sae:,} features; give "
                                    "dictionaries of growing size, or compare two of one size")
        if (a := _place(first.sae)) != (b := _place(larger.sae)):
            raise FeatureIndexError(f"{first.name} is at {a}, {larger.name} at {b}: only dictionaries of one place split each "
                                    "other's features")


def _place(sae: SAE) -> str:
    return f"{sae.cfg.place} ({sae.cfg.d_in} wide, {sae.params.W_dec.shape[1]} written)"


def _fired(one: Dictionary) -> np.ndarray:
    fired_F = np.ones(one.sae.cfg.d_sae, bool) if one.index is None else one.index.column("fired") > 0
    if not fired_F.any():
        raise FeatureIndexError(f"{one.name}: none of its features fired on the tokens of its index; nothing can be split")
    return fired_F


def _blocks(one: Dictionary, fired_F: np.ndarray, bar: Progress) -> Iterable[np.ndarray]:
    numbers = np.flatnonzero(fired_F)
    bar.advance(len(fired_F) - len(numbers))
    for first in range(0, len(numbers), _BLOCK):
        yield rows_at(one.sae, one.sae.params.W_dec, numbers[first:first + _BLOCK])
        bar.advance(len(numbers[first:first + _BLOCK]))


def _fires_on(one: Dictionary) -> pa.ListArray:
    """The tokens of every feature; a text is made once for each token id."""
    if one.index is None:
        return pa.array([[]], pa.list_(pa.string())).take(np.zeros(one.sae.cfg.d_sae, np.int32))
    ids_FN = one.index.heads("token_ids", _TOKENS)
    used, place = np.unique(ids_FN[ids_FN >= 0], return_inverse=True)
    texts = pa.array([visible(one.index.token(int(t))) or "\u2205" for t in used], pa.string()).take(place.ravel())
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum((ids_FN >= 0).sum(1))]).astype(np.int32), texts)
