"""Numbers of contexts: which row of which part of the text is context number c.

Contexts are numbered in rounds. Round r takes row r of every part that has more than r rows, in the order of the parts; a part
that has no more is left out from then on. A part whose text has not ended may get further rows. So only the rounds are numbered
in which every such part has its row: what is added later never changes the number of a context.
"""

import numpy as np


class Numbering:
    """The contexts of parts with these numbers of rows, `finished` where the text of the part has ended. `contexts`: how many."""

    def __init__(self, rows, finished):
        rows, unfinished = np.asarray(rows, np.int64), ~np.asarray(finished, bool)
        rounds = rows[unfinished].min() if unfinished.any() else rows.max(initial=0)
        self._rows = np.minimum(rows, rounds)
        # From round edges[i] to round edges[i + 1] the same parts have rows: widths[i] of them.
        self._edges = np.unique(np.append(self._rows, 0))
        self._widths = len(rows) - np.searchsorted(np.sort(self._rows), self._edges, side="right")
        self._starts = np.append(0, np.cumsum(self._widths[:-1] * np.diff(self._edges)))
        self.contexts = int(self._starts[-1])

    def __call__(self, numbers) -> tuple[np.ndarray, np.ndarray]:
        """int64 (part, row) of each of these contexts. Raises `IndexError` for a number that none has."""
        numbers = np.asarray(numbers, np.int64)
        if numbers.size and not (0 <= numbers.min() and numbers.max() < self.contexts):
            raise IndexError(f"contexts {numbers.min()} to {numbers.max()} are not all in [0, {self.contexts})")
        spans = np.searchsorted(self._starts, numbers, side="right") - 1
        parts, rows = np.empty_like(numbers), np.empty_like(numbers)
        for span in np.unique(spans):
            here = spans == span
            there = np.flatnonzero(self._rows > self._edges[span])
            rounds, places = np.divmod(numbers[here] - self._starts[span], len(there))
            parts[here], rows[here] = there[places], self._edges[span] + rounds
        return parts, rows


def rows_needed(rows, finished, contexts: int) -> int:
    """How many rows every part must have, so that this many contexts have a number: the least number for which they are enough,
    where the parts whose text goes on are taken to have them. 0 when no part has to grow.
    """
    rows, finished = np.asarray(rows, np.int64), np.asarray(finished, bool)
    low, high, going_on = 0, contexts, int((~finished).sum())
    if not going_on:
        return 0
    while low < high:
        middle = (low + high) // 2
        if going_on * middle + int(np.minimum(rows[finished], middle).sum()) >= contexts:
            high = middle
        else:
            low = middle + 1
    return low if (rows[~finished] < low).any() else 0
