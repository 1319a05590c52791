"""The list of a dashboard: a kind of file for each column, so that the page reads those that it sorts and searches by.

    density max mean     float32, of `PART` features a file
    tokens logits        of as many features `SHOWN` words each: what it fires on, what it promotes; 0 for none
    words                the texts of the words, in the order of their numbers
    said                 [feature, explanation], of those that have one
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saejax.base.text import script_json, visible
from saejax.features.index.reader import FeatureIndex
from saejax.pages.data_files import Divided, numbered, packed, write_value

PART, SHOWN = 4096, 4
NUMBERS = ("density", "max", "mean")
_LONGEST = 400  # characters of an explanation


@dataclass(frozen=True)
class Lines:
    """What the list says of every feature. numbers: [F] each, by `NUMBERS`. ids: [F, SHOWN] token ids each, -1 for none.
    said: explanations.
    """

    numbers: dict[str, np.ndarray]
    ids: dict[str, np.ndarray]
    said: Mapping[int, str]

    @classmethod
    def of(cls, index: FeatureIndex, said: Mapping[int, str]) -> "Lines":
        """Those of an index: 44 bytes a feature."""
        ids = {"tokens": index.heads("token_ids", SHOWN), "logits": index.heads("logit_ids", SHOWN)}
        return cls({name: index.column(name).astype(np.float32) for name in NUMBERS}, ids, said)

    @property
    def features(self) -> int:
        return len(self.numbers["density"])


def shown_said(said: Mapping[int, str], feature: int) -> str:
    """The explanation of a feature, safe to look at; empty without one."""
    return visible(said.get(feature, ""), _LONGEST)


def write_list(folder: Path, lines: Lines, text: Callable[[int], str]) -> dict:
    """Writes the files of the list into the data folder. text: token id -> text, safe to look at. Returns what the page must
    know of how they are divided.
    """
    words = _Words(max(ids.max(initial=-1) for ids in lines.ids.values()))
    for number, first in enumerate(range(0, lines.features, PART)):
        part = slice(first, first + PART)
        columns = lines.numbers | {name: words.numbers(ids[part]) for name, ids in lines.ids.items()}
        for name, values in columns.items():
            shown = values[part] if name in lines.numbers else values
            write_value(numbered(folder, name, number), name, number, packed(shown))
    divided = {name: Divided(name, lambda number, name=name: numbered(folder, name, number)) for name in ("words", "said")}
    for number, shown in enumerate(["", *map(text, words.ids)]):
        divided["words"].add(number, script_json(shown))
    for feature in sorted(lines.said):
        divided["said"].add(feature, script_json([feature, shown_said(lines.said, feature)]))
    for files in divided.values():
        files.finish()
    return {"part": PART, "shown": SHOWN, **{name: files.firsts for name, files in divided.items()}}


class _Words:
    """Token ids by their number among those that are used, from 1, in the order in which they are met."""

    def __init__(self, largest: int):
        self.ids: list[int] = []
        self._number_V = np.zeros(largest + 2, np.int64)  # the last one, which -1 means, stays 0

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        used = np.unique(ids[ids >= 0])
        new = used[self._number_V[used] == 0]
        self._number_V[new] = len(self.ids) + 1 + np.arange(len(new))
        self.ids += new.tolist()
        return self._number_V[ids]
