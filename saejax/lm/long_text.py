"""Token ids of a text that is too long to be tokenised at once: a tokenizer takes about 300 bytes of memory a token.

The text is cut into pieces that overlap. Two neighbours are joined where they have given the same tokens for a while: what a
token is depends on what stands near it, and in the middle of the overlap both pieces see that. So the ids are those of the whole
text. Where two pieces never agree (a text without an end to its words), the second one begins anew at a token of the first.
"""

import numpy as np
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

LONG = 1 << 20  # characters that are tokenised at once
_OVERLAP = 1 << 12
_AGREED = 16  # tokens

_Token = tuple[int, int, int]  # first character, behind the last one, id


def ids_of(backend: Backend, text: str) -> np.ndarray:
    """int32 ids of a long text. No BOS or EOS."""
    out, start = [], 0
    before, first = backend.encode(text[:LONG], add_special_tokens=False), 0
    while start + LONG < len(text):
        follows = start + LONG - _OVERLAP
        piece = backend.encode(text[follows:follows + LONG], add_special_tokens=False)
        old, new = _tokens(before, start, follows, start + LONG), _tokens(piece, follows, follows, start + LONG)
        joint = _joint(old, new)
        if joint is None:
            place = len(old) // 2
            follows = old[place][0] if old else start + LONG
            piece = backend.encode(text[follows:follows + LONG], add_special_tokens=False)
            joint = place, 0
        end = len(before) - len(old) + joint[0]
        out.append(np.array(before.ids[first:end], np.int32))
        before, first, start = piece, joint[1], follows
    return np.concatenate([*out, np.array(before.ids[first:], np.int32)])


def _tokens(piece: Encoding, offset: int, start: int, stop: int) -> list[_Token]:
    """The tokens of a piece, which begins at character `offset`, in an overlap: the last ones of the piece before it, and the
    first ones of the piece behind it.
    """
    every = [(a + offset, b + offset, i) for (a, b), i in zip(piece.offsets, piece.ids, strict=True)]
    if offset < start:
        return every[next((n for n, token in enumerate(every) if token[0] >= start), len(every)):]
    return every[:next((n for n, token in enumerate(every) if token[1] > stop), len(every))]


def _joint(old: list[_Token], new: list[_Token]) -> tuple[int, int] | None:
    """Where to go from one to the other: the middle of the first tokens, so many as are enough, that are the same in both."""
    i = j = run = 0
    while i < len(old) and j < len(new):
        if old[i] == new[j]:
            run += 1
            if run == _AGREED:
                return i + 1 - _AGREED // 2, j + 1 - _AGREED // 2
            i, j = i + 1, j + 1
        else:
            run, ahead = 0, (old[i][:2] > new[j][:2]) - (old[i][:2] < new[j][:2])
            i, j = i + (ahead <= 0), j + (ahead >= 0)
    return None
