"""Features by the text of their examples, or by what is said of them."""

import re
from collections.abc import Mapping

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.features.index.reader import EXAMPLES, FeatureIndex
from saejax.features.search.found import Found

BEFORE, BEHIND = 8, 3   # tokens of the window around the active one
PRIOR = 4               # contexts at the corpus frequency that are added to those of a feature
_BLOCK = 4096           # features whose examples are read at once


def places(index: FeatureIndex, wanted: str) -> tuple[np.ndarray, np.ndarray]:
    """Where in the corpus a text in small letters stands, bool [contexts, T] each: at tokens that hold it or a part of it, and
    near tokens that have the whole of it between 8 tokens before them and 3 behind. Upper and lower case are one.
    """
    overlapping = re.compile(f"(?={re.escape(wanted)})")
    on_NT, near_NT = (np.zeros(index.tokens_NT.shape, bool) for _ in range(2))
    for context, tokens in enumerate(index.tokens_NT):
        texts = [text.lower() for text in index.texts(tokens)]
        joined = "".join(texts)
        if wanted in joined:
            start_S = np.array([match.start() for match in overlapping.finditer(joined)])
            end_T = np.cumsum([len(text) for text in texts])
            first_S, last_S = (np.searchsorted(end_T, at_S, side="right") for at_S in (start_S, start_S + len(wanted) - 1))
            on_NT[context] = _covered(first_S, last_S + 1, len(tokens))
            near_NT[context] = _covered(np.maximum(last_S - BEHIND, 0), first_S + BEFORE + 1, len(tokens))
    return on_NT, near_NT


def _covered(first_S: np.ndarray, stop_S: np.ndarray, length: int) -> np.ndarray:
    """bool [length]: what lies in one of the ranges first .. stop - 1."""
    there = first_S < stop_S
    begins, ends = first_S[there], np.minimum(stop_S[there], length)
    return (np.bincount(begins, minlength=length + 1) - np.bincount(ends, minlength=length + 1)).cumsum()[:length] > 0


def by_text(index: FeatureIndex, text: str, n: int = 10) -> list[Found]:
    """The n features whose top contexts hold `text` most above its frequency in the corpus.

    score = lift = ((h + 4 q) / (t + 4)) / q, with h of t top contexts that hold it and q the share of the corpus' tokens that do:
    the share of the top contexts, shrunk towards q as if 4 more of them were at that frequency. Features that fire on the text
    itself (the active token holds it, or a part of it) come first, by that lift; behind them those that have it near: from 8
    tokens before the active one to 3 behind, by the lift of that. Features without a lift above 1 are left out. Upper and lower
    case are one, blanks count. Raises `FeatureIndexError` for no text.
    """
    wanted = text.lower()
    if not wanted.strip():
        raise FeatureIndexError("search: no text to look for; give some")
    hits_2F, total_F = np.zeros((2, index.features), int), np.zeros(index.features, int)
    places_2NT = places(index, wanted)
    for start in range(0, index.features, _BLOCK):
        table = index.table(EXAMPLES, start, min(start + _BLOCK, index.features))
        top = table["interval"].to_numpy() == 0
        feature, context, position = (table[name].to_numpy()[top] for name in ("feature", "context", "position"))
        np.add.at(total_F, feature, 1)
        for hits_F, there_NT in zip(hits_2F, places_2NT, strict=True):
            np.add.at(hits_F, feature, there_NT[context, position])
    on_F, near_F = (_lift(hits_F, total_F, float(there_NT[index.keep_NT].mean()))
                    for hits_F, there_NT in zip(hits_2F, places_2NT, strict=True))
    best = [f for f in np.lexsort((-near_F, -on_F))[:n] if on_F[f] or near_F[f]]
    return [Found(int(f), float(on_F[f] or near_F[f]), _why(*hits_2F[:, f], total_F[f], on_F[f] > 0)) for f in best]


def _lift(hits_F: np.ndarray, total_F: np.ndarray, frequency: float) -> np.ndarray:
    """[F]: shrunken share over frequency; 0 where that is not above 1."""
    lift_F = (hits_F + PRIOR * frequency) / (total_F + PRIOR) / max(frequency, 1e-30)
    return np.where((hits_F > 0) & (lift_F > 1), lift_F, 0)


def _why(on: int, near: int, total: int, itself: bool) -> str:
    return f"on it in {on} of {total} top contexts, near it in {near}" if itself else f"near it in {near} of {total} top contexts"


def by_explanation(explanations: Mapping[int, str], text: str, n: int = 10) -> list[Found]:
    """The first n features whose explanation holds `text`, in upper or lower case. Raises `FeatureIndexError` for no text."""
    if not text.strip():
        raise FeatureIndexError("search: no text to look for; give some")
    return [Found(feature, 1.0, f"explained as {said!r}") for feature, said in sorted(explanations.items())
            if text.lower() in said.lower()][:n]
