"""What an index reads: contexts of tokens with random access, and the activations of any of them, from a store or a model."""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from saejax import lm
from saejax.base.errors import FeatureIndexError, StoreError
from saejax.base.storage import barrier, disk_errors, is_writer, text_sha256
from saejax.data import sources as src
from saejax.data.store import Store
from saejax.data.text import Text, describe
from saejax.data.tokens import in_memory
from saejax.features.index.state import MAX_ROWS
from saejax.lm import LM

_PIECE = 1 << 20  # rows copied at once


@dataclass(frozen=True)
class Corpus:
    """Contexts of tokens. Row r is token r % context of context r // context.

    digest: of everything that decides the rows. make: (tokens, keep) in pieces [n, T], in order. activations: (first row, last
    row + 1, tokens [n, T] of these contexts) -> [rows, W], the SAE's hookpoints side by side. by_tokens: these come from the
    tokens alone, whichever contexts they are of.
    """

    kind: str
    digest: str
    context: int
    contexts: int | None
    model_digest: str
    tokenizer_digest: str
    make: Callable
    activations: Callable[[int, int, np.ndarray], np.ndarray]
    by_tokens: bool = False

    def of_contexts(self, numbers_n: np.ndarray, tokens_nT: np.ndarray) -> np.ndarray:
        """Activations [n T, W] of any contexts, in their order."""
        T = self.context
        if self.by_tokens:
            return self.activations(0, len(numbers_n) * T, tokens_nT)
        parts = np.split(np.arange(len(numbers_n)), np.flatnonzero(np.diff(numbers_n) != 1) + 1)
        return np.concatenate([self.activations(numbers_n[part[0]] * T, (numbers_n[part[-1]] + 1) * T, tokens_nT[part])
                               for part in parts])

    def describe(self) -> dict:
        """What the manifest of an index says of it."""
        return {"kind": self.kind, "digest": self.digest, "context": self.context, "model_digest": self.model_digest,
                "tokenizer_digest": self.tokenizer_digest}

    def __repr__(self) -> str:
        contexts = "" if self.contexts is None else f"{self.contexts:,} "
        return f"Corpus({self.kind}, {contexts}contexts of {self.context} tokens)"


def from_store(store: Store, hookpoints: tuple[str, ...], tokens: int | None = None) -> Corpus:
    """The first `tokens` rows (all without it) of a store, whole contexts. Raises `StoreError` for a hookpoint
    that it lacks, or without token ids.
    """
    for hookpoint in hookpoints:
        store.width(hookpoint)
    if not store.has_tokens:
        raise StoreError(f"{store.path}: holds no token ids, and features are shown on tokens; make the store with them "
                         "(saejax.store_of(..., tokens=...)), or index a split of a text")
    contexts = store.n_contexts if tokens is None else min(store.n_contexts, max(1, tokens // store.context))
    _check_rows(contexts * store.context, store.path)

    def make():
        step = max(1, _PIECE // store.context) * store.context
        for start in range(0, contexts * store.context, step):
            stop = min(start + step, contexts * store.context)
            yield (store.tokens(start, stop).reshape(-1, store.context), store.keep(start, stop).reshape(-1, store.context))

    def activations(start: int, stop: int, _) -> np.ndarray:
        parts = [store.read(hookpoint, start, stop) for hookpoint in hookpoints]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    spec = store.spec
    return Corpus("store", text_sha256(store.digest, str(contexts)), store.context, contexts, spec.model_digest,
                  spec.tokenizer_digest, make, activations)


def from_text(text: Text, lm_: LM, hookpoints: tuple[str, ...], *, split: str, tokens: int, batch: int = 8) -> Corpus:
    """About `tokens` tokens of a split of a text; the language model runs while the index is built, rounding to bfloat16 as a
    store does. Raises `HookpointError` and `TextError`.
    """
    for hookpoint in hookpoints:
        lm.check_hookpoint(lm_.cfg, hookpoint)
    options, sources = text.options, src.resolve(text.options)
    contexts = max(1, tokens // options.context)
    _check_rows(contexts * options.context, "config.text")

    def make():
        made = in_memory(options, lm_.tokenizer, contexts, seed=text.seed, split=split, sources=sources)
        last = min(contexts, made.contexts)
        for first in range(0, last, 256):
            numbers = np.arange(first, min(first + 256, last))
            tokens_NT = made.read(numbers)
            yield tokens_NT, made.keep(tokens_NT, numbers)

    forward = forward_of(hookpoints)

    def activations(start: int, stop: int, tokens_NT: np.ndarray) -> np.ndarray:
        parts = []
        for first in range(0, len(tokens_NT), batch):
            tokens_BT = tokens_NT[first:first + batch]
            room = ((0, batch - len(tokens_BT)), (0, 0))
            parts.append(np.asarray(forward(lm_.model, np.pad(tokens_BT, room)))[:len(tokens_BT)])
        x_NTW = np.concatenate(parts)
        return x_NTW.reshape(-1, x_NTW.shape[-1])

    what = {"text": describe(options, sources, text.seed), "split": split, "contexts": contexts, "context": options.context,
            "model": lm_.digest, "hookpoints": list(hookpoints)}
    digest = text_sha256(repr(sorted(what.items())))
    return Corpus(f"text ({split})", digest, options.context, None, lm_.digest, lm_.tokenizer.digest, make, activations,
                  by_tokens=True)


@functools.cache
def forward_of(hookpoints: tuple[str, ...]) -> Callable:
    """forward(model, tokens [B, T]) -> bfloat16 [B, T, W], the hookpoints side by side."""
    def forward(model, tokens_BT):
        found = lm.capture(model, tokens_BT, hookpoints)
        return jnp.concatenate([found[name].astype(jnp.bfloat16) for name in hookpoints], axis=-1)

    return jax.jit(forward)


def _check_rows(rows: int, where) -> None:
    if rows > MAX_ROWS:
        raise FeatureIndexError(f"{where}: {rows} rows, an index holds at most {MAX_ROWS}; ask for at most {MAX_ROWS} tokens")


class Tokens:
    """`tokens.npy` int32 and `keep.npy` bool, [contexts, T] each, beside an index: so that it needs no store to be read."""

    FILES = ("tokens.npy", "keep.npy")

    def __init__(self, folder: Path):
        try:
            self.tokens_NT, self.keep_NT = (np.load(Path(folder) / name, mmap_mode="r", allow_pickle=False)
                                            for name in self.FILES)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FeatureIndexError(f"{folder}: {' and '.join(self.FILES)} are not readable ({reason}); build the index "
                                    "again") from error

    @classmethod
    def write(cls, folder: Path, corpus: Corpus) -> "Tokens":
        """Those of a corpus, unless they are there; one process writes."""
        folder = Path(folder)
        if is_writer() and not all((folder / name).is_file() for name in cls.FILES):
            folder.mkdir(parents=True, exist_ok=True)
            raw = [folder / f".{name}.part" for name in cls.FILES]
            contexts = 0
            with disk_errors(folder), open(raw[0], "wb") as tokens_file, open(raw[1], "wb") as keep_file:
                for tokens_NT, keep_NT in corpus.make():
                    tokens_file.write(np.ascontiguousarray(tokens_NT, np.int32).tobytes())
                    keep_file.write(np.ascontiguousarray(keep_NT, bool).tobytes())
                    contexts += len(tokens_NT)
            if contexts == 0:
                raise FeatureIndexError(f"{folder}: the text has no whole context of {corpus.context} tokens; give more text")
            for part, name, dtype in zip(raw, cls.FILES, (np.int32, bool), strict=True):
                _to_npy(part, folder / name, dtype, (contexts, corpus.context))
        barrier("saejax_index_tokens")
        return cls(folder)


def _to_npy(raw: Path, file: Path, dtype, shape: tuple[int, int]) -> None:
    """A raw file as .npy, piece by piece; it appears by rename."""
    temporary = file.with_name(f".{file.name}.tmp")
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with disk_errors(file), open(temporary, "wb") as out, open(raw, "rb") as values:
        np.lib.format.write_array_header_1_0(out, header)
        shutil.copyfileobj(values, out, 1 << 22)
    temporary.rename(file)
    raw.unlink()
