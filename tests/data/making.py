"""Small real parts for the tests of the data room: stores of random rows, a word tokenizer, a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import ml_dtypes
import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from saejax import config as C
from saejax.config import TextOptions
from saejax.data import sources as src
from saejax.data.manifest import StoreSpec
from saejax.data.packing import is_held_out
from saejax.data.sources import Sources
from saejax.data.store import Store
from saejax.data.writer import StoreWriter
from saejax.lm import Tokenizer
from tests.lm import tiny_llama

HOOKS = (("blocks.0.hook_resid_post", 24), ("blocks.1.hook_mlp_out", 12))
HOOK = HOOKS[0][0]
CONTEXT = 16


def spec(n_contexts: int = 37, **changes) -> StoreSpec:
    values = {"model": "tiny", "model_digest": "d0", "lm_dtype": "float32", "tokenizer_digest": "t0",
              "text": {"digest": "x0"}, "hookpoints": HOOKS, "context": CONTEXT, "shard_contexts": 8,
              "chunk_rows": 32, "target_contexts": n_contexts}
    return StoreSpec(**{**values, **changes})


class Rows:
    """Random activations, tokens and masks of a store."""

    def __init__(self, n_contexts: int = 37, seed: int = 0, hooks=HOOKS):
        rng = np.random.default_rng(seed)
        self.acts = {h: rng.standard_normal((n_contexts, CONTEXT, d), np.float32).astype(ml_dtypes.bfloat16)
                     for h, d in hooks}
        self.tokens = rng.integers(0, 7, (n_contexts, CONTEXT)).astype(np.int32)
        self.keep = self.tokens != 0

    def shard(self, s: int, contexts: int = 8):
        part = slice(s * contexts, (s + 1) * contexts)
        return s, {h: x[part] for h, x in self.acts.items()}, self.tokens[part], self.keep[part]


def make_store(path: Path, n_contexts: int = 37, seed: int = 0, rows: Rows | None = None) -> Store:
    writer, rows = StoreWriter(path, spec(n_contexts)), rows or Rows(n_contexts, seed)
    for s in writer.missing_shards():
        writer.write_shard(*rows.shard(s))
    return writer.finalize(n_contexts)


def bits(x: np.ndarray) -> np.ndarray:
    """bfloat16 as integers, so that equality is of bits."""
    return np.asarray(x).view(np.uint16)


def directory(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def word_tokenizer(bos: int | None = 0, eos: int | None = 1, special=(0, 1), vocab: int = 50) -> Tokenizer:
    """Word "w7" is id 7."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(backend, frozenset(special), bos, eos, None)


def loaded(options: TextOptions, texts: list[str | None]) -> Sources:
    """Sources that hold these documents."""
    column = datasets.Features({"text": datasets.Value("string")})
    return Sources(["here"], "digest", options, {}, [], [datasets.Dataset.from_dict({"text": texts}, features=column)])


def documents(options: TextOptions, seed: int, split: str = "train", sources: Sources | None = None) -> Iterator[str]:
    """The documents that packing must find in a split, in order."""
    for batch in src.read(sources or src.resolve(options), seed):
        yield from (text for text in batch if text and is_held_out(text, options.holdout) == (split == "heldout"))


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: t, "id": i}) + "\n" for i, t in enumerate(texts)))
    return path


def sentences(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = "the cat sat on a mat and saw two old dogs run far from home in rain".split()
    return [" ".join(rng.choice(words, rng.integers(5, 60))) + "." for _ in range(n)]


def tiny_model(folder: Path) -> Path:
    """A Hugging Face directory: the tiny Llama with a byte-level BPE tokenizer of 300 ids."""
    from transformers import PreTrainedTokenizerFast
    tiny_llama.write(folder, {**tiny_llama.CONFIG, "vocab_size": 300})
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(sentences(50), trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def tiny_config(folder: Path, source: Path, store: Path, **changes) -> C.Config:
    """Config of a harvest with the tiny model: contexts of 16 tokens, shards of 4 contexts."""
    c = C.default_config()
    values = {"lm.model": str(folder), "text.source": (str(source),), "text.context": 16, "harvest.store": str(store),
              "harvest.hookpoints": ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"), "harvest.tokens": 640,
              "lm.batch_contexts": 3, "harvest.shard_bytes": 4 * 16 * 2 * (48 + 48),
              "stream.block_contexts": 2, "sae.hookpoint": "blocks.0.hook_resid_post", "log.progress": False, **changes}
    for key, value in values.items():
        node = c
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return C.resolve(c)
