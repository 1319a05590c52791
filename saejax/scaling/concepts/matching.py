"""Names of concepts in a text.

Case: a name with a capital is found as it is written, any other in upper and lower case alike.

- Counted are names with a blank on both sides, as in Templeton et al. 2024: ` iron `, not ` iron, ` nor ` iron` at the end of a
  line.
- Places are names as words: no letter, digit or underscore touches them, whatever punctuation does. A single word without a
  capital is also found as plural (`s`, `es`, `ies` for `y`), since a feature of the concept fires there, too.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from saejax.scaling.concepts.lists import Concept, spelled

_WORD = re.compile(r"[^\W\d_]+")


class Matcher:
    """Finds all concepts in one go over a text: single words by a look into a dict, names of several words by one expression."""

    def __init__(self, concepts: Sequence[Concept]):
        spellings = spelled(concepts)
        self.concepts = len(concepts)
        self._exact = {name: n for name, n in spellings.items() if name != name.lower()}
        self._folded = {name: n for name, n in spellings.items() if name == name.lower()}
        self._phrases = [(_either(names), names) for names in (self._exact, self._folded) if any(map(_is_phrase, names))]
        plurals = {form: n for name, n in self._folded.items() if not _is_phrase(name) for form in _plurals(name)}
        self._words = plurals | self._folded
        self._any = {name.lower() for name in (*self._words, *self._exact)}

    def count(self, text: str) -> np.ndarray:
        """int64 [C]: how often each concept stands between two blanks."""
        out = np.zeros(self.concepts, np.int64)
        lower = text.lower()
        for names, shown in ((self._exact, text), (self._folded, lower)):
            _add(out, names, Counter(filter(names.__contains__, shown.split(" ")[1:-1])))
        for expression, names in self._phrases:
            shown = lower if names is self._folded else text
            spaced = (m[0] for m in expression.finditer(shown) if " " in m[0] and _between_blanks(shown, *m.span()))
            _add(out, names, Counter(spaced))
        return out

    def places(self, text: str) -> list[tuple[int, int, int]]:
        """(concept, first character, the one behind the last) of every concept that stands in a text as a word."""
        out = []
        for match in () if self._any.isdisjoint(_WORD.findall(text.lower())) else _WORD.finditer(text):
            number = self._exact.get(match[0])
            number = self._words.get(match[0].lower()) if number is None else number
            if number is not None and not _touched(text, *match.span()):
                out.append((number, *match.span()))
        for expression, names in self._phrases:
            for match in expression.finditer(_folded(text) if names is self._folded else text):
                if not _touched(text, *match.span()):
                    out.append((names[match[0]], *match.span()))
        return sorted(out, key=lambda place: place[1:])


def _add(out: np.ndarray, names: dict[str, int], counted: Counter) -> None:
    for name, times in counted.items():
        out[names[name]] += times


def _is_phrase(name: str) -> bool:
    return _WORD.fullmatch(name) is None


def _either(names: Iterable[str]) -> re.Pattern:
    """Longer names first: of `New York` and `New York City` the one that stands there whole."""
    phrases = sorted(filter(_is_phrase, names), key=lambda name: (-len(name), name))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, phrases)) + r")(?!\w)")


def _plurals(name: str) -> list[str]:
    return [f"{name}s", f"{name}es", *([f"{name[:-1]}ies"] if name.endswith("y") else [])]


def _folded(text: str) -> str:
    """In small letters, each character in its place: one whose small letter is longer stays as it is."""
    lower = text.lower()
    return lower if len(lower) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _between_blanks(text: str, first: int, stop: int) -> bool:
    return text[max(first - 1, 0):first] == " " == text[stop:stop + 1]


def _touched(text: str, first: int, stop: int) -> bool:
    """Whether a digit or an underscore stands beside it; `_WORD` takes all letters."""
    return any(c == "_" or c.isalnum() for c in (text[first - 1:first] if first else "") + text[stop:stop + 1])
