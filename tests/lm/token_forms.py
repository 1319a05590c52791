"""Tokenizers of every form, small: what puts blanks and bytes into tokens differs, the text that comes back does not."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPECIAL = ("<unk>", "<|endoftext|>")
WORDS = ("the", "king", "has", "a", "daughter")


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate((*SPECIAL, *alphabet))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return _with_specials(backend)


def _pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary of a sentencepiece BPE with bytes, and its merges: each word by its letters from the left."""
    vocab = {w: i for i, w in enumerate((*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"acdeghiknrstu"))}
    merges = []
    for word in ("\u2581" + w for w in WORDS):
        for n in range(2, len(word) + 1):
            vocab.setdefault(word[:n], len(vocab))
            merges.append((word[:n - 1], word[n - 1]))
    return vocab, list(dict.fromkeys(merges))


def _sentencepiece(*last) -> Tokenizer:
    backend = Tokenizer(models.BPE(*_pieces(), byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *last])
    return backend


def llama2() -> Tokenizer:
    """Prepend, byte fallback, Strip: Llama 2, Mistral, Phi-3."""
    backend = _sentencepiece(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return _with_specials(backend)


def gemma() -> Tokenizer:
    """Byte fallback, no blank before the text."""
    backend = _sentencepiece()
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    return _with_specials(backend)


def metaspace() -> Tokenizer:
    """Metaspace, which puts the blank there and takes it away."""
    scores = [(w, 0.0) for w in SPECIAL] + [(c, -10.0) for c in "acdeghiknrstu\u2581"] + [("\u2581" + w, -1.0) for w in WORDS]
    backend = Tokenizer(models.Unigram(scores, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace("\u2581", prepend_scheme="first", split=False)
    return _with_specials(backend)


def words() -> Tokenizer:
    """Whole words, and no decoder."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate((*SPECIAL, *WORDS))}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _with_specials(backend)


def word_pieces() -> Tokenizer:
    """WordPiece, whose decoder joins what begins with ##."""
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate((*SPECIAL, *WORDS, "##s"))}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return _with_specials(backend)


def _with_specials(backend: Tokenizer) -> Tokenizer:
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return backend


def no_decoder() -> Tokenizer:
    """Bytes as GPT-2 writes them, by the splitting alone."""
    backend = byte_level()
    backend.decoder = None
    return backend


FORMS = {f.__name__: f for f in (byte_level, llama2, gemma, metaspace, words, word_pieces, no_decoder)}
WITH_BYTES = ("byte_level", "llama2", "gemma", "no_decoder")


def save(backend: Tokenizer, folder, **config) -> None:
    """As a Hugging Face directory has it. config: of `tokenizer_config.json`."""
    import json
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    ends = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends, **config}))
