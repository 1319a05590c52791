"""Features by the text of their examples, or by what is said of them."""

from collections.abc import Mapping

import numpy as np

from saejax.base.errors import FeatureIndexError
from saejax.features.index.reader import EXAMPLES, FeatureIndex
from saejax.features.search.found import Found

_BLOCK = 4096  # features whose examples are read at once


def by_text(index: FeatureIndex, text: str, n: int = 10) -> list[Found]:
    """The n features most of whose top contexts hold `text` where they fire: from 8 tokens before the example to 3 behind it.

    Upper and lower case are one, blanks count. score: the share of the top contexts. Raises `FeatureIndexError` for no text.
    """
    wanted = text.lower()
    if not wanted.strip():
        raise FeatureIndexError("search: no text to look for; give some")
    hits, totals = np.zeros(index.features), np.zeros(index.features)
    for first in range(0, index.features, _BLOCK):
        table = index.table(EXAMPLES, first, min(first + _BLOCK, index.features))
        columns = (table[name].to_numpy() for name in ("feature", "interval", "context", "position"))
        for feature, interval, context, position in zip(*columns, strict=True):
            if interval == 0:
                tokens = index.tokens_NT[context, max(0, position - 8):position + 4]
                totals[feature] += 1
                hits[feature] += wanted in "".join(index.texts(tokens)).lower()
    share = hits / np.maximum(totals, 1)
    best = np.lexsort((-hits, -share))[:n]
    return [Found(int(f), float(share[f]), f"{int(hits[f])} of {int(totals[f])} top contexts") for f in best if hits[f]]


def by_explanation(explanations: Mapping[int, str], text: str, n: int = 10) -> list[Found]:
    """The first n features whose explanation holds `text`, in upper or lower case. Raises `FeatureIndexError` for no text."""
    if not text.strip():
        raise FeatureIndexError("search: no text to look for; give some")
    return [Found(feature, 1.0, f"explained as {said!r}") for feature, said in sorted(explanations.items())
            if text.lower() in said.lower()][:n]
