"""How often a text names each concept, in one pass with bounded memory.

    frequency = occurrences between two blanks / tokens

The text is what the tokens stand for, hence exactly what the SAE was trained on: conversations and texts that are given as token
ids too, documents that are rows of their own only as far as the row goes. Tokens are all that the rows hold, with BOS and
separators, without what fills a row up.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saejax.base.errors import ConceptError
from saejax.base.logs import Progress
from saejax.base.storage import write_bytes
from saejax.data import sources as src
from saejax.data.packing import Packing
from saejax.data.sources import Sources
from saejax.data.text import Text
from saejax.data.token_store import TokenStore
from saejax.lm import Tokenizer
from saejax.scaling.concepts.lists import Concept
from saejax.scaling.concepts.matching import Matcher

_CONTEXTS = 1024  # read at once


@dataclass(frozen=True)
class Counts:
    """occurrences_C int64, in a text of `tokens` tokens."""

    concepts: tuple[Concept, ...]
    occurrences_C: np.ndarray
    tokens: int

    @property
    def frequency_C(self) -> np.ndarray:
        """float64 [C]: occurrences per token."""
        return self.occurrences_C / self.tokens

    @property
    def absent(self) -> list[str]:
        """Names of the concepts that the text does not have: no place on an axis of log frequency."""
        return [concept.name for concept, n in zip(self.concepts, self.occurrences_C, strict=True) if n == 0]

    def of(self, concepts: Sequence[Concept]) -> "Counts":
        """Those of some of the concepts."""
        place = {concept: i for i, concept in enumerate(self.concepts)}
        return Counts(tuple(concepts), self.occurrences_C[[place[concept] for concept in concepts]], self.tokens)

    def write(self, path: Path) -> None:
        """CSV: category, name, count, frequency. Raises `DiskError`."""
        out = io.StringIO()
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(("category", "name", "count", "frequency"))
        for concept, n, frequency in zip(self.concepts, self.occurrences_C, self.frequency_C, strict=True):
            lines.writerow((concept.category, concept.name, int(n), f"{frequency:.6g}"))
        write_bytes(path, out.getvalue().encode())


def count(concepts: Sequence[Concept], texts: Iterable[tuple[str, int]], *, total: int | None = None,
          progress: bool = True) -> Counts:
    """Counts of concepts in pieces of text with the number of their tokens (`documents`, `contexts`,
    `rows`). total: tokens, for the bar.

    Raises `ConceptError` where two concepts are spelled alike, and for a text without a token.
    """
    matcher, tokens = Matcher(concepts), 0
    occurrences_C = np.zeros(len(concepts), np.int64)
    with Progress("count concepts", total, enabled=progress) as bar:
        for text, n in texts:
            occurrences_C += matcher.count(text)
            tokens += n
            bar.advance(n)
    if tokens == 0:
        raise ConceptError("count concepts: the text has no tokens; give some")
    return Counts(tuple(concepts), occurrences_C, tokens)


def documents(text: Text, tokenizer: Tokenizer, *, split: str = "train", tokens: int | None = None,
              sources: Sources | None = None) -> Iterator[tuple[str, int]]:
    """(text, tokens) of the documents of a split in the order in which they are trained on, until there are `tokens` of them.

    Raises `TextError`.
    """
    packing, done = Packing(text.options, tokenizer, split), 0
    for batch in src.read(sources or src.resolve(text.options), text.seed):
        for ids in packing.pieces(batch):
            if ids is not None:
                ids = ids[:int(packing.masking.lengths(ids))]
                yield text_of(tokenizer.pieces(ids)), len(ids)
                done += len(ids)
            if tokens is not None and done >= tokens:
                return


def contexts(store: TokenStore, tokenizer: Tokenizer, *, tokens: int | None = None) -> Iterator[tuple[str, int]]:
    """(text, tokens) of the contexts of a token store: what has been tokenised once is not again. A name that is cut by the end
    of a context is not found.
    """
    last = store.contexts if tokens is None else min(store.contexts, -(-tokens // store.context))
    for start in range(0, last, _CONTEXTS):
        rows_NT = store.read(start, min(start + _CONTEXTS, last))
        for ids, length in zip(rows_NT, store.lengths(rows_NT), strict=True):
            yield text_of(tokenizer.pieces(ids[:length])), int(length)


def rows(contexts: Iterable[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """(text, tokens) of contexts (tokens [n, T], keep [n, T]) as `Corpus.make` gives them: of a store exactly what was harvested.
    What is behind the last unmasked token fills a row up, and is not read. A name that the end of a context cuts is not found.
    """
    for tokens_NT, keep_NT in contexts:
        lengths_N = np.where(keep_NT.any(1), keep_NT.shape[1] - keep_NT[:, ::-1].argmax(1), 0)
        for ids, length in zip(tokens_NT, lengths_N.tolist(), strict=True):
            yield text_of(tokenizer.pieces(ids[:length])), length


def text_of(pieces: Sequence[bytes]) -> str:
    """The text of neighbouring tokens; a byte that is no whole character is U+FFFD."""
    return b"".join(pieces).decode("utf-8", "replace")
