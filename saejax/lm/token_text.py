"""What a token stands for: the bytes that it puts into a text, and how tokens side by side read.

The bytes are those of the tokenizer's decoder, followed step by step for one token; only what a decoder does to the beginning of
a whole text (the blank that sentencepiece puts there) is left to `begin`. A token may hold a part of a character.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256, 257, ... in order."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


_BYTE_LEVEL = _byte_level()


@dataclass(frozen=True)
class TokenBytes:
    """`pieces[id]`: the bytes of a token, empty for an id that there is none of. begin: what the decoder takes away from the
    beginning of a whole text, once.
    """

    pieces: list[bytes]
    begin: str = ""


def token_bytes(backend: Backend) -> TokenBytes:
    """The bytes of every token. Added tokens are their own text, whatever the decoder would make of it.

    Decoders followed: ByteLevel, Metaspace, and Replace, ByteFallback, Fuse and Strip in a sequence. Of any other (WordPiece) a
    token is what a second one adds to the decoded text. Without a decoder it is what undoes the
    splitting, or its word, behind a blank where blanks between words are dropped.
    """
    words = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    added = backend.get_added_tokens_decoder()
    rules = json.loads(backend.to_str())
    decoder = rules["decoder"] or _of_words(rules["pre_tokenizer"])
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    followed = all(map(_known, steps))
    pieces = [b""] * (max(words, default=-1) + 1)
    for i, word in words.items():
        if i in added:
            text = added[i].content
            pieces[i] = (text if added[i].special or not followed else _replaced(steps, text)).encode("utf-8", "surrogatepass")
        else:
            pieces[i] = _piece(steps, word) if followed else _difference(backend, i).encode()
    return TokenBytes(pieces, _begin(steps) if followed else " ")


def _of_words(splitting: dict | None) -> dict:
    """What stands for the decoder of a tokenizer without one: it undoes what splits the text."""
    steps = (splitting or {}).get("pretokenizers", [splitting])
    undone = next((step for step in steps if step and step["type"] in ("ByteLevel", "Metaspace")), None)
    if undone:
        return undone
    names = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
    drops = any(step and (step["type"] in names or step.get("behavior") == "Removed") for step in steps)
    return {"type": "Words"} if drops else {"type": "Fuse"}


def _known(step: dict) -> bool:
    return step["type"] in ("ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip") or \
        step["type"] == "Replace" and "String" in step["pattern"]


def _begin(steps: list[dict]) -> str:
    """The characters that go at the beginning of a whole text."""
    for step, before in zip(steps, [None, *steps], strict=False):
        if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
            return " "
        if step["type"] == "Strip" and before and before["type"] == "Fuse":
            return step["content"] * step["start"]
    return ""


def _replaced(steps: list[dict], text: str) -> str:
    for step in steps:
        if step["type"] == "Replace":
            text = text.replace(step["pattern"]["String"], step["content"])
        if step["type"] == "Metaspace":
            text = text.replace(step["replacement"], " ")
    return text


def _piece(steps: list[dict], word: str) -> bytes:
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        if all(c in _BYTE_LEVEL for c in word):
            return bytes(_BYTE_LEVEL[c] for c in word)
        return word.encode("utf-8", "surrogatepass")
    if "ByteFallback" in kinds and (found := _BYTE.fullmatch(word)):
        return bytes([int(found[1], 16)])
    text = _replaced(steps, word)
    if "Strip" in kinds and "Fuse" not in kinds[:kinds.index("Strip")]:  # of every token
        step = steps[kinds.index("Strip")]
        for _ in range(step["start"]):
            text = text.removeprefix(step["content"])
        for _ in range(step["stop"]):
            text = text.removesuffix(step["content"])
    return text.encode("utf-8", "surrogatepass")


def _difference(backend: Backend, i: int) -> str:
    once, twice = (backend.decode([i] * n, skip_special_tokens=False) for n in (1, 2))
    return twice[len(once):]


def text_of(piece: bytes) -> str:
    """The text of one token by itself; a byte that belongs to no whole character is written `<0xF0>`."""
    return joined([piece])[0][0]


def joined(pieces: Sequence[bytes]) -> tuple[list[str], list[int]]:
    """(text of each token, the token that shows it) of neighbours: together the texts are the text of all.

    A character that several tokens make is the text of the first of them; one that has nothing else to show is empty, and is
    shown by the token with the character. A byte that belongs to no whole character is written `<0xF0>`.
    """
    try:
        return [piece.decode() for piece in pieces], list(range(len(pieces)))
    except UnicodeDecodeError:
        pass
    data = b"".join(pieces)
    owner = [n for n, piece in enumerate(pieces) for _ in piece]
    texts, shown_by = [""] * len(pieces), list(range(len(pieces)))
    at = 0
    while at < len(data):
        size = _character(data, at)
        texts[owner[at]] += data[at:at + size].decode() if size else f"<0x{data[at]:02X}>"
        for n in owner[at + 1:at + size]:
            shown_by[n] = owner[at]
        at += size or 1
    return texts, [n if texts[n] else first for n, first in enumerate(shown_by)]


def _character(data: bytes, at: int) -> int:
    """Bytes of the character that begins there; 0 where none does."""
    size = next((n for n, low, high in ((1, 0, 0x7F), (2, 0xC2, 0xDF), (3, 0xE0, 0xEF), (4, 0xF0, 0xF4))
                 if low <= data[at] <= high), 0)
    try:
        data[at:at + size].decode()
    except UnicodeDecodeError:
        return 0
    return size if at + size <= len(data) else 0
