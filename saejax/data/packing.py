"""Documents -> rows of tokens: the rules, without a place in the text.

The tokens of the documents of a split, each document followed by the separator, are one long sequence (`parts` says of which
documents) that is cut into rows of exactly `context` tokens. A document may span rows; attention crosses the borders of the
documents in a row, as in the pre-training of most language models. Where BOS goes is `config.text.bos`: the first token of every
row ("row"), of every document ("doc"), or nowhere ("none"). A document may also be a conversation, which goes through the model's
chat template, or token ids; one that begins with BOS or ends with the separator already gets no second.

With `config.text.packing` = "document" each document is a row of its own instead, cut at `context`; a shorter one is filled up
behind its separator with pad tokens (EOS, where the tokenizer has none), so that no document sees another. These are never
trained on, measured or indexed, and no loss is counted at them; BOS stands at the beginning in either place.

A row's first token, and special ones, are masked (`config.text.mask`): `keep` is False there, for all that is trained, measured
or indexed. `Masking` finds them from the tokens alone.

A document is held out when the hash of its text falls below `holdout`: the split does not depend on order, source or
seed, and copies of a document are on the same side.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from saejax.base.errors import TextError
from saejax.base.keys import Keys
from saejax.config import TextOptions
from saejax.data.sources import Document
from saejax.lm import Tokenizer

VERSION = 1  # of the rules: raised with every change of the rows that they give


def is_held_out(text: Document, holdout: float) -> bool:
    """blake2b(text) / 2^64 < holdout. Of conversations and token ids the text is their JSON."""
    text = text if isinstance(text, str) else json.dumps(text)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < holdout


@dataclass(frozen=True)
class Masking:
    """Which tokens of a row are masked. `special`: ids that are, everywhere. `first`: the first token of a row is. `pad`: what
    fills a row up, None where every row is full. `closed`: documents end with the pad token, which then is text.
    """

    special: tuple[int, ...]
    first: bool
    pad: int | None
    closed: bool

    def keep(self, tokens: np.ndarray) -> np.ndarray:
        """bool [..., T] of rows [..., T]: False at the first token and at special ones where these are masked, and behind the end
        of a document that is a row of its own.
        """
        keep = ~np.isin(tokens, np.array(self.special, np.int32))
        keep[..., :self.first] = False
        return keep & (np.arange(tokens.shape[-1]) < self.lengths(tokens)[..., None])

    def lengths(self, tokens: np.ndarray) -> np.ndarray:
        """int [...] of rows [..., T]: the tokens that are text; the others fill the row up."""
        room = tokens.shape[-1]
        if self.pad is None:
            return np.full(tokens.shape[:-1], room)
        filled = np.cumprod(tokens[..., ::-1] == self.pad, axis=-1).sum(-1)
        return room - np.maximum(filled - self.closed, 0)  # the first may be the separator

    def to_json(self) -> dict:
        return asdict(self) | {"special": list(self.special)}

    @classmethod
    def of_json(cls, keys: Keys) -> "Masking":
        """What `to_json` gave."""
        special = keys.checked("special", (), lambda ids: all(type(i) is int for i in ids), "not a list of token ids", [])
        found = cls(tuple(special), keys.get("first", bool), keys.count("pad", None), keys.get("closed", bool))
        keys.refuse_unread()
        return found


class Packing:
    """How the documents of a split become rows of tokens. It keeps no state: a sequence of documents gives the `pieces` that, one
    behind the other, are cut into `payload` tokens for a row.

    Raises `TextError`: no BOS, EOS or pad token where one is asked for, no held-out part.
    """

    def __init__(self, options: TextOptions, tokenizer: Tokenizer, split: str = "train"):
        if split == "heldout" and options.holdout == 0:
            raise TextError("config.text.holdout: 0 keeps no document for evaluation; set it to 0.02, for example")
        bos, place = _ids_of(tokenizer, options.bos, options.bos_token, tokenizer.bos_id, "bos"), options.bos_place
        plain = options.separator in ("eos", "none")
        self._after = _ids_of(tokenizer, options.separator, None if plain else options.separator, tokenizer.separator_id,
                              "separator")
        alone = options.packing == "document"
        self._row = bos if place == "row" and not alone else []
        self._before = bos if place == "doc" or alone else []
        self._pad = _pad_of(tokenizer) if alone else None
        self._options, self._tokenizer = options, tokenizer
        self.split, self.context, self.payload = split, options.context, options.context - len(self._row)
        self.masking = Masking(tuple(sorted(tokenizer.special_ids)) if "special" in options.mask else (),
                               "first" in options.mask, self._pad, self._after == [self._pad])

    def pieces(self, documents: Sequence[Document | None]) -> list[np.ndarray | None]:
        """The int32 tokens of each document with what goes around it; a whole row of them where a document is one. None for a
        document that is empty or of the other split: it is not tokenised.
        """
        holdout, heldout = self._options.holdout, self.split == "heldout"
        mine = [i for i, text in enumerate(documents) if text and is_held_out(text, holdout) == heldout]
        out: list[np.ndarray | None] = [None] * len(documents)
        for i, ids in zip(mine, self._encode([documents[i] for i in mine]), strict=True):
            if len(ids):
                before = self._before if ids[0] not in self._before else []
                after = self._after if ids[-1] not in self._after else []
                out[i] = self._piece(np.concatenate([np.array(part, np.int32) for part in (before, ids, after)]))
        return out

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """int32 [N, context] of N x `payload` tokens."""
        n = len(tokens) // self.payload
        out = np.empty((n, self.context), np.int32)
        out[:, :len(self._row)] = self._row
        out[:, len(self._row):] = tokens.reshape(n, self.payload)
        return out

    def _piece(self, ids: np.ndarray) -> np.ndarray:
        if self._pad is None:
            return ids
        row = np.full(self.context, self._pad, np.int32)
        row[:len(ids)] = ids[:len(row)]
        return row

    def _encode(self, documents: list[Document]) -> list[Sequence[int]]:
        """Token ids of documents: of texts, of conversations through the chat template, and those that are ids already."""
        texts = [d for d in documents if isinstance(d, str)]
        of_texts = iter(self._tokenizer.encode_batch(texts, special=self._options.special))
        return [next(of_texts) if isinstance(d, str) else self._tokenizer.chat(d, answer=False) if isinstance(d[0], dict)
                else self._checked(d) for d in documents]

    def _checked(self, ids: list[int]) -> list[int]:
        least, most = min(ids), max(ids)
        if least < 0 or most >= self._tokenizer.vocab_size:
            raise TextError(f"config.text.field: token id {least if least < 0 else most}: the tokenizer has ids 0 to "
                            f"{self._tokenizer.vocab_size - 1}; give ids of this model's tokenizer, or the text")
        return self._tokenizer.with_rows(ids)


def _ids_of(tokenizer: Tokenizer, option: str, text: str | None, own: int | None, key: str) -> list[int]:
    """The token that an option stands for: none, the tokenizer's own, or the one with this text. Raises `TextError`."""
    if option == "none":
        return []
    found = own if text is None else tokenizer.id_of(text)
    if found is None:
        what = f"{text!r} is no token of this tokenizer" if text is not None else "the tokenizer has no such token"
        raise TextError(f"config.text.{key}: {what}; set config.text.{key}='none', or give the text of a token")
    return tokenizer.with_rows([found])


def _pad_of(tokenizer: Tokenizer) -> int:
    """The token that fills a row up. Raises `TextError` where there is none."""
    found = tokenizer.pad_id if tokenizer.pad_id is not None else tokenizer.separator_id
    if found is None:
        raise TextError("config.text.packing: 'document' fills rows up, and the tokenizer has neither a pad token nor EOS; set "
                        "it to 'packed'")
    return tokenizer.with_rows([found])[0]
