"""Documents -> rows of tokens.

The tokens of all documents of a split, each document followed by the separator, are one long sequence that is cut into
rows of exactly `context` tokens. A document may span rows; attention crosses the borders of the documents in a row, as
in the pre-training of most language models. Where BOS goes is `config.text.bos`: the first token of every row ("row"),
of every document ("doc"), or nowhere ("none"). A document may also be a conversation, which goes through the model's
chat template, or token ids; one that begins with BOS or ends with the separator already gets no second. What is left at
the end and does not fill a row is dropped and counted.

With `config.text.packing` = "document" each document is a row of its own instead, cut at `context`; a shorter one is filled up
behind its separator with pad tokens (EOS, where the tokenizer has none), so that no document sees another. These are never
trained on, measured or indexed, and no loss is counted at them; BOS stands at the beginning in either place.

A row's first token, and special ones, are masked (`config.text.mask`): `keep` is False there, for all that is trained, measured
or indexed.

A document is held out when the hash of its text falls below `holdout`: the split does not depend on order, source or
seed, and copies of a document are on the same side.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from saejax.base.errors import TextError
from saejax.base.records import TokenBatch
from saejax.config import Config, TextOptions
from saejax.data import sources as src
from saejax.data.packing import Packing
from saejax.data.sources import Reader, Sources
from saejax.lm import Tokenizer


@dataclass(frozen=True)
class TextState:
    """Where packing stands: `contexts` rows are out, and the next token is number `offset` of document `documents`.

    Documents are counted in the shuffled order before the split; `offset` counts BOS and separator.
    """

    documents: int = 0
    offset: int = 0
    contexts: int = 0

    def to_json(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Text:
    """A text and how it becomes rows of tokens."""

    options: TextOptions
    seed: int = 0

    @classmethod
    def of(cls, config: Config) -> "Text":
        """The text of a config, as it was harvested."""
        return cls(config.text, config.seed_of_data)

    def __repr__(self) -> str:
        o = self.options
        return f"Text({', '.join(o.source)}, {o.split}, contexts of {o.context} tokens)"[:150]


def describe(options: TextOptions, sources: Sources, seed: int) -> dict:
    """What decides the token rows, as plain JSON for a manifest; no paths."""
    return {"sources": sources.names, "digest": sources.digest, "field": options.field, "split": options.split,
            "streaming": options.streaming, "shuffle": options.shuffle, "seed": seed, "bos": options.bos,
            "separator": options.separator, "holdout": options.holdout, "special": options.special,
            "mask": sorted(options.mask), **({"packing": options.packing} if options.packing != "packed" else {}),
            **({"revisions": sources.revisions} if sources.revisions else {})}


class PackedText:
    """The rows of one split, packed or a document each, taken in order from any `TextState`.

    Raises `TextError`: nothing in the split, less than one row of tokens, no BOS, EOS or pad token where one is asked for, a
    text that cannot be read or is not the one of the `TextState`.
    """

    def __init__(self, options: TextOptions, tokenizer: Tokenizer, *, seed: int, split: str = "train",
                 sources: Sources | None = None, start: TextState | None = None):
        self._packing = Packing(options, tokenizer, split)
        self._options, self._split = options, split
        self._sources = sources or src.resolve(options)
        self._reader = Reader(self._sources, seed)
        start = start or TextState()
        self._restart(start, start.documents)

    def seek(self, state: TextState) -> None:
        """Goes on from `state`. Forward, nothing is read or tokenised twice; documents left out are not tokenised."""
        forward = (state.documents, state.offset) >= (self.state.documents, self.state.offset)
        at = int(np.searchsorted(self._numbers, state.documents))
        if forward and at < len(self._numbers):
            n = int(self._begins[at]) + state.offset
            if n < self._ends[at] and (self._numbers[at] == state.documents or not state.offset):
                self._drop(n)
                self.state, self.dropped_tokens = state, 0
                return
        # Read documents that gave no token, empty or of the other split, need no second look.
        silent = forward and at == len(self._numbers) and not state.offset
        self._restart(state, max(state.documents, self._reader.position) if silent else state.documents)

    def _restart(self, state: TextState, document: int) -> None:
        self.state, self.dropped_tokens = state, 0
        self._reader.seek(document)
        self._skip = state.offset
        self._tokens = np.empty(0, np.int32)
        self._numbers = np.empty(0, np.int64)   # number of each buffered document
        self._ends = np.empty(0, np.int64)      # where it ends in the buffer
        self._begins = np.empty(0, np.int64)    # where its first token is or would be
        self._ended = self._seen = False

    def take(self, n: int) -> np.ndarray:
        """The next `n` rows, int32 [n, context]; fewer where the text ends, none behind it."""
        payload = self._packing.payload
        while len(self._tokens) < n * payload and not self._ended:
            self._refill(n * payload)
        rows = min(n, len(self._tokens) // payload)
        if self._ended and rows < n:
            self.dropped_tokens = len(self._tokens) - rows * payload
            self._refuse_nothing(rows)
        out = self._packing.rows(self._tokens[:rows * payload])
        self._consume(rows * payload, rows)
        return out

    def keep(self, tokens: np.ndarray) -> np.ndarray:
        """bool [..., T] of rows [..., T]: False at the first token and at special ones where these are masked, and behind the end
        of a document that is a row of its own.
        """
        return self._packing.masking.keep(tokens)

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """int [...] of rows [..., T]: the tokens that are text; the others fill the row up."""
        return self._packing.masking.lengths(tokens)

    def _refuse_nothing(self, rows: int) -> None:
        if self.state.contexts or rows:
            return
        where = f"config.text.source: {', '.join(self._sources.names)}"
        if self._reader.position == 0:
            raise TextError(f"{where}: no documents")
        if not self._seen:
            raise TextError(f"{where}: none of {self._reader.position} documents has text in the {self._split!r} split; "
                            f"change config.text.holdout = {self._options.holdout} or add documents (one text file is "
                            "one document)")
        there = len(self._tokens) + self._packing.context - self._packing.payload
        raise TextError(f"{where}: the {self._split!r} split has {there} tokens, one context needs {self._options.context}; add "
                        "text or lower config.text.context")

    def _refill(self, wanted: int) -> None:
        """Tokenises batches of documents until `wanted` tokens are buffered or the text ends."""
        pieces, numbers = [], []
        have = len(self._tokens)
        while have < wanted:
            batch = self._reader.next_batch()
            if batch is None:
                self._ended = True
                break
            first = self._reader.position - len(batch)
            found = [(first + i, piece) for i, piece in enumerate(self._packing.pieces(batch)) if piece is not None]
            numbers += [number for number, _ in found]
            pieces += [piece for _, piece in found]
            have += sum(len(piece) for _, piece in found)
        if pieces:
            self._append(pieces, np.array(numbers, np.int64))

    def _append(self, pieces: list[np.ndarray], numbers: np.ndarray) -> None:
        self._seen = True
        ends = len(self._tokens) + np.cumsum([len(p) for p in pieces])
        begins = ends - [len(p) for p in pieces]
        tokens = np.concatenate([self._tokens, *pieces])
        if self._skip:
            if numbers[0] != self.state.documents or self._skip > len(pieces[0]):
                raise TextError("config.text.source: the text is not the one that this harvest began with")
            tokens, ends, begins, self._skip = tokens[self._skip:], ends - self._skip, begins - self._skip, 0
        self._tokens = tokens
        self._numbers = np.concatenate([self._numbers, numbers])
        self._ends = np.concatenate([self._ends, ends])
        self._begins = np.concatenate([self._begins, begins])

    def _consume(self, n: int, rows: int) -> None:
        if rows == 0:
            return
        done = int(np.searchsorted(self._ends, n, side="right"))
        contexts = self.state.contexts + rows
        if done < len(self._ends):
            self.state = TextState(int(self._numbers[done]), int(n - self._begins[done]), contexts)
        else:
            self.state = TextState(self._reader.position, 0, contexts)
        self._drop(n)

    def _drop(self, n: int) -> None:
        """Drops the first n buffered tokens and the documents that end there."""
        done = int(np.searchsorted(self._ends, n, side="right"))
        self._tokens = self._tokens[n:]
        self._numbers, self._ends, self._begins = self._numbers[done:], self._ends[done:] - n, self._begins[done:] - n


def token_batches(options: TextOptions, tokenizer: Tokenizer, batch: int, *, seed: int, split: str = "train",
                  max_contexts: int | None = None, sources: Sources | None = None) -> Iterator[TokenBatch]:
    """Batches of `batch` rows (the last may be shorter), at most `max_contexts` rows in all. Raises `TextError`."""
    text = PackedText(options, tokenizer, seed=seed, split=split, sources=sources)
    left = max_contexts if max_contexts is not None else 2**62
    while left > 0:
        first, asked = text.state.contexts, min(batch, left)
        tokens_BT = text.take(asked)
        if len(tokens_BT):
            yield TokenBatch(tokens_BT, text.keep(tokens_BT), np.arange(first, first + len(tokens_BT), dtype=np.int64),
                             text.lengths(tokens_BT))
        left -= len(tokens_BT)
        if len(tokens_BT) < asked:
            return
