"""A small face for a fast tokenizer, the same whether it came from a Hugging Face directory or from a GGUF file."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from saejax.base.errors import TokenizerError
from saejax.lm.gguf_file import GGUFFile

# GGUF pre-tokenizers that transformers leaves at GPT-2's split: rightly for the first set; for the second every digit
# must be split off first, which shows on "  1". Its own table covers the others.
_GPT2_SPLITS = frozenset({"gpt-2", "olmo"})
_DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact"})

# Placeholder that Gemma 3 gives one id beyond the text-only models' vocabulary; only its image processor writes it.
_IMAGE_TOKEN = "<image_soft_token>"

# transformers advises on import to install torch, which saejax does not need.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Ids of special tokens are None when the model has none; 0 is an id like any other."""

    backend: Backend = field(repr=False)
    special_ids: frozenset[int] = field(repr=False)
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    chat_template: str | None = field(default=None, repr=False)
    special_tokens: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False, hash=False)

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included: one more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; adds no BOS or EOS."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in parallel threads; adds no BOS or EOS."""
        return [item.ids for item in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, special tokens written out."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Text of each id by itself; bytes that are not whole characters show as U+FFFD."""
        return [self.decode([i]) for i in ids]

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
        """sha256 of the tokenizer's serialised rules and vocabulary."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises TokenizerError when the tokenizer can produce an id that the model has no embedding for."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"tokenizer has ids up to {tokenizer.vocab_size - 1} but the model's vocab_size is "
            f"{vocab_size}: use the tokenizer that belongs to the model"
        )


def without_image_token(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer without Gemma 3's image placeholder where the model has no embedding for it, else unchanged.

    The tokenizers of Gemma 3 270M and 1B have it although these models read text only
    (https://github.com/huggingface/transformers/issues/37011). Text that spells it is then encoded like other text.
    """
    index = tokenizer.backend.token_to_id(_IMAGE_TOKEN)
    if index is None or index < vocab_size:
        return tokenizer
    rules = json.loads(tokenizer.backend.to_str())
    rules["added_tokens"] = [token for token in rules["added_tokens"] if token["content"] != _IMAGE_TOKEN]
    backend = Backend.from_str(json.dumps(rules))
    return replace(tokenizer, backend=backend, special_ids=tokenizer.special_ids - {index})


def from_pretrained(folder: Path) -> Tokenizer:
    """Tokenizer of a Hugging Face directory. Raises TokenizerError when there is no fast one."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
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
