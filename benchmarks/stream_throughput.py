"""Throughput of `Stream` against plain sequential reading of the same store through tensorstore.

    python benchmarks/stream_throughput.py [--megabytes 1000] [--rounds 3] [--widths 768 576] [--directory DIR]

Makes a store of random activations per width, then alternates: (a) tensorstore alone, from the first row to the last
in pieces of 16,384 rows with four reads in flight; (b) `Stream` over an epoch in batches of 4,096 rows, in its steady
state: shuffled, checked and gathered. "cold" drops the page cache of the store's files before each measurement
(posix_fadvise), "warm" does not. Prints the median over the rounds in MB/s of activations and the ratio (b) / (a).
"""

import argparse
import collections
import os
import statistics
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import tensorstore as ts

from saejax.config import StreamOptions
from saejax.data.manifest import StoreSpec
from saejax.data.store import Store
from saejax.data.stream import Stream
from saejax.data.writer import StoreWriter
from saejax.records import StreamState

HOOK, CONTEXT, SHARD_CONTEXTS, PIECE, BATCH = "blocks.0.hook_resid_post", 128, 512, 16_384, 4096


def make_store(path: Path, width: int, megabytes: int) -> Store:
    """A store of `megabytes` of random activations, in the default layout (64 Ki rows a shard, 256 rows a chunk)."""
    shards = max(1, round(megabytes * 1e6 / (SHARD_CONTEXTS * CONTEXT * width * 2)))
    spec = StoreSpec("random", "0", "float32", "0", {}, ((HOOK, width),), CONTEXT, SHARD_CONTEXTS, 256, True,
                     shards * SHARD_CONTEXTS)
    writer, rng = StoreWriter(path, spec), np.random.default_rng(0)
    for shard in range(shards):
        x = rng.standard_normal((SHARD_CONTEXTS * CONTEXT, width), np.float32).astype(ml_dtypes.bfloat16)
        tokens = rng.integers(0, 50_000, (SHARD_CONTEXTS, CONTEXT), np.int32)
        keep = np.ones_like(tokens, bool)
        keep[:, 0] = False
        writer.write_shard(shard, {HOOK: x}, tokens, keep, {})
    return writer.finalize(shards * SHARD_CONTEXTS)


def drop_cache(root: Path) -> None:
    """Asks the kernel to forget the store's pages."""
    for file in root.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def sequential(path: Path, width: int) -> float:
    """Bytes per second of tensorstore reading the activations once, in order."""
    store = Store.open(path)
    context = ts.Context({"cache_pool": {"total_bytes_limit": 64 << 20}})
    array = store.spec.arrays()[f"acts/{HOOK}"].open(path, store.rows, context)
    began, flying = time.perf_counter(), collections.deque()
    for a in range(0, store.rows, PIECE):
        flying.append(array[a:min(a + PIECE, store.rows)].read())
        if len(flying) == 4:
            flying.popleft().result()
    for read in flying:
        read.result()
    return store.rows * width * 2 / (time.perf_counter() - began)


def streamed(path: Path, width: int) -> float:
    """Bytes per second of the stream over as many rows as the store has, from one batch to another: the first window is not
    waited for twice, and what is read ahead at the end stands for what was there at the start."""
    store = Store.open(path)
    with Stream(store, (HOOK,), BATCH, StreamOptions(), StreamState(time.monotonic_ns(), 0, 0)) as stream:
        next(stream)
        began, rows = time.perf_counter(), 0
        while rows < stream.rows_per_epoch:
            rows += len(next(stream).x_BW)
        took = time.perf_counter() - began
    return rows * width * 2 / took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 576])
    parser.add_argument("--directory", help="where to make the stores (default: the system's temporary directory)")
    args = parser.parse_args()
    print("| width | store MB | cache | tensorstore sequential MB/s | stream MB/s | ratio |\n|---|---|---|---|---|---|")
    for width in args.widths:
        with tempfile.TemporaryDirectory(dir=args.directory) as root:
            store = make_store(Path(root) / "store", width, args.megabytes)
            for cache in ("cold", "warm"):
                runs = {sequential: [], streamed: []}
                for _ in range(args.rounds):
                    for measure, rates in runs.items():
                        if cache == "cold":
                            drop_cache(store.path)
                        rates.append(measure(store.path, width) / 1e6)
                a, b = (statistics.median(rates) for rates in runs.values())
                size = store.rows * width * 2 / 1e6
                print(f"| {width} | {size:.0f} | {cache} | {a:.0f} | {b:.0f} | {b / a:.2f} |", flush=True)


if __name__ == "__main__":
    main()
