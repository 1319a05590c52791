"""Everything that the page of each feature shows, in files that hold as many features as fit.

    features/0000/000000.js     a list of features; each brings the words that those before it in the file do not have
    features/0000/firsts.js     with which feature each file of the folder begins
"""

import functools
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from saejax.base.text import script_json, visible
from saejax.features.index.reader import EXAMPLES, FeatureIndex
from saejax.pages.dashboard_list import shown_said
from saejax.pages.dashboard_relatives import Relatives
from saejax.pages.data_files import Divided, write_value

FILES_PER_FOLDER = 256


class FeatureFiles:
    """Writes features in their order."""

    def __init__(self, folder: Path, index: FeatureIndex, first_F: np.ndarray, said: Mapping[int, str],
                 relatives: Relatives | None = None):
        """first_F: the token that each feature fires on most, -1 for none. relatives: those in other dictionaries."""
        self._folder, self._index, self._first_F, self._said = folder / "features", index, first_F, said
        self._relatives = relatives
        self._files = Divided("features", lambda number: self._place(number) / f"{number:06d}.js")
        self._words: dict[str, int] = {}
        self.visible = functools.lru_cache(1 << 18)(visible)  # the same tokens come again and again

    def _place(self, number: int) -> Path:
        return self._folder / f"{number // FILES_PER_FOLDER:04d}"

    def write(self, first: int, last: int) -> None:
        """Adds features first .. last - 1."""
        examples = _examples(self._index, first, last)
        for row in self._index.rows(first, last):
            text = self._text(row, examples[row["feature"]])
            if not self._files.fits(text):
                self._files.finish()
                self._words = {}
                text = self._text(row, examples[row["feature"]])
            self._files.add(row["feature"], text)

    def finish(self) -> dict:
        """Writes the rest; returns what the page must know of how they are divided: the first feature of each folder."""
        self._files.finish()
        firsts = self._files.firsts
        for folder, begin in enumerate(range(0, len(firsts), FILES_PER_FOLDER)):
            write_value(self._place(begin) / "firsts.js", "firsts", folder, firsts[begin:begin + FILES_PER_FOLDER])
        return {"folders": firsts[::FILES_PER_FOLDER], "per_folder": FILES_PER_FOLDER}

    def token(self, number: int) -> str:
        """The text of a token id, safe to look at."""
        return self.visible(self._index.token(number)) or "\u2205"  # a token of no characters

    def _numbers(self, shown: Iterable[str]) -> list[int]:
        """Of texts among the words of the file."""
        words = self._words
        return [words.setdefault(text, len(words)) for text in shown]

    def _text(self, row: dict, examples: list) -> str:
        known, value = len(self._words), self._value(row)
        if examples:
            value["examples"] = [[*e, self._numbers(map(self.visible, texts)), acts] for *e, texts, acts in examples]
        family = self._relatives.of(row["feature"]) if self._relatives else []
        if family:
            value["family"] = [[*numbers, *self._numbers(texts)] for numbers, texts in family]
        return script_json(value | {"words": list(itertools.islice(self._words, known, None))})

    def _value(self, row: dict) -> dict:
        def near(name: str, *more: str) -> list:
            return [[i, self._label(i), *short(rest, 3)]
                    for i, *rest in zip(row[f"{name}_ids"], row[f"{name}_scores"], *(row[m] for m in more), strict=True)]

        def tokens(name: str, *more: str) -> list:
            words = self._numbers(map(self.token, row[name]))
            return [[word, *short(rest, 3)] for word, *rest in zip(words, *(row[m] for m in more), strict=True)]

        logits = tokens("logit_ids", "logit_effects")
        half = len(logits) // 2
        value = {"id": row["feature"], "said": shown_said(self._said, row["feature"]),
                 **_numbers_of(row, "fired", "density", "mean", "max", "decoder_norm", "encoder_norm", "bias"),
                 "up": logits[:half], "down": logits[half:], "cosine": near("cosine")}
        if not row["fired"]:  # its page has neither charts nor examples
            return value
        return value | _numbers_of(row, "linear_width") | {
            "linear": row["linear_counts"], "log": row["log_counts"], "log_edges": short(row["log_edges"]),
            "interval_counts": short(row["interval_counts"], 3), "tokens": tokens("token_ids", "token_shares", "token_means"),
            "firing": near("firing", "firing_support")}

    def _label(self, feature: int) -> str:
        return self.token(int(self._first_F[feature])) if self._first_F[feature] >= 0 else ""


def _numbers_of(row: dict, *names: str) -> dict:
    return dict(zip(names, short([row[name] for name in names]), strict=True))


def short(values, digits: int = 5) -> list:
    """Numbers of so many digits; whole ones as they are."""
    return [int(v) if float(v).is_integer() and abs(v) < 2**53 else float(f"{v:.{digits}g}") for v in values]


def _examples(index: FeatureIndex, first: int, last: int) -> dict[int, list]:
    """By feature: [interval, value, context, position, start, texts, [offset, activation, ...]] of every example."""
    table = index.table(EXAMPLES, first, last)
    columns = [table[name].to_numpy().tolist() for name in ("feature", "interval", "value", "context", "position", "start")]
    acts_EW = table["acts"].combine_chunks().flatten().to_numpy().reshape(-1, index.window)
    out: dict[int, list] = {feature: [] for feature in range(first, last)}
    for feature, interval, value, context, position, start, acts_W in zip(*columns, acts_EW, strict=True):
        texts, shown, _ = index.shown(context, start, acts_W)
        acts = [x for offset, act in enumerate(shown) if act > 0 for x in (offset, float(f"{act:.4g}"))]
        out[feature].append([interval, float(f"{value:.4g}"), context, position, start, texts, acts])
    return out
