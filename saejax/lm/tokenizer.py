"""A small face for a fast tokenizer, the same whether it came from a Hugging Face directory or from a GGUF file."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from saejax.base.errors import TokenizerError
from saejax.lm.gguf_file import GGUFFile
from saejax.lm.long_text import LONG, ids_of
from saejax.lm.token_text import TokenBytes, joined, text_of, token_bytes

# GGUF pre-tokenizers that transformers leaves at GPT-2's split: rightly for the first set; for the second every digit
# must be split off first, which shows on "  1". Its own table covers the others.
_GPT2_SPLITS = frozenset({"gpt-2", "olmo"})
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact"})

# Tokens that end a turn of a conversation, which instruction-tuned models call their EOS -> what ends a document in pre-training.
_DOCUMENT_ENDS = {"<|im_end|>": "<|endoftext|>", "<|end|>": "<|endoftext|>", "<|eot_id|>": "<|end_of_text|>"}

# transformers advises on import to install torch, which saejax does not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Ids of special tokens are None when the model has none; 0 is an id like any other.

    rows: of the model's embedding, where they are known; a text that gives a token without one raises `TokenizerError`.
    """

    backend: Backend = field(repr=False)
    special_ids: frozenset[int] = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None = field(default=None, repr=False)
    special_tokens: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False, hash=False)
    rows: int | None = field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def separator_id(self) -> int | None:
        """The token that ends a document in pre-training: EOS, or where that ends a turn of a conversation (`<|im_end|>`), the
        one that the same tokenizer has for documents (`<|endoftext|>`).
        """
        end = _DOCUMENT_ENDS.get(self.backend.id_to_token(self.eos_id) or "") if self.eos_id is not None else None
        index = self.backend.token_to_id(end) if end else None
        return self.eos_id if index is None or index not in self.special_ids else index

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, special tokens that it spells among them; adds no BOS or EOS."""
        return self.with_rows(self.backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[Sequence[int]]:
        """Token ids of many texts, in parallel threads; adds no BOS or EOS. special: strings that spell a special token are that
        token; without it they are text like any other. A text of any length, in bounded memory but for the ids.
        """
        backend = self.backend if special else self._plain
        short = iter(backend.encode_batch_fast([text for text in texts if len(text) <= LONG], add_special_tokens=False))
        return [self.with_rows(next(short).ids if len(text) <= LONG else ids_of(backend, text)) for text in texts]

    @cached_property
    def _plain(self) -> Backend:
        """The tokenizer that knows no special token in a text, neither as an added token nor as a word or a piece."""
        rules = json.loads(self.backend.to_str())
        model, added = rules["model"], rules["added_tokens"]
        special = {token["content"]: token["id"] for token in added if token["special"] or token["id"] in self.special_ids}
        rules["added_tokens"] = [token for token in added if token["content"] not in special]
        if model["type"] == "Unigram":
            for word, i in special.items():
                if i < len(model["vocab"]) and i != model["unk_id"] and model["vocab"][i][0] == word:
                    model["vocab"][i][0] = f"\0{i}"
        elif model["type"] != "BPE":  # which makes words from letters
            model["vocab"] = {f"\0{i}" if word in special and word != model["unk_token"] else word: i
                              for word, i in model["vocab"].items()}
        return Backend.from_str(json.dumps(rules | {"post_processor": None}))

    @cached_property
    def _beyond(self) -> bool:
        return self.rows is not None and self.vocab_size > self.rows

    def with_rows(self, ids: Sequence[int]) -> Sequence[int]:
        """The same ids, or `TokenizerError` for one that the model has no embedding of."""
        if self._beyond and len(ids) and max(ids) >= self.rows:
            raise TokenizerError(f"the text gives token id {max(ids)} ({self.token(max(ids))!r}), but the model's embedding has "
                                 f"rows 0 to {self.rows - 1}: leave it out, or use the tokenizer that belongs to the model")
        return ids

    def known(self, rows: int) -> list[bool]:
        """Of each of `rows` ids, whether there is such a token: models have rows beyond their tokenizer."""
        there = set(self.backend.get_vocab(with_added_tokens=True).values())
        return [i in there for i in range(rows)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens written out, as the tokenizer's own decoder gives it."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes that each token puts into a text."""
        return token_bytes(self.backend)

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each id, none where there is no such token."""
        every = self.token_bytes.pieces
        return [every[i] if 0 <= i < len(every) else b"" for i in map(int, ids)]

    def token(self, i: int) -> str:
        """Text of one token by itself; a byte that is no whole character is `<0xF0>`."""
        return text_of(self.pieces([i])[0])

    def id_of(self, text: str) -> int | None:
        """The token with exactly this text, else the one that the text becomes but for blanks at its ends; None: there is none.
        Where tokenizers put a blank before every text, "king" is the end of a word, if there is such a token, and " king" a word.
        """
        ids, wanted = self.encode(text), text.encode("utf-8", "surrogatepass")
        alone = self.pieces(ids)[0] if len(ids) == 1 else None
        if alone != wanted and wanted in self.token_bytes.pieces:
            return self.token_bytes.pieces.index(wanted)
        return ids[0] if alone is not None and alone.strip() == wanted.strip() else None

    def token_strings(self, ids: Iterable[int], *, begins: bool = True) -> list[str]:
        """Text of each id among its neighbours: together they are the text (see `token_text.joined`).

        begins: the ids are a text from its beginning, so that the blank goes which some tokenizers put there. Special tokens
        before it do not count.
        """
        ids = [int(i) for i in ids]
        texts, begin = joined(self.pieces(ids))[0], self.token_bytes.begin
        first = next((n for n, i in enumerate(ids) if i not in self.special_ids), None)
        if begins and begin and first is not None:
            texts[first] = texts[first].removeprefix(begin)
        return texts

    def chat(self, messages: Sequence[Mapping[str, str]], *, answer: bool = True) -> list[int]:
        """Token ids of a conversation in the model's own chat template; `answer` opens the assistant's turn.

        `messages` are `{"role": ..., "content": ...}`. The template runs in jinja's sandbox. Raises TokenizerError for a
        model without a template and for a conversation that its template refuses.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if self.chat_template is None:
            raise TokenizerError("this tokenizer has no chat template: encode plain text, or use an instruction-tuned model")
        try:
            rendered, _ = render_jinja_template(
                [[dict(message) for message in messages]],
                chat_template=self.chat_template,
                add_generation_prompt=answer,
                **self.special_tokens,
            )
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise TokenizerError(f"the chat template refuses this conversation ({' '.join(str(error).split())[:200]})") from None
        return self.encode(rendered[0])

    @cached_property
    def digest(self) -> str:
        """sha256 of the rules and vocabulary, of the ids of BOS, EOS, pad and all special tokens, and of the chat template."""
        rest = [self.bos_id, self.eos_id, self.pad_id, sorted(self.special_ids), self.chat_template]
        return hashlib.sha256(f"{self.backend.to_str()}\n{json.dumps(rest)}".encode()).hexdigest()


def from_pretrained(folder: Path) -> Tokenizer:
    """Tokenizer of a Hugging Face directory. Raises TokenizerError when there is no fast one."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # transformers and what it calls raise many classes
        raise TokenizerError(f"{folder}: no usable tokenizer ({' '.join(str(error).split())[:200]})") from None
    backend = getattr(found, "backend_tokenizer", None)
    if backend is None:
        raise TokenizerError(f"{folder}: {type(found).__name__} has no fast version: convert it to tokenizer.json")
    template = found.chat_template if isinstance(found.chat_template, str) else None
    return _wrap(backend, found.bos_token_id, found.eos_token_id, found.pad_token_id, template)


def from_gguf(file: GGUFFile) -> Tokenizer:
    """Tokenizer stored in a GGUF file. Raises TokenizerError for a kind that cannot be rebuilt without guessing."""
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    found = {ours: file.field(f"tokenizer.{key}") for key, ours in GGUF_TOKENIZER_MAPPING["tokenizer"].items()}
    found = {key: value for key, value in found.items() if value is not None}
    if "tokens" not in found:
        raise TokenizerError(f"{file.path}: no tokenizer.ggml.tokens: use a GGUF file that holds its tokenizer")
    pre = found.get("pre_tokenizer_type")
    if found.get("tokenizer_type") == "gpt2" and not _known_split(pre):
        raise TokenizerError(
            f"{file.path}: tokenizer.ggml.pre={pre!r} is not known: load the Hugging Face directory instead"
        )
    try:
        backend, _ = convert_gguf_tokenizer(file.field("general.architecture"), found)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{file.path}: the GGUF tokenizer cannot be rebuilt ({reason})") from None
    if pre in _DIGIT_SPLITS:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    return _wrap(backend, found.get("bos_token_id"), found.get("eos_token_id"), found.get("pad_token_id"),
                 file.field("tokenizer.chat_template"))


def _known_split(pre: str | None) -> bool:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    return pre in _GPT2_SPLITS | _DIGIT_SPLITS | GGUF_PRE_TOKENIZER_SPLITS.keys()


def _wrap(
    backend: Backend, bos_id: int | None, eos_id: int | None, pad_id: int | None, chat_template: str | None = None
) -> Tokenizer:
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    known = {"bos": bos_id, "eos": eos_id, "pad": pad_id}
    special |= {i for i in known.values() if i is not None}
    # Templates name these by their text.
    words = {f"{name}_token": backend.id_to_token(i) for name, i in known.items() if i is not None}
    return Tokenizer(backend, frozenset(special), bos_id, eos_id, pad_id, chat_template, words)
