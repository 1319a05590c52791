"""Which row of which part a context is, against a plain loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saejax.data.numbering import Numbering, rows_needed


def naive(rows, finished):
    """(part, row) of every context, in order."""
    out = []
    for r in range(max(rows, default=0)):
        if any(n <= r and not f for n, f in zip(rows, finished, strict=True)):
            return out
        out += [(p, r) for p, n in enumerate(rows) if n > r]
    return out


lengths = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=12)


@settings(deadline=None)
@given(lengths, st.randoms())
def test_numbers_are_dealt_in_rounds(sizes, random):
    rows, finished = [n for n, _ in sizes], [f for _, f in sizes]
    numbering, wanted = Numbering(rows, finished), naive(rows, finished)
    assert numbering.contexts == len(wanted)
    assert list(zip(*map(np.ndarray.tolist, numbering(np.arange(len(wanted)))), strict=True)) == wanted
    some = random.choices(range(len(wanted)), k=5) if wanted else []
    assert list(zip(*map(np.ndarray.tolist, numbering(some)), strict=True)) == [wanted[i] for i in some]
    for outside in (-1, len(wanted)):
        with pytest.raises(IndexError):
            numbering([outside])
    longer = [n + (0 if f else random.randrange(4)) for n, f in sizes]
    ended = [f or random.random() < 0.3 for f in finished]
    assert naive(longer, ended)[:len(wanted)] == wanted


@settings(deadline=None)
@given(lengths, st.integers(1, 99))
def test_parts_get_no_more_rows_than_they_need(sizes, contexts):
    rows, finished = [n for n, _ in sizes], [f for _, f in sizes]
    wanted = rows_needed(rows, finished, contexts)

    def room(least):
        return sum(min(n, least) if f else least for n, f in sizes)

    least = next((n for n in range(contexts + 1) if room(n) >= contexts), None)
    assert wanted == (least if any(n < (least or 0) and not f for n, f in sizes) else 0)
