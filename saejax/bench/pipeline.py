"""How fast rows come: out of a store, and out of a language model into one."""

import collections
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax import lm
from saejax.bench.options import BenchOptions, figure
from saejax.config import StreamOptions, TextOptions, default_config, resolve
from saejax.data import sources as src
from saejax.data.harvest import harvest as run_harvest
from saejax.data.manifest import StoreSpec
from saejax.data.store import Store
from saejax.data.stream import Stream
from saejax.data.tokens import build
from saejax.data.writer import StoreWriter

HOOK, CONTEXT, SHARD_CONTEXTS, PIECE, BATCH = "blocks.0.hook_resid_post", 128, 512, 16_384, 4096
_SHARD = 16  # contexts of a shard of `harvest`


def tokens(options: BenchOptions) -> Iterator[dict]:
    """Tokens per second, of the token store and of the tokenizer alone with the same documents in the same batches."""
    tokenizer = lm.files(options.model).tokenizer
    text = TextOptions(source=(options.source,), context=CONTEXT, holdout=0.0)
    sources = src.resolve(text)
    documents = [document for batch in src.read(sources, 0) for document in batch if document]
    rates: dict[str, list[float]] = {"the tokenizer alone": [], "token store": []}
    for repeat in range(options.repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            made = build(Path(folder) / "text", text, tokenizer, 10**12, seed=0, sources=sources)
            store = time.perf_counter() - began
        began = time.perf_counter()
        for first in range(0, len(documents), 256):
            tokenizer.encode_batch(documents[first:first + 256])
        alone = time.perf_counter() - began
        if repeat:  # the first is the warm-up
            for name, took in zip(rates, (alone, store), strict=True):
                rates[name].append(made.contexts * made.context / took)
    for name, values in rates.items():
        yield figure(f"{options.source}, {name}", "tokens/s", values)


def writer(options: BenchOptions) -> Iterator[dict]:
    """MB/s of activations, flushed to the disk."""
    for hookpoints in (1, 4, 16):
        spec = _spec(tuple((f"blocks.{i}.hook_resid_post", options.d_in) for i in range(hookpoints)), 1,
                     max(1, SHARD_CONTEXTS // hookpoints))
        rng, rows = np.random.default_rng(0), spec.shard_rows
        acts = {name: rng.standard_normal((rows, width), np.float32).astype(ml_dtypes.bfloat16)
                for name, width in spec.hookpoints}
        size = 2 * rows * options.d_in * hookpoints
        shards = max(1, round(options.megabytes * 1e6 / size))
        rates: dict = {_written_by_tensorstore: [], _written: []}
        for repeat in range(options.repeats + 1):
            for measure, values in rates.items():
                with tempfile.TemporaryDirectory() as folder:
                    began = time.perf_counter()
                    measure(Path(folder), spec, acts, shards)
                    if repeat:
                        values.append(shards * size / 1e6 / (time.perf_counter() - began))
        yield figure(f"tensorstore, hookpoints: {hookpoints}", "MB/s", rates[_written_by_tensorstore])
        yield figure(f"StoreWriter, hookpoints: {hookpoints}", "MB/s", rates[_written])


def _written_by_tensorstore(root: Path, spec: StoreSpec, acts: dict[str, np.ndarray], shards: int) -> None:
    context, rows = ts.Context({"cache_pool": {"total_bytes_limit": 0}}), spec.shard_rows
    arrays = {name: array.open(root, shards * rows, context) for name, array in spec.arrays().items()}
    ids = np.zeros(rows, np.int32)
    for shard in range(shards):
        place = slice(shard * rows, (shard + 1) * rows)
        writes = [array[place].write(acts.get(name.removeprefix("acts/"), ids)) for name, array in arrays.items()]
        for write in writes:
            write.result()


def _written(root: Path, spec: StoreSpec, acts: dict[str, np.ndarray], shards: int) -> None:
    ids = np.zeros((spec.shard_contexts, spec.context), np.int32)
    store = StoreWriter(root, replace(spec, target_contexts=shards * spec.shard_contexts))
    for shard in range(shards):
        store.write_shard(shard, acts, ids, np.ones_like(ids, bool))
    store.finalize(shards * spec.shard_contexts)


def _spec(hookpoints: tuple[tuple[str, int], ...], shards: int, shard_contexts: int = SHARD_CONTEXTS) -> StoreSpec:
    return StoreSpec(model="random", model_digest="0", lm_dtype="float32", tokenizer_digest="0", text={}, hookpoints=hookpoints,
                     context=CONTEXT, shard_contexts=shard_contexts, chunk_rows=256, target_contexts=shards * shard_contexts)


def reader(options: BenchOptions) -> Iterator[dict]:
    """MB/s of activations. cold: the page cache is asked to forget the store's files before each measurement."""
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", options.d_in, options.megabytes)
        for cache in ("cold", "warm"):
            rates = {_sequential: [], _streamed: []}
            for repeat in range(options.repeats + 1):
                for measure, values in rates.items():
                    if cache == "cold":
                        _drop_cache(store.path)
                    rate = measure(store) / 1e6
                    if repeat:  # the first is the warm-up
                        values.append(rate)
            yield figure(f"tensorstore, in order, {cache}", "MB/s", rates[_sequential])
            yield figure(f"Stream, shuffled, {cache}", "MB/s", rates[_streamed])


def make_store(path: Path, width: int, megabytes: int) -> Store:
    """A store of about `megabytes` of random activations, in the default layout (64 Ki rows a shard, 256 rows a chunk)."""
    shards = max(1, round(megabytes * 1e6 / (SHARD_CONTEXTS * CONTEXT * width * 2)))
    spec = _spec(((HOOK, width),), shards)
    writer, rng = StoreWriter(path, spec), np.random.default_rng(0)
    for shard in range(shards):
        x = rng.standard_normal((SHARD_CONTEXTS * CONTEXT, width), np.float32).astype(ml_dtypes.bfloat16)
        tokens = rng.integers(0, 50_000, (SHARD_CONTEXTS, CONTEXT), np.int32)
        keep = np.ones_like(tokens, bool)
        keep[:, 0] = False
        writer.write_shard(shard, {HOOK: x}, tokens, keep)
    return writer.finalize(shards * SHARD_CONTEXTS)


def _drop_cache(root: Path) -> None:
    for file in root.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _sequential(store: Store) -> float:
    """Bytes per second of tensorstore reading the activations once, four reads in flight."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
    array = store.spec.arrays()[f"acts/{HOOK}"].open(store.path, store.rows, context)
    began, flying = time.perf_counter(), collections.deque()
    for a in range(0, store.rows, PIECE):
        flying.append(array[a:min(a + PIECE, store.rows)].read())
        if len(flying) == 4:
            flying.popleft().result()
    for read in flying:
        read.result()
    return store.rows * store.width(HOOK) * 2 / (time.perf_counter() - began)


def _streamed(store: Store) -> float:
    """Bytes per second of the stream over as many rows as the store has, from one batch to another: the first window is not
    waited for twice, and what is read ahead at the end stands for what was there at the start.
    """
    with Stream(store, (HOOK,), BATCH, StreamOptions(), time.monotonic_ns()) as stream:
        next(stream)
        began, rows = time.perf_counter(), 0
        while rows < store.kept_rows:
            rows += len(next(stream))
        took = time.perf_counter() - began
    return rows * store.width(HOOK) * 2 / took


def harvest(options: BenchOptions) -> Iterator[dict]:
    """Tokens per second of the whole job. A repeat is two harvests, of one shard and of more; the difference of their times is
    that of the shards between, without start and compilation.
    """
    lm_ = lm.load(options.model)
    context = min(CONTEXT, lm_.cfg.max_context)

    def seconds(folder: Path, shards: int) -> tuple[float, int]:
        c = default_config("topk")
        c.lm.model, c.text.source, c.sae.d_sae = options.model, (options.source,), 1024
        c.text.context = context
        c.harvest.hookpoints, c.sae.hookpoint, c.harvest.store = (options.hookpoint,), options.hookpoint, str(folder)
        c.harvest.shard_bytes = _SHARD * context * 2 * lm.width_of(lm_.cfg, options.hookpoint)
        c.log.progress = False
        c.harvest.tokens = shards * _SHARD * context
        start = time.perf_counter()
        store = run_harvest(resolve(c), lm_)
        return time.perf_counter() - start, store.rows

    rates, more = [], 1 + max(1, options.tokens // (_SHARD * context))
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            (short, rows), (long, all_rows) = (seconds(Path(folder) / f"{repeat}_{n}", n) for n in (1, more))
            rates.append((all_rows - rows) / (long - short))
    yield figure(f"{options.model}, {options.hookpoint}", "tokens/s", rates)
